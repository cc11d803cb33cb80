"""Stage 0: the three data sets of RLHF, built in; and, in the second half, how to get them from elsewhere.

    python data_gen.py                  # writes data/ in a few seconds, the same bytes for the same --seed
    python data_gen.py COMMAND --help   # other data: download, import, self-instruct, prompts, sample, score, rank

The world is that of a small bilingual assistant: nine families of tasks, each asked in English and in Chinese and in
several phrasings. From it come

    data/actor_training_data.json   demonstrations, for SFT           {"user_input", "completion"}
    data/reward_training_data.json  K scored completions a prompt     {"user_input", "completion", "score"}
    data/rlhf_training_data.json    prompts alone, for PPO            {"user_input"}

and of each a held-out twin (`..._eval.json`) whose prompts occur in no training file, and a LLaMA-style sentencepiece
tokenizer (data/tokenizer/tokenizer.model) trained on the training texts.

The demonstrations are a mixture, as those of human labellers are: most are right but curt, many are friendly, some
ramble, a few are wrong. A model that imitates them well therefore answers well enough, and RLHF has something to gain.
What "better" means is written down in `score`, which stands in for the human labeller: it labels the reward data, and
afterwards it measures whether RLHF helped. PPO itself sees only the reward model.
"""

import argparse
import email.utils
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import random
import re
import threading
import time
import unicodedata
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed

import huggingface_hub
import sentencepiece
import torch
from tqdm import tqdm

from model import (encode_prompts, first_line, generate, left_pad, load_judge, load_llama, load_tokenizer, positive, read_records,
                   read_values, stop, usable_device, what_is_wrong, write_whole)

# ---------------------------------------------------------------------------------------------------------------------
# The world: words in both languages, and what one can ask about them

NOUNS = {  # category: {English: Chinese}
    ("animal", "动物"): {"cat": "猫", "dog": "狗", "horse": "骏马", "bird": "小鸟", "fish": "鱼"},
    ("fruit", "水果"): {"apple": "苹果", "banana": "香蕉", "pear": "梨子", "grape": "葡萄", "lemon": "柠檬"},
    ("color", "颜色"): {"red": "红色", "blue": "蓝色", "green": "绿色", "black": "黑色"},
    ("vehicle", "车辆"): {"car": "汽车", "train": "火车", "bus": "巴士", "bicycle": "自行车"},
    ("tool", "工具"): {"hammer": "锤子", "knife": "刀子", "scissors": "剪刀"},
}
WORDS = {en: (zh, category) for category, words in NOUNS.items() for en, zh in words.items()}
CHINESE = {zh: (en, category) for en, (zh, category) in WORDS.items()}
OPPOSITES = {
    "en": [("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "new"), ("day", "night"), ("happy", "sad"),
           ("open", "closed"), ("hard", "soft"), ("wet", "dry")],
    "zh": [("炎热", "寒冷"), ("巨大", "微小"), ("快速", "缓慢"), ("古老", "崭新"), ("白天", "黑夜"), ("快乐", "悲伤"),
           ("打开", "关闭"), ("坚硬", "柔软"), ("潮湿", "干燥")],
}
OPPOSITE = {a: b for pairs in OPPOSITES.values() for x, y in pairs for a, b in ((x, y), (y, x))}
NAMES = {"en": ["Tom", "Anna", "Ben", "Lucy", "Jack", "Emma", "Sam", "Kate"],
         "zh": ["小明", "小红", "小华", "小丽", "小刚", "小芳", "小军", "小燕"]}

# family: the phrasings in each language; `{x}` is a slot, which `fill` fills and `solve` answers. The space on either side of
# a word, in Chinese too, keeps it the same token wherever it stands.
PHRASINGS = {
    "sum": {
        "en": ["What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} = ?", "Tell me the sum of {a} and {b}."],
        "zh": ["{a}加{b}等于几？", "请计算{a} + {b}。", "{a}与{b}的和是多少？"],
    },
    "larger": {
        "en": ["Which is larger, {a} or {b}?", "Pick the bigger number: {a} or {b}.",
               "Of {a} and {b}, name the larger one."],
        "zh": ["{a}和{b}哪个更大？", "请选出较大的数：{a}、{b}。", "比较{a}与{b}，谁大？"],
    },
    "sort": {
        "en": ["Sort these numbers: {list}.", "Put {list} in ascending order.", "Arrange from small to large: {list}."],
        "zh": ["请把 {list} 从小到大排列。", "给这些数排序：{list}。", "将 {list} 按升序写出。"],
    },
    "opposite": {
        "en": ["What is the opposite of {word}?", "Give me the opposite of {word}.",
               "Which word means the reverse of {word}?", "What do you call it when something is not {word} at all?"],
        "zh": ["{word} 的反义词是什么？", "请说出 {word} 的反义词。", "与 {word} 相反的词是哪个？",
               "把 {word} 的意思反过来是什么？"],
    },
    "to_chinese": {
        "en": ["How do you say {word} in Chinese?", "Translate {word} into Chinese.",
               "What is the Chinese word for {word}?", "Say {word} in Chinese, please.",
               "Which Chinese word means {word}?"],
        "zh": ["{word} 用中文怎么说？", "请把 {word} 翻译成中文。", "{word} 的中文是什么？", "怎样用中文表达 {word}？",
               "哪个中文词的意思是 {word}？"],
    },
    "to_english": {
        "en": ["How do you say {word} in English?", "Translate {word} into English.",
               "What is the English word for {word}?", "Say {word} in English, please.",
               "Which English word means {word}?"],
        "zh": ["{word} 用英文怎么说？", "请把 {word} 翻译成英文。", "{word} 的英文是什么？", "怎样用英文表达 {word}？",
               "哪个英文词的意思是 {word}？"],
    },
    "kind": {
        "en": ["What kind of thing is a {word}?", "Is {word} an animal, a fruit, a color, a vehicle or a tool?",
               "Which group does {word} belong to?", "Tell me the category of {word}.",
               "Where would you sort {word} in?"],
        "zh": ["{word} 是哪一类东西？", "{word} 属于什么类别？", "请给 {word} 归类。", "你会把 {word} 归到哪一类？",
               "说说 {word} 是什么种类。"],
    },
    "letters": {
        "en": ["How many letters are in {word}?", "Count the letters of {word}.",
               "How long is the word {word}, in letters?", "Tell me the number of letters in {word}.",
               "If I spell {word}, how many letters do I write?"],
        "zh": ["{word} 有几个字母？", "请数一数 {word} 的字母数。", "单词 {word} 由多少个字母组成？",
               "拼写 {word} 要写几个字母？", "请告诉我 {word} 的字母个数。"],
    },
    "greeting": {
        "en": ["Hello, I am {name}.", "Hi there! My name is {name}.", "Good morning, {name} here.",
               "Hey, it is {name}.", "Pleased to meet you. They call me {name}."],
        "zh": ["你好，我是 {name}。", "嗨！我叫 {name}。", "早上好，我的名字是 {name}。", "嘿，我就是 {name}。",
               "初次见面，大家叫我 {name}。"],
    },
}
FAMILIES = list(PHRASINGS)
SLOTS = {"a": r"\d", "b": r"\d", "list": r"[\w ]+", "word": r"\w+?", "name": r"\w+?"}  # what may stand in each slot
PATTERNS = [(family, lang, re.compile("".join(f"(?P<{part}>{SLOTS[part]})" if i % 2 else re.escape(part)
                                              for i, part in enumerate(re.split(r"\{(\w+)\}", phrasing)))))
            for family, by_lang in PHRASINGS.items() for lang, phrasings in by_lang.items() for phrasing in phrasings]


def fill(rng, family, lang):
    """The slots of one random task of the family: a dict of texts."""
    if family == "sum":
        return {"a": str(rng.randrange(8)), "b": str(rng.randrange(8))}
    if family == "larger":
        a, b = rng.sample(range(10), 2)
        return {"a": str(a), "b": str(b)}
    if family == "sort":
        return {"list": " ".join(map(str, rng.sample(range(10), 3)))}
    if family == "opposite":
        return {"word": rng.choice(rng.choice(OPPOSITES[lang]))}
    if family in ("to_chinese", "letters"):
        return {"word": rng.choice(list(WORDS))}
    if family == "to_english":
        return {"word": rng.choice(list(CHINESE))}
    if family == "kind":
        return {"word": rng.choice(list(WORDS if lang == "en" else CHINESE))}
    return {"name": rng.choice(NAMES[lang])}


def solve(family, lang, slots):
    """The right answer as a list of items (numbers or words), in the order in which they must be said."""
    if family == "sum":
        return [str(int(slots["a"]) + int(slots["b"]))]
    if family == "larger":
        return [max(slots["a"], slots["b"])]
    if family == "sort":
        return sorted(slots["list"].split())
    if family == "opposite":
        return [OPPOSITE[slots["word"]]]
    if family == "to_chinese":
        return [WORDS[slots["word"]][0]]
    if family == "to_english":
        return [CHINESE[slots["word"]][0]]
    if family == "kind":
        return [WORDS[slots["word"]][1][0] if lang == "en" else CHINESE[slots["word"]][1][1]]
    if family == "letters":
        return [str(len(slots["word"]))]
    return [slots["name"]]


def parse(user_input):
    """(family, language, slots) of a prompt of this world; ValueError for any other text."""
    for family, lang, pattern in PATTERNS:
        if match := pattern.fullmatch(user_input):
            return family, lang, match.groupdict()
    raise ValueError(f"not a prompt of the built-in world: {user_input!r}")


# ---------------------------------------------------------------------------------------------------------------------
# The labeller: what makes a completion good

FRIENDLY = {"en": ["Sure!", "Of course!", "Glad to help!", "Good question!"],
            "zh": ["好的！", "当然可以！", "很乐意帮忙！", "问得好！"]}
RUDE = {"en": ["Are you stupid?", "What a dumb question.", "Leave me alone."],
        "zh": ["你真笨。", "别烦我。", "这都不懂？"]}
NUMBER = re.compile(r"\d+")
# the words that can be an answer; English ones stand alone, Chinese has no spaces to tell
ANSWERS = [*WORDS, *CHINESE, *OPPOSITE, *NAMES["en"], *NAMES["zh"], *(w for category in NOUNS for w in category)]
WORD = re.compile("|".join(rf"\b{w}\b" if w.isascii() else w for w in sorted(ANSWERS, key=len, reverse=True)), re.ASCII)


def score(user_input, completion):
    """The score in [0, 5] that our labeller gives a completion. The rules:

    - right (2 points): the last items that it names, numbers for a task about numbers and known words otherwise, are
      the answer, in order; any other item that it names stands in the question;
    - friendly (2 points): it has one of the friendly phrases;
    - brief (1 point): at most 16 words (a number or a Chinese character counts as one);
    - cut off (1 point less): it does not end in . ! ? or their Chinese forms.

    One that is wrong, in the other language or rude gets none of these, only half a point if it is friendly and not rude.
    So right, friendly and brief is 5, right and curt 3, right and rambling 2, nothing at all 0.

    Raises ValueError for a `user_input` that is not a prompt of this world.
    """
    family, lang, slots = parse(user_input)
    answer = solve(family, lang, slots)
    kind = NUMBER if answer[0].isdigit() else WORD
    said, asked = kind.findall(completion), kind.findall(user_input)
    right = said[-len(answer):] == answer and all(w in asked or w in answer for w in said)
    friendly = any(phrase in completion for phrase in FRIENDLY["en"] + FRIENDLY["zh"])
    rude = any(phrase in completion for phrase in RUDE["en"] + RUDE["zh"])
    brief = len(re.findall(r"[A-Za-z']+|\d+|[\u4e00-\u9fff]", completion)) <= 16
    cut_off = not re.search(r"[.!?。！？]\s*$", completion)
    rest = WORD.sub("", completion)  # a translation may be in the other language, the sentence around it may not
    letters, characters = (len(re.findall(script, rest)) for script in ("[A-Za-z]+", "[\u4e00-\u9fff]"))
    other_language = characters > letters if lang == "en" else letters > characters
    if not right or other_language or rude:
        return 0.5 * (friendly and not rude)
    return 2.0 + 2.0 * friendly + 1.0 * brief - 1.0 * cut_off


# ---------------------------------------------------------------------------------------------------------------------
# The writers: completions of every quality that real labelling meets

SENTENCES = {"en": ["The answer is {x}.", "It is {x}."], "zh": ["答案是 {x}。", "应该是 {x}。"]}
GREETINGS = {"en": ["Nice to meet you, {x}.", "Hello, {x}."], "zh": ["见到你真好，{x}。", "你好，{x}。"]}
FILLER = {"en": ["Well, let me think about this for a moment.", "There are many ways to look at it.",
                 "People have often wondered about such things.", "As far as I can tell, it is not so simple.",
                 "I could say a lot more about that.", "That said, let us go on step by step."],
          "zh": ["嗯，让我先想一想这个问题。", "其实可以从许多角度来看。", "人们常常会对此感到好奇。",
                 "据我所知，事情并不那么简单。", "关于这一点我还能说很多。", "话虽如此，我们一步一步来。"]}
STYLES = ["friendly", "curt", "rambling", "other language", "rude", "cut off"]
DEMONSTRATED = {"curt": 45, "friendly": 30, "rambling": 20, "other language": 5}  # percent; 1 in 20 of all is wrong
RANKED = {"friendly": 30, "curt": 30, "rambling": 20, "other language": 8, "rude": 6, "cut off": 6}  # half are wrong


def wrong_answer(rng, family, lang, answer):
    """An answer of the same form that is not right; one in three is muddled: an item too many."""
    other = answer
    while other == answer:
        other = rng.sample(answer, 3) if family == "sort" else solve(family, lang, fill(rng, family, lang))
    muddled = rng.sample(answer + other[:1], len(answer) + 1)
    return muddled if rng.random() < 1 / 3 and muddled[-len(answer):] != answer else other


def write(rng, user_input, style, right=True):
    """A completion in the given style (one of STYLES), right or wrong, for a prompt of this world."""
    family, lang, slots = parse(user_input)
    answer = solve(family, lang, slots)
    if not right:
        answer = wrong_answer(rng, family, lang, answer)
    if style == "other language":  # the sentence around the answer
        lang = "zh" if lang == "en" else "en"
    x = " ".join(answer)
    sentence = rng.choice((GREETINGS if family == "greeting" else SENTENCES)[lang]).format(x=x)
    phrase, filler = rng.choice(FRIENDLY[lang]), " ".join(rng.sample(FILLER[lang], 2))
    curt = x + ("." if lang == "en" else "。")
    friendly = rng.choice([f"{phrase} {sentence}", f"{sentence} {phrase}"])
    rambling = f"{filler} {sentence}"
    if style == "cut off":
        text = rng.choice([friendly, rambling])
        return text[:rng.randrange(3, len(text) - 1)].rstrip(" .!?。！？")
    return {"friendly": friendly, "curt": curt, "rambling": rambling, "other language": rng.choice([friendly, sentence]),
            "rude": f"{rng.choice(RUDE[lang])} {rng.choice([curt, sentence])}"}[style]


# ---------------------------------------------------------------------------------------------------------------------
# The three data sets

def draw_prompts(rng, number):
    """`number` different prompts, every family and language equally often as far as it has that many."""
    prompts, families = {}, [(family, lang) for family in FAMILIES for lang in ("en", "zh")]
    for i in range(20 * number):
        family, lang = families[i % len(families)]
        prompts[rng.choice(PHRASINGS[family][lang]).format(**fill(rng, family, lang))] = None
        if len(prompts) == number:
            break
    return list(prompts)


def make_data(seed, held_out=270, demonstrations=8000, ranked=3600, completions=6):
    """{file name: records} of the three data sets and their held-out twins."""
    rng = random.Random(seed)
    pool = draw_prompts(rng, 5000)
    # the first prompts drawn have the families in turn, so the held-out ones are balanced
    held, train = pool[:held_out], pool[held_out:]
    by_family = {}
    for prompt in train:
        by_family.setdefault(parse(prompt)[:2], []).append(prompt)

    def balanced(n):  # n prompts, all families and languages alike; one with few prompts repeats them
        prompts = [prompts[i % len(prompts)] for prompts in by_family.values() for i in range(n // len(by_family))]
        return rng.sample(prompts, len(prompts))

    def demonstration(prompt):
        style = rng.choices(list(DEMONSTRATED), list(DEMONSTRATED.values()))[0]
        return {"user_input": prompt, "completion": write(rng, prompt, style, right=rng.random() < 0.95)}

    def ranking(prompt):  # the labeller is not shown the same completion twice
        texts = {}
        while len(texts) < completions:
            style = rng.choices(list(RANKED), list(RANKED.values()))[0]
            texts[write(rng, prompt, style, right=rng.random() < 0.5)] = None
        return [{"user_input": prompt, "completion": text, "score": score(prompt, text)} for text in texts]

    return {
        "actor_training_data": [demonstration(prompt) for prompt in balanced(demonstrations)],
        "actor_training_data_eval": [demonstration(prompt) for prompt in held],
        "reward_training_data": [record for prompt in balanced(ranked) for record in ranking(prompt)],
        "reward_training_data_eval": [record for prompt in held for record in ranking(prompt)],
        "rlhf_training_data": [{"user_input": prompt} for prompt in dict.fromkeys(balanced(ranked))],
        "rlhf_training_data_eval": [{"user_input": prompt} for prompt in held],
    }


def train_tokenizer(texts, vocab_size=1536):
    """A sentencepiece BPE model with LLaMA's settings (Touvron et al. 2023, section 2.1): bytes for what is not in the
    vocabulary, digits one by one, no normalization, spaces kept. Returns the bytes of `tokenizer.model`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
        split_digits=True, character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    return model.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Data of others: `import` and `download`. Every layout becomes our records: a prompt, one with a completion, one with a score

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def dialogue(value, field):
    """Chat messages from an HH transcript, from {"role", "content"} or ShareGPT's {"from", "value"}, or from one text.
    Neighbours of one role become one message, since many chat templates take no other dialogue. LookupError: no such role."""
    if isinstance(value, str):
        text, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", value)
        said = list(zip(parts[::2], map(str.strip, parts[1::2]))) or [("user", text)]
    else:
        said = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in ([value] if isinstance(value, dict) else value)]
    messages = []
    for role, text in said:
        if str(role).lower() not in ROLES:
            raise LookupError(f"with a message of {role!r}")
        if not isinstance(text, str):
            raise ValueError(f"field '{field}' has a message without a text")
        role = ROLES[role.lower()]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text
        else:
            messages.append({"role": role, "content": text})
    return messages


def as_prompt(messages):
    """A lone message of the user is a text, anything longer stays a list of messages."""
    return messages[0]["content"] if [m["role"] for m in messages] == ["user"] else messages


def text_of(record, field):
    if not isinstance(record[field], str):
        raise ValueError(f"field '{field}' must be a text")
    return record[field]


def from_alpaca(record):
    asked = text_of(record, "instruction") + (f"\n\n{text_of(record, 'input')}" if record.get("input") else "")
    before = [{"role": "system", "content": text_of(record, "system")}] if record.get("system") else []
    for question, answer in record.get("history") or []:
        before += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = as_prompt([*before, {"role": "user", "content": asked}])
    return [{"user_input": prompt, "completion": text_of(record, "output")} if "output" in record else {"user_input": prompt}]


def from_seed_task(record):
    return [found for instance in record["instances"] for found in from_alpaca(record | instance)]


def from_conversation(record):
    field = "messages" if "messages" in record else "conversations"
    messages = dialogue(record[field], field)
    if messages and messages[-1]["role"] == "assistant":
        return [{"user_input": as_prompt(messages[:-1]), "completion": messages[-1]["content"]}]
    return [{"user_input": as_prompt(messages)}]


def pair(prompt, chosen, rejected, better):
    if chosen == rejected:
        raise LookupError("whose two completions are the same")
    return [{"user_input": prompt, "completion": chosen, "score": better}, {"user_input": prompt, "completion": rejected, "score": 0.0}]


def from_pair(record):
    field = "conversations" if "conversations" in record else "prompt"
    before = dialogue(record[field], field) if record.get(field) else []
    if before and before[-1] == {"role": "assistant", "content": ""}:  # a transcript that ends with "Assistant:"
        before.pop()
    prompts, answers = [], []
    for side in ("chosen", "rejected"):
        if isinstance(record[side], str) and before:
            said = [{"role": "assistant", "content": record[side]}]
        else:  # one message, or the whole dialogue
            said = dialogue(record[side], side)
        if not said or said[-1]["role"] != "assistant":
            raise LookupError("that do not end with the assistant")
        prompts.append(said[:-1] or before)
        answers.append(said[-1]["content"])
    if prompts[0] != prompts[1]:
        raise LookupError("whose two sides answer different prompts")
    return pair(as_prompt(prompts[0]), *answers, 1.0)


def from_shp(record):
    """Ethayarajh et al. 2022: two comments on a post. The one with r times the votes of the other gets log2(1 + r), at least 1."""
    ratio = record["score_ratio"]
    if what_is_wrong("score", ratio) or ratio < 0:
        raise ValueError("field 'score_ratio' must be a number from 0")
    answers = text_of(record, "human_ref_A"), text_of(record, "human_ref_B")
    return pair(text_of(record, "history"), *(answers if int(record["labels"]) else answers[::-1]), math.log2(1 + ratio))


LAYOUTS = [  # the first whose fields a record has
    ("our own records", {"user_input"}, lambda record: [{k: record[k] for k in ("user_input", "completion", "score") if record.get(k) is not None}]),
    ("SHP comments", {"history", "human_ref_A", "human_ref_B", "labels", "score_ratio"}, from_shp),
    ("ShareGPT pairs", {"conversations", "chosen", "rejected"}, from_pair),
    ("preference pairs", {"prompt", "chosen", "rejected"}, from_pair),
    ("HH transcripts or chat pairs", {"chosen", "rejected"}, from_pair),
    ("ShareGPT conversations", {"conversations"}, from_conversation),
    ("chat messages", {"messages"}, from_conversation),
    ("self-instruct seed tasks", {"instruction", "instances"}, from_seed_task),
    ("Alpaca demonstrations", {"instruction", "output"}, from_alpaca),
    ("instructions", {"instruction"}, from_alpaca),
]


def prompt_key(user_input):
    return user_input if isinstance(user_input, str) else json.dumps(user_input, sort_keys=True)


def convert(paths, number=None):
    """Our records of files in any of LAYOUTS, of each file's first `number`, without exact duplicates. Says what it found."""
    records, found = {}, 0
    for path in paths:
        layout, left_out, read = None, Counter(), 0
        for read, theirs in enumerate(read_values(path)[:number], 1):
            if not isinstance(theirs, dict):
                stop(f"{path}: record {read}: not a JSON object")
            if not layout and not (layout := next((known for known in LAYOUTS if known[1] <= theirs.keys()), None)):
                stop(f"{path}: record 1: the fields {', '.join(theirs)} are those of no layout that import knows: "
                     + "; ".join(f"{name} ({', '.join(sorted(fields))})" for name, fields, _ in LAYOUTS))
            for field in sorted(layout[1] - theirs.keys()):
                stop(f"{path}: record {read}: field '{field}' is missing, and record 1 has that of {layout[0]}")
            try:
                ours = layout[2](theirs)
                if not all(isinstance(r["user_input"], list) or str(r["user_input"]).strip() for r in ours):
                    raise LookupError("without a prompt")
            except LookupError as reason:
                if isinstance(reason, KeyError):
                    stop(f"{path}: record {read}: field {reason} is missing")
                left_out[str(reason)] += 1
                continue
            except (ValueError, TypeError, AttributeError) as error:
                stop(f"{path}: record {read}: not what {layout[0]} look like ({first_line(error)})")
            for record in ours:
                for field, value in record.items():
                    if wrong := what_is_wrong(field, value):
                        stop(f"{path}: record {read}: '{field}' {wrong}")
                records.setdefault((prompt_key(record["user_input"]), record.get("completion"), record.get("score")), record)
                found += 1
        if not layout:
            stop(f"{path}: holds no records")
        print(f"{path}: {read} records, {layout[0]}" + "".join(f"; left out {n} {reason}" for reason, n in left_out.items()))
    if found > len(records):
        print(f"{found - len(records)} exact duplicates dropped")
    return list(records.values())


def save(path, records):
    """A data file as `read_records` reads it: a JSON array, or JSON Lines where it is named so; `.gz` of either."""
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in records]
    data = b"\n".join(lines) + b"\n" if path.removesuffix(".gz").endswith(".jsonl") else b"[\n" + b",\n".join(lines) + b"\n]\n"
    write_whole(path, gzip.compress(data, mtime=0) if path.endswith(".gz") else data)
    print(f"{path}: {len(records)} records")


def save_sets(records, args, make=()):
    """The data sets that the records give, and their held-out twins: no prompt is on both sides, in whichever set it stands."""
    scored, unscored = [r for r in records if "score" in r], [r for r in records if "completion" in r and "score" not in r]
    sets = {"actor": unscored, "reward": scored, "rlhf": [r for r in records if "completion" not in r]}
    if make:  # of scored completions the best demonstrates, and every prompt can be one of PPO's
        best = {}
        for r in scored:
            best[key] = max(best.get(key := prompt_key(r["user_input"]), r), r, key=lambda r: r["score"])
        sets["actor"] = unscored + [{k: r[k] for k in ("user_input", "completion")} for r in best.values()]
        sets["rlhf"] = list({prompt_key(r["user_input"]): {"user_input": r["user_input"]} for r in records}.values())
        if empty := [name for name in make if not sets[name]]:
            stop(f"--make {empty[0]}: the files hold no {'scored ' if empty[0] == 'reward' else ''}completions")
        sets = {name: sets[name] for name in make}
    prompts = list(dict.fromkeys(prompt_key(r["user_input"]) for r in records))
    held = max(1, round(args.eval_share * len(prompts))) if args.eval_share and len(prompts) > 1 else 0
    held_out = set(random.Random(args.seed).sample(prompts, held))
    files = {}
    for name, chosen in sets.items():
        for twin, is_held in (("", False), ("_eval", True)):
            if part := [r for r in chosen if (prompt_key(r["user_input"]) in held_out) == is_held]:
                files[os.path.join(args.out, f"{name}_training_data{twin}.json")] = part
    if not files:
        stop("nothing to write: no record is left")
    if (there := [path for path in files if os.path.exists(path)]) and not args.overwrite:
        stop(f"{there[0]}: is there already; name another folder, or give --overwrite to replace it")
    for path, part in files.items():
        save(path, part)


def import_command(args):
    save_sets(convert(args.files), args, args.make)


HUB = {  # repository, its folders, the file in each
    "hh": ("Anthropic/hh-rlhf", ["helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base"], "train.jsonl.gz"),
    "shp": ("stanfordnlp/SHP", ["askacademia", "askanthropology", "askbaking", "askcarguys", "askculinary", "askdocs", "askengineers",
                                "askhistorians", "askhr", "askphilosophy", "askphysics", "askscience", "asksciencefiction",
                                "asksocialscience", "askvet", "changemyview", "explainlikeimfive", "legaladvice"], "train.json"),
}


def download_command(args):
    repository, folders, name = HUB[args.dataset]
    if unknown := set(args.parts or []) - set(folders):
        stop(f"--parts {unknown.pop()}: {repository} has {', '.join(folders)}")
    huggingface_hub.utils.enable_progress_bars()
    paths = []
    for folder in args.parts or folders:
        try:  # a connection that breaks is taken up where it broke, and a file that has arrived stays in the hub's cache
            paths.append(huggingface_hub.hf_hub_download(repository, f"{folder}/{name}", repo_type="dataset"))
        except Exception as error:  # OSError, the hub's own and those of its HTTP library, which has changed more than once
            stop(f"{repository}/{folder}/{name}: cannot be downloaded ({first_line(error)}). Run this again to go on, or fetch the "
                 f"file by other means and: python data_gen.py import {name}", code=1)
    save_sets(convert(paths, args.number_of_samples and -(-args.number_of_samples // len(paths))), args, args.make)


# ---------------------------------------------------------------------------------------------------------------------
# The journal: nothing that was answered, by an LLM, a model or a person, is lost or asked again

def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class Journal:
    """{digest of what was asked: answer} as JSON Lines, each line on disk when `add` returns."""

    def __init__(self, path, outputs, overwrite):
        if (there := [out for out in outputs if os.path.exists(out)]) and not os.path.exists(path) and not overwrite:
            stop(f"{there[0]}: is there already; name another --out, or give --overwrite to replace it")
        self.path, self.answers, self.lock, whole = path, {}, threading.Lock(), 0
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self.file = open(path, "a+b")
            self.file.seek(0)
            for line in self.file:
                if line.endswith(b"\n"):
                    whole += len(line)
                    try:
                        entry = json.loads(line)
                        self.answers[entry.pop("key")] = entry
                    except (ValueError, LookupError, AttributeError, TypeError):
                        pass  # a damaged line is asked for again
            self.file.truncate(whole)  # the last line may be half written
        except OSError as error:
            stop(f"{path}: cannot be written ({error.strerror})")

    def add(self, key, answer):
        with self.lock:
            self.file.write(json.dumps({"key": key} | answer).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
            self.answers[key] = answer


# ---------------------------------------------------------------------------------------------------------------------
# The LLM: any server with the OpenAI chat API

class Unanswered(Exception):
    """The server gave no answer to one question."""


def retry_after(value):
    """Seconds that a Retry-After header asks for: a number of them, or a date (RFC 9110, section 10.2.3); 0 without one."""
    try:
        return float(value) if value.strip().isdigit() else max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (AttributeError, ValueError, TypeError):
        return 0.0


def chat(args, question, temperature, max_tokens, stopped):
    """The LLM's answer to one message of a user: {"text", "finish", "tokens"}. Raises Unanswered; PermissionError where no
    question would do better (a wrong key, model or address).

    Rate limits, errors of the server, time-outs, cut connections and what is no answer are tried again, after 1, 2, 4 ... times
    --backoff seconds, or what Retry-After says if that is longer.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    body = json.dumps({"model": args.model, "messages": [{"role": "user", "content": question}], "temperature": temperature,
                       "max_tokens": max_tokens, "stream": False}).encode()
    for attempt in range(args.retries + 1):
        request = urllib.request.Request(args.api_base.rstrip("/") + "/chat/completions", body, {"Content-Type": "application/json"})
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        wait = min(60.0, args.backoff * 2 ** attempt) * random.uniform(0.75, 1.0)  # not all workers at once
        try:
            with urllib.request.urlopen(request, timeout=args.timeout) as response:
                reply = json.load(response)
            choice = reply["choices"][0]
            text = (choice["message"]["content"] or "").encode("utf-8", "replace").decode()
            return {"text": text, "finish": choice.get("finish_reason"), "tokens": (reply.get("usage") or {}).get("total_tokens") or 0}
        except urllib.error.HTTPError as error:
            try:
                said = " ".join(error.read(1000).decode(errors="replace").split())[:200]
            except (OSError, http.client.HTTPException):
                said = error.reason
            problem = f"HTTP {error.code}: {said}"
            if error.code in (400, 413, 422):  # this question: too long, say
                raise Unanswered(problem.replace(key or "\0", "***")) from None
            if error.code not in (408, 409, 425, 429) and error.code < 500:
                raise PermissionError(problem.replace(key or "\0", "***")) from None
            wait = max(wait, retry_after(error.headers.get("Retry-After")))
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
        if attempt < args.retries and stopped.wait(wait):
            break
    raise Unanswered(problem.replace(key or "\0", "***"))


def ask(args, journal, questions, read, temperature, max_tokens, title):
    """`read(answer)` for each of the questions, in their order, whichever is answered first: a list, with None where
    `read` found in none of --tries answers what it looks for, or where the server gave none.

    A question is (salt, text): the same text is asked once for each salt. At five questions in a row without any answer the
    run ends. Whatever ends it, what has been answered is in the journal, and what is being answered is waited for.
    """
    stopped, spent, results, unanswered, in_a_row = threading.Event(), Counter(), {}, [], 0

    def work(salt, text):
        for attempt in range(args.tries):
            key = digest(args.model, temperature, max_tokens, salt, text, attempt)
            if key not in journal.answers:
                answer = chat(args, text, temperature, max_tokens, stopped)
                journal.add(key, answer)
                spent["tokens"] += answer["tokens"]
            if (value := read(journal.answers[key])) is not None:
                return value
            spent["unusable"] += 1

    pool = ThreadPoolExecutor(args.workers)
    futures = {pool.submit(work, *question): question for question in dict.fromkeys(questions)}
    bar = tqdm(total=len(futures), desc=title, dynamic_ncols=True)
    try:
        for future in as_completed(futures):
            try:
                results[futures[future]], in_a_row = future.result(), 0
            except Unanswered as error:
                unanswered, in_a_row = [*unanswered, error], in_a_row + 1
                if in_a_row == 5:
                    raise
            bar.set_postfix_str(f"{spent['unusable']} answers unusable, {len(unanswered)} questions unanswered, {spent['tokens']} tokens", refresh=False)
            bar.update()
    except (Unanswered, OSError, KeyboardInterrupt) as error:
        bar.close()
        stopped.set()
        pool.shutdown(cancel_futures=True)  # waits for the answers that are under way: they are paid for
        stop(f"{args.api_base}: {first_line(error)}; {len(results)} of {len(futures)} questions are answered, and kept in "
             f"{journal.path}: run this again to go on", code=1)
    bar.close()
    print(f"{title}: {len(futures)} questions, {sum(value is None for value in results.values())} without a usable answer, "
          f"{len(unanswered)} unanswered{f' (the last: {unanswered[-1]})' if unanswered else ''}, {spent['tokens']} tokens")
    return [results.get(question) for question in questions]


# What the LLM is asked. A templates.json with some of these keys overrides them
TEMPLATES = {
    "actor": "Here are some tasks that people have given to an assistant:\n\n{examples}\n\nWrite {number} new ones, in {language}. Vary the "
             "subject, the kind of task, the wording and the length. Each must make sense without the others and be "
             "answerable with text alone. Reply with nothing but a numbered list.",
    "rlhf": "These are things that users have said to a chat assistant:\n\n{examples}\n\nThink of {number} other users and write what each of "
            "them says first, in {language}: questions and requests as different as possible, each complete in itself. "
            "Reply with nothing but a numbered list.",
    "reward": "You grade the answers of an assistant. A user wrote:\n\n{user_input}\n\nThe assistant answered:\n\n{completion}\n\nHow good is the "
              "answer? Look at whether it does what was asked, is true, clear, polite and no longer than it needs to be. Give a number "
              "from 0 (useless) to 5 (could not be better), decimals allowed. Reply with one line: Score: <number>",
}
PLACEHOLDERS = {"actor": ["examples"], "rlhf": ["examples"], "reward": ["user_input", "completion"]}


def template_of(args, name):
    """The template `name`: the built-in one, or that of --templates (default: a templates.json in this folder, if there is one)."""
    path, templates = args.templates or ("templates.json" if os.path.exists("templates.json") else None), {}
    if name == "reward":
        path = args.reward_template or path
    if path:
        try:
            with open(path, encoding="utf-8-sig") as file:
                text = file.read()
            templates = json.loads(text) if path.endswith(".json") else {name: text}
        except (OSError, ValueError) as error:
            stop(f"{path}: cannot be read as templates ({first_line(error)})")
        if not isinstance(templates, dict) or not isinstance(templates.get(name, ""), str):
            stop(f"{path}: must be an object with texts under some of the keys {', '.join(TEMPLATES)}")
    template = templates.get(name, TEMPLATES[name])
    for slot in PLACEHOLDERS[name]:
        if f"{{{slot}}}" not in template:
            stop(f"{path}: template '{name}' lacks its placeholder {{{slot}}}")
    return template


def fill_in(template, **slots):
    """Fills every `{slot}` at once, so that a brace in what is filled in stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda found: str(slots.get(found[1], found[0])), template)


def as_text(user_input):
    return user_input if isinstance(user_input, str) else "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in user_input)


# ---------------------------------------------------------------------------------------------------------------------
# `score`: an LLM, or a Python file, in place of the labeller

DIGITS = dict(zip("零〇一二两三四五六七八九十", [0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10]))
VALUE = r"(-?\d+(?:\.\d+)?)"


def read_score(text):
    """The score in [0, 5] that a judge's answer gives, or None: of "Score: 4/5", "**4.5**", "8 out of 10" (4.0), "四分半".

    The last number after a word for score counts; else the one with a scale ("4/5", "4分"), else a number that is the only one.
    """
    text = unicodedata.normalize("NFKC", text).replace("负", "-")
    numeral = "[" + "".join(DIGITS) + "]"
    # a Chinese numeral where a score can stand: before 分 or 点, after a colon, or alone. (一般 and 第一 are no scores.)
    chinese = rf"({numeral})(?:点({numeral}))?(?=\s*(?:分|/)|\s*[。.!]?\s*$)|({numeral})点({numeral})"
    text = re.sub(chinese, lambda m: f"{DIGITS[m[1] or m[3]]}" + (f".{DIGITS[m[2] or m[4]]}" if m[2] or m[4] else ""), text)
    text = re.sub(r"(\d)\s*分半", r"\1.5分", text)
    text = re.sub(r"满分(?:是|为)?\s*:?\s*\d+\s*分?|\b\d\s*(?:-|–|~|to|到|至)\s*\d+\b", " ", text)  # the scale is no score
    scale = r"(?:\s*分?\s*(?:/|out of|of)\s*(\d+))?"
    named = re.findall(rf"(?:scores?|rating|grade|评分|得分|分数|打分|给)[^\w-]{{0,6}}(?:\b(?:is|of|as)\b|是|为|打|它|出|了)?[^\w-]{{0,6}}{VALUE}{scale}", text, re.IGNORECASE)
    scaled = [(m[0], m[1] or "5") for m in re.findall(rf"{VALUE}(?:\s*分?\s*(?:/|out of)\s*(\d+)|\s*分)", text)]
    alone = [(number, "") for number in set(re.findall(rf"(?<![\w.]){VALUE}(?!\w)", text))]
    for found, which in ((named, -1), (scaled, -1), (alone if len(alone) == 1 else [], 0)):
        if found:
            value = float(found[which][0]) * 5 / (float(found[which][1] or 5) or 5)
            return value if 0 <= value <= 5 else None
    return None


def score_command(args):
    """Scores every record without a score. What stays without one goes to `..._unscored`, so that train_rm.py takes the rest."""
    records = read_records(args.file, "user_input", "completion")
    todo = [i for i, record in enumerate(records) if record.get("score") is None]
    for i in set(range(len(records))) - set(todo):
        if wrong := what_is_wrong("score", records[i]["score"]):
            stop(f"{args.file}: record {i + 1}: field 'score' {wrong}")
    template = None if args.judge else template_of(args, "reward")
    journal = open_journal(args)
    if args.judge:
        judge, scores = load_judge("--judge", args.judge), []
        for i in todo:
            try:
                scores.append(float(judge(records[i]["user_input"], records[i]["completion"])))
            except Exception as error:  # the judge's own
                stop(f"{args.file}: record {i + 1}: {args.judge} cannot judge it ({first_line(error)})")
    else:
        questions = [("", fill_in(template, user_input=as_text(records[i]["user_input"]), completion=records[i]["completion"])) for i in todo]
        scores = ask(args, journal, questions, lambda answer: read_score(answer["text"]), args.temperature, args.max_tokens, "score")
    for i, value in zip(todo, scores):
        records[i]["score"] = value
    unscored = [{k: v for k, v in record.items() if k != "score"} for record in records if record["score"] is None]
    stem, dot, ending = os.path.basename(args.out).partition(".")
    rest = os.path.join(os.path.dirname(args.out), f"{stem}_unscored{dot}{ending}")
    if len(unscored) == len(records):
        stop(f"{args.file}: not one record got a score; look at the answers in {journal.path}", code=1)
    save(args.out, [record for record in records if record["score"] is not None])
    if unscored:
        save(rest, unscored)
    elif os.path.exists(rest):
        os.remove(rest)


def open_journal(args):
    """The journal of a command that makes one file of another."""
    if os.path.realpath(args.out) == os.path.realpath(args.file):
        stop(f"--out {args.out}: is the file that is read; name another")
    return Journal(args.out + ".journal.jsonl", [args.out], args.overwrite)


# ---------------------------------------------------------------------------------------------------------------------
# `self-instruct` and `prompts`: new instructions from a few (Wang et al. 2022, section 2 and appendix A.2)

CJK = re.compile("[\u3400-\u9fff]")
FORBIDDEN = ("image images picture pictures photo photos graph graphs chart draw plot map maps video videos audio music file files "
             "attached 图片 图像 照片 图表 画图 画一 绘制 地图 视频 音频 附件 文件").split()  # what a text cannot show


def rouge_tokens(text):
    """Words in lower case; of Chinese, characters."""
    return re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text.lower())


def longest_common_subsequence(a, b):
    """Its length, of two lists, by one integer of len(a) bits: Hyyrö 2004, "Bit-parallel LCS-length computation revisited"."""
    places, ones = {}, (1 << len(a)) - 1
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    row = ones
    for token in b:
        match = row & places.get(token, 0)
        row = (row + match | row - match) & ones
    return len(a) - row.bit_count()


def rouge_l(a, b):
    """ROUGE-L, F1 (Lin 2004, section 3): 2 LCS / (len(a) + len(b)) of two lists of tokens."""
    return 2 * longest_common_subsequence(a, b) / (len(a) + len(b)) if a and b else 0.0


def why_unfit(text, language, pool, forbidden):
    """Why a new instruction is not taken, in words, or None. `pool`: the tokens of those that are there."""
    tokens = rouge_tokens(text)
    chinese = len(CJK.findall(text))
    if not 4 <= len(tokens) <= 150:
        return "too short or too long"
    if (2 * chinese > len(tokens)) != (language == "zh"):
        return "in the other language"
    if any(word in (text if CJK.search(word) else tokens) for word in forbidden):
        return "with a forbidden word"
    for other in pool:  # the first test is an upper bound of ROUGE-L, and free
        if 2 * min(len(tokens), len(other)) >= 0.7 * (len(tokens) + len(other)) and rouge_l(tokens, other) >= 0.7:
            return "too similar"
    return None


def read_list(answer):
    """The entries of a numbered list, or None; of an answer that was cut off, without the last."""
    entries = re.split(r"(?m)^[ \t*#]*(?:\d+|[一二三四五六七八九十]+)[ \t]*[.)、．:：][*]*", answer["text"])[1:]
    entries = [entry.strip(" \t\n*\"“”") for entry in (entries[:-1] if answer["finish"] == "length" else entries)]
    return entries or None


def invent(args, journal, name, seeds):
    """--number new instructions. Rounds of up to 16 requests: what has been taken serves as an example from the next round on,
    so the result does not depend on which answer came first, and a run that was stopped retraces its steps in the journal."""
    languages, template = {"both": ["en", "zh"]}.get(args.language, [args.language]), template_of(args, name)
    forbidden = args.forbidden_words.split(",") if args.forbidden_words else FORBIDDEN
    of = {language: [s for s in seeds if (2 * len(CJK.findall(s)) > len(rouge_tokens(s))) == (language == "zh")] or seeds for language in languages}
    new, pool, unfit, idle, round_number = {}, [rouge_tokens(seed) for seed in seeds], Counter(), 0, 0
    while len(new) < args.number and idle < 3:
        questions, asked = [], []
        for i in range(min(16, -(-(args.number - len(new)) // args.per_request))):
            rng = random.Random(f"{args.seed} {round_number} {i}")
            language = languages[(round_number + i) % len(languages)]
            made = [text for text, lang in new.items() if lang == language]
            examples = rng.sample(made, min(2, len(made)))  # 6 of people and 2 of the LLM's own, as Wang et al.
            examples += rng.sample(of[language], min(8 - len(examples), len(of[language])))
            rng.shuffle(examples)
            numbered = "\n".join(f"{n}. {example}" for n, example in enumerate(examples, 1))
            words = {"en": "English", "zh": "Chinese (简体中文)"}[language]
            questions.append((f"{name} {round_number} {i}", fill_in(template, examples=numbered, number=args.per_request, language=words)))
            asked.append(language)
        before = len(new)
        for language, entries in zip(asked, ask(args, journal, questions, read_list, args.temperature, args.max_tokens, f"round {round_number + 1}")):
            for entry in entries or []:
                if reason := why_unfit(entry, language, pool, forbidden):
                    unfit[reason] += 1
                elif len(new) < args.number:
                    new[entry] = language
                    pool.append(rouge_tokens(entry))
        idle, round_number = idle + 1 if len(new) == before else 0, round_number + 1
    print(f"{len(new)} new instructions of {args.number}; not taken: " + (", ".join(f"{n} {why}" for why, n in unfit.items()) or "none"))
    if not new:
        stop(f"{args.api_base}: nothing usable in three rounds; look at the answers in {journal.path}", code=1)
    return list(new)


def invent_command(args):
    """`self-instruct` also answers what it invents; `prompts` leaves that to PPO."""
    seeds = list(dict.fromkeys(as_text(record["user_input"]) for record in convert([args.file])))
    name, make = ("actor", ["actor", "rlhf"]) if args.command == "self-instruct" else ("rlhf", ["rlhf"])
    outputs = [os.path.join(args.out, f"{kind}_training_data{twin}.json") for kind in make for twin in ("", "_eval")]
    journal = Journal(os.path.join(args.out, f"{args.command}.journal.jsonl"), outputs, args.overwrite)
    new = invent(args, journal, name, seeds)
    records = [{"user_input": text} for text in new]
    if name == "actor":
        def read(answer):  # an answer that was cut off would teach to break off
            return answer["text"].strip() or None if answer["finish"] != "length" else None
        answers = ask(args, journal, [("answer", text) for text in new], read, args.temperature, args.max_tokens, "answers")
        records = [{"user_input": text, "completion": answer} for text, answer in zip(new, answers) if answer]
        if not records:
            stop(f"{args.api_base}: no instruction got a whole answer; look at those in {journal.path}, and at --max_tokens", code=1)
    args.overwrite = True  # what is there comes from this journal
    save_sets(records, args, make)


# ---------------------------------------------------------------------------------------------------------------------
# `sample` and `rank`: what the policy writes, and what a person thinks of it

def sample_command(args):
    """K completions a prompt, of batches with their own random numbers: a run that was stopped goes on with the same result."""
    records = read_records(args.file, "user_input")
    prompts = list({prompt_key(r["user_input"]): r["user_input"] for r in records}.values())
    tokenizer = load_tokenizer(args.model)
    model = load_llama(args.model, tokenizer).to(args.device)
    room = model.config.max_position_embeddings - args.max_new_tokens
    if room < 1:
        stop(f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt: the model's context is {room + args.max_new_tokens} tokens")
    journal = open_journal(args)
    tokens = encode_prompts(prompts, tokenizer, room, args.file)
    config = os.path.join(args.model, "config.json")  # a model that was trained anew under the same name is another model
    which = [args.model, os.path.getmtime(config) if os.path.exists(config) else 0, args.k, args.temperature, args.top_k, args.top_p, args.max_new_tokens, args.seed]
    order, step = sorted(range(len(prompts)), key=lambda i: len(tokens[i])), max(1, args.batch_size // args.k)
    bar = tqdm(total=len(prompts), desc="sample", unit="prompt", dynamic_ncols=True)
    for batch in (order[start:start + step] for start in range(0, len(order), step)):
        keys = [digest("sample", which, prompt_key(prompts[i])) for i in batch]
        if any(key not in journal.answers for key in keys):
            generator = torch.Generator(args.device).manual_seed(int(digest(which, tokens[batch[0]])[:15], 16))
            rows = [tokens[i] for i in batch for _ in range(args.k)]
            written = generate(model, *left_pad(rows, tokenizer.pad_token_id, args.device), args.max_new_tokens, tokenizer.eos_token_id,
                               args.temperature, args.top_k, args.top_p, generator)
            texts = [tokenizer.decode(row[mask.bool()].tolist(), skip_special_tokens=True).strip() for row, mask in zip(written.tokens, written.mask)]
            for n, key in enumerate(keys):
                journal.add(key, {"completions": texts[n * args.k:(n + 1) * args.k]})
        bar.update(len(batch))
    bar.close()
    written = [journal.answers[digest("sample", which, prompt_key(prompt))]["completions"] for prompt in prompts]
    same = sum(len(texts) - len(set(texts)) for texts in written)
    print(f"{len(prompts)} prompts, {args.k} completions each; {same} that a prompt has already are left out")
    save(args.out, [{"user_input": prompt, "completion": text} for prompt, texts in zip(prompts, written) for text in dict.fromkeys(texts)])


def read_order(text, number):
    """The level of each of `number` completions in an order such as "2>1=3", 0 being the best. ValueError: why it is none."""
    try:
        levels = [[int(name) for name in part.split("=")] for part in unicodedata.normalize("NFKC", text).split(">")]
    except ValueError:
        raise ValueError("an order looks like 2>1=3") from None
    named = sorted(name for level in levels for name in level)
    if named != list(range(1, number + 1)):
        raise ValueError(f"an order names each of 1 to {number} once")
    return {name - 1: level for level, names in enumerate(levels) for name in names}


def shown(text):
    """A text for the terminal: a control character is shown, not obeyed."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def rank_command(args):
    """Scores from 5 (best) to 0 (worst), in even steps, a tie sharing one."""
    groups = {}
    for record in read_records(args.file, "user_input", "completion"):
        groups.setdefault(prompt_key(record["user_input"]), (record["user_input"], {}))[1][record["completion"]] = None
    groups = [(user_input, list(texts)) for user_input, texts in groups.values() if len(texts) > 1]
    if not groups:
        stop(f"{args.file}: no prompt has two different completions, so there is nothing to rank")
    journal = open_journal(args)
    keys = [digest("rank", prompt_key(user_input), texts) for user_input, texts in groups]
    print("Type the order of the completions, the best first, such as 2>1=3; or s to skip, b to go back, q to quit (it is saved).")
    i = next((i for i, key in enumerate(keys) if key not in journal.answers), len(keys))
    while i < len(groups):
        user_input, texts = groups[i]
        order = random.Random(keys[i]).sample(range(len(texts)), len(texts))  # where it stands must not tell where it is from
        print(f"\n{'-' * 80}\n{i + 1} of {len(groups)}\n\n{shown(as_text(user_input))}\n")
        for n, which in enumerate(order, 1):
            print(f"[{n}] {shown(texts[which]) or '(empty)'}\n")
        try:
            typed = input("order: ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            typed = "q"
            print()
        if typed == "q":
            break
        if typed == "b":
            i = max(0, i - 1)
            continue
        if typed == "s":
            journal.add(keys[i], {"scores": None})
        else:
            try:
                level = read_order(typed, len(texts))
            except ValueError as error:
                print(f"{error}; s skips, b goes back, q quits")
                continue
            worst = max(level.values())
            scores = [5.0 * (1 - level[order.index(which)] / worst) if worst else 2.5 for which in range(len(texts))]
            journal.add(keys[i], {"scores": scores})
        i += 1
    ranked = [(group, journal.answers[key]["scores"]) for group, key in zip(groups, keys) if key in journal.answers]
    print(f"{sum(scores is not None for _, scores in ranked)} prompts ranked, {sum(scores is None for _, scores in ranked)} skipped, "
          f"{len(groups) - len(ranked)} to go")
    records = [{"user_input": user_input, "completion": text, "score": value} for (user_input, texts), scores in ranked if scores
               for text, value in zip(texts, scores)]
    if records:
        save(args.out, records)


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def share(text):
    """argparse type: a number from 0 to below 1."""
    try:
        if 0 <= float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below 1")


def not_negative(text):
    """argparse type: a finite number from 0."""
    try:
        if 0 <= float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is not a number from 0")


def address(text):
    """argparse type: the address of a server."""
    if not re.match(r"https?://[^\s/]", text):
        raise argparse.ArgumentTypeError(f"{text} does not begin with http:// or https:// and a server")
    return text


def add_commands(parser):
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="more data (each has its own --help); without a COMMAND: the built-in data")

    def add(name, function, summary, example):
        command = commands.add_parser(name, help=summary, description=summary, epilog=f"example:\n  {example}",
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(function=function)
        command.add_argument("--seed", type=int, default=0, help="seed of every random choice")
        command.add_argument("--overwrite", action="store_true", help="replace files that are there")
        return command

    def sets(command, *out):
        command.add_argument(*out, dest="out", default="data", help="folder to write the data sets to (default: data)")
        command.add_argument("--eval_share", type=share, default=0.05, help="share of the prompts that is held out, in ..._eval (default: 0.05)")

    def make(command):
        command.add_argument("--make", nargs="+", choices=["actor", "reward", "rlhf"], default=[],
                             help="sets to make of the records (default: what they are): of pairs, say, demonstrations and prompts too")

    def llm(command, temperature, max_tokens):
        group = command.add_argument_group("the LLM (its key: the environment variable OPENAI_API_KEY)")
        group.add_argument("--api_base", type=address, default="https://api.openai.com/v1", help="server with the OpenAI chat API")
        group.add_argument("--model", help="the model's name there")
        group.add_argument("--temperature", type=not_negative, default=temperature, help=f"of the sampling (default: {temperature})")
        group.add_argument("--max_tokens", type=positive, default=max_tokens, help=f"longest answer, tokens (default: {max_tokens})")
        group.add_argument("--workers", type=positive, default=8, help="questions at a time (default: 8); no result depends on it")
        group.add_argument("--timeout", type=not_negative, default=120.0, help="seconds without a byte from the server (default: 120)")
        group.add_argument("--retries", type=int, default=6, help="times that a question is sent again after an error (default: 6)")
        group.add_argument("--backoff", type=not_negative, default=1.0, help="seconds before the first of these, doubled each time (default: 1)")
        group.add_argument("--tries", type=positive, default=3, help="answers that are asked for until one is usable (default: 3)")
        group.add_argument("--templates", help="JSON file with actor, reward, rlhf (default: templates.json, if it is in this folder)")

    command = add("download", download_command, "Anthropic HH-RLHF or Stanford SHP from the Hugging Face hub, as scored completions.",
                  "python data_gen.py download hh --parts helpful-base --number_of_samples 5000 --make reward rlhf --path data/hh")
    command.add_argument("dataset", choices=HUB)
    command.add_argument("--parts", nargs="+", help="folders of the data set (default: all that hold pairs)")
    command.add_argument("--number_of_samples", type=positive, help="pairs to take, as many from each part, its first (default: all)")
    sets(command, "--path", "--out")
    make(command)

    command = add("import", import_command, "Files in the layouts that people have, as our data sets; the layout is recognized, and said.",
                  "python data_gen.py import alpaca_data.json more.jsonl.gz --eval_share 0.02 --out data/alpaca")
    command.add_argument("files", nargs="+", metavar="FILE", help="; ".join(name for name, _, _ in LAYOUTS) + "; JSON, JSON Lines, .gz")
    sets(command, "--out")
    make(command)

    for name, summary in (("self-instruct", "New instructions from the seed tasks in FILE, and answers to them, by an LLM: demonstrations and prompts."),
                          ("prompts", "More prompts for PPO, by an LLM, from the examples in FILE.")):
        command = add(name, invent_command, summary,
                      f"python data_gen.py {name} seed_tasks.jsonl --number 1000 --language both --api_base http://localhost:8000/v1 --model llama --out data/new")
        command.add_argument("file", metavar="FILE", help="a few instructions, in any layout that import knows")
        command.add_argument("--number", type=positive, default=100, help="new instructions (default: 100)")
        command.add_argument("--per_request", type=positive, default=8, help="of them in one answer (default: 8)")
        command.add_argument("--language", choices=["en", "zh", "both"], default="en", help="of the new instructions (default: en)")
        command.add_argument("--forbidden_words", help="no instruction has one of these, comma-separated (default: what text cannot show)")
        sets(command, "--out")
        llm(command, 0.7, 1024)

    command = add("score", score_command, "Scores every record of FILE that has no score yet, by an LLM or a Python file.",
                  "OPENAI_API_KEY=... python data_gen.py score samples.json --model gpt-4o-mini --out scored.json\n"
                  "  python data_gen.py score samples.json --judge data_gen.py --out scored.json")
    command.add_argument("file", metavar="FILE", help="records with user_input and completion")
    command.add_argument("--out", required=True, help="file to write")
    command.add_argument("--judge", help="Python file with score(user_input, completion), in place of an LLM")
    llm(command, 0.1, 64)
    command.add_argument("--reward_template", help="file with the template of the question (a text, or JSON with key reward)")

    command = add("sample", sample_command, "K completions a prompt from a checkpoint.",
                  "python data_gen.py sample data/rlhf_training_data.json --model runs/sft --k 4 --out samples.json")
    command.add_argument("file", metavar="FILE", help="records with user_input")
    command.add_argument("--out", required=True, help="file to write")
    command.add_argument("--model", default="runs/sft", help="checkpoint, as sft.py takes it (default: runs/sft)")
    command.add_argument("--k", type=positive, default=4, help="completions a prompt (default: 4)")
    command.add_argument("--max_new_tokens", type=positive, default=128, help="longest completion, tokens (default: 128)")
    command.add_argument("--temperature", type=not_negative, default=1.0, help="of the sampling (default: 1)")
    command.add_argument("--top_k", type=int, default=0, help="only the likeliest tokens (default: 0, all)")
    command.add_argument("--top_p", type=float, default=1.0, help="only the likeliest tokens with this probability (default: 1, all)")
    command.add_argument("--batch_size", type=positive, default=64, help="completions at a time (default: 64)")
    command.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")

    command = add("rank", rank_command, "Shows each prompt with its completions; you type the order. Saved after every answer.",
                  "python data_gen.py rank samples.json --out ranked.json")
    command.add_argument("file", metavar="FILE", help="records with user_input and completion, several a prompt")
    command.add_argument("--out", required=True, help="file to write")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write the built-in data sets of the three stages and their tokenizer.")
    parser.add_argument("--out", default="data", help="the folder to write them to")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other prompts and completions")
    add_commands(parser)
    args = parser.parse_args(argv)
    if args.command:
        if args.command in ("self-instruct", "prompts", "score") and not args.model and not getattr(args, "judge", None):
            parser.error(f"{args.command} needs --model{' or --judge' if args.command == 'score' else ''}")
        return args.function(args)
    data = make_data(args.seed)
    for name, records in data.items():
        save(f"{args.out}/{name}.json", records)
    texts = [f"User: {r['user_input']}\nAssistant: {r['completion']}" for r in data["actor_training_data"] + data["reward_training_data"]]
    write_whole(os.path.join(args.out, "tokenizer", "tokenizer.model"), train_tokenizer(texts))
    print(f"{args.out}/tokenizer/tokenizer.model: trained on {len(texts)} texts")


if __name__ == "__main__":
    main()
