"""Stage 0: the three data sets of RLHF, built in.

    python data_gen.py                 # writes data/ in seconds, the same bytes for the same --seed
    python data_gen.py COMMAND --help  # other data, by tools/data/: download, import,
                                       # self-instruct, prompts, score, sample, rank, sums

The world is that of a small bilingual assistant: nine families of tasks, each asked in English and
in Chinese and in several phrasings. From it come

    data/actor_training_data.json   demonstrations, for SFT: {"user_input", "completion"}
    data/reward_training_data.json  K scored completions per prompt: these and "score"
    data/rlhf_training_data.json    prompts alone, for PPO: {"user_input"}

and of each a held-out twin (`..._eval.json`) whose prompts occur in no training file, and a
LLaMA-style sentencepiece tokenizer (data/tokenizer/tokenizer.model) trained on the training texts.

The demonstrations are a mixture, as those of human labellers are: nearly half are curt, many are
friendly, some ramble, a few are wrong. A model that imitates them well therefore answers well
enough, and RLHF has something to gain. What "better" means is written down in `score`, which stands
in for the human labeller: it labels the reward data, and afterwards it measures whether RLHF
helped. PPO itself sees only the reward model.
"""

import argparse
import functools
import importlib
import io
import random
import re
import sys

import sentencepiece

from lib.data import save_all
from lib.errors import clean_exit

# command: the module of tools/data/ that has it
COMMANDS = {"download": "download", "import": "import_", "self-instruct": "synthesize",
            "prompts": "synthesize", "score": "score", "sample": "sample", "rank": "rank",
            "sums": "sums"}

# ------------------------------------------------------------------------------------------------
# The world: words in both languages, and what one can ask about them

NOUNS = {  # category: {English: Chinese}
    ("animal", "动物"): {"cat": "猫", "dog": "狗", "horse": "骏马", "bird": "小鸟", "fish": "鱼"},
    ("fruit", "水果"): {"apple": "苹果", "banana": "香蕉", "pear": "梨子", "grape": "葡萄",
                      "lemon": "柠檬"},
    ("color", "颜色"): {"red": "红色", "blue": "蓝色", "green": "绿色", "black": "黑色"},
    ("vehicle", "车辆"): {"car": "汽车", "train": "火车", "bus": "巴士", "bicycle": "自行车"},
    ("tool", "工具"): {"hammer": "锤子", "knife": "刀子", "scissors": "剪刀"},
}
WORDS = {en: (zh, category) for category, words in NOUNS.items() for en, zh in words.items()}
CHINESE = {zh: (en, category) for en, (zh, category) in WORDS.items()}
OPPOSITES = {
    "en": [("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "new"), ("day", "night"),
           ("happy", "sad"), ("open", "closed"), ("hard", "soft"), ("wet", "dry")],
    "zh": [("炎热", "寒冷"), ("巨大", "微小"), ("快速", "缓慢"), ("古老", "崭新"), ("白天", "黑夜"),
           ("快乐", "悲伤"), ("打开", "关闭"), ("坚硬", "柔软"), ("潮湿", "干燥")],
}
OPPOSITE = {a: b for pairs in OPPOSITES.values() for x, y in pairs for a, b in ((x, y), (y, x))}
NAMES = {"en": ["Tom", "Anna", "Ben", "Lucy", "Jack", "Emma", "Sam", "Kate"],
         "zh": ["小明", "小红", "小华", "小丽", "小刚", "小芳", "小军", "小燕"]}

# family: the phrasings in each language; `{x}` is a slot, which `fill` fills and `solve` answers.
# The space on either side of a word, in Chinese too, keeps it the same token wherever it stands.
PHRASINGS = {
    "sum": {
        "en": ["What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} = ?",
               "Tell me the sum of {a} and {b}."],
        "zh": ["{a}加{b}等于几？", "请计算{a} + {b}。", "{a}与{b}的和是多少？"],
    },
    "larger": {
        "en": ["Which is larger, {a} or {b}?", "Pick the bigger number: {a} or {b}.",
               "Of {a} and {b}, name the larger one."],
        "zh": ["{a}和{b}哪个更大？", "请选出较大的数：{a}、{b}。", "比较{a}与{b}，谁大？"],
    },
    "sort": {
        "en": ["Sort these numbers: {list}.", "Put {list} in ascending order.",
               "Arrange from small to large: {list}."],
        "zh": ["请把 {list} 从小到大排列。", "给这些数排序：{list}。", "将 {list} 按升序写出。"],
    },
    "opposite": {
        "en": ["What is the opposite of {word}?", "Give me the opposite of {word}.",
               "Which word means the reverse of {word}?",
               "What do you call it when something is not {word} at all?"],
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
        "en": ["What kind of thing does {word} name?",
               "Does {word} name an animal, a fruit, a color, a vehicle or a tool?",
               "Which group does {word} belong to?", "Tell me the category of {word}.",
               "Where would you sort {word} in?"],
        "zh": ["{word} 是哪一类东西？", "{word} 属于什么类别？", "请给 {word} 归类。", "你会把 {word} 归到哪一类？",
               "说说 {word} 是什么种类。"],
    },
    "letters": {
        "en": ["How many letters are in {word}?", "Count the letters of {word}.",
               "How long is the word {word}, in letters?",
               "Tell me the number of letters in {word}.",
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
SLOTS = {"a": r"\d", "b": r"\d", "list": r"[\w ]+", "word": r"\w+?", "name": r"\w+?"}  # regex


def pattern_of(phrasing):
    """The regular expression of the prompts with this phrasing, a named group for each slot."""
    parts = re.split(r"\{(\w+)\}", phrasing)  # text, slot, text, slot, ..., text
    return re.compile("".join(f"(?P<{part}>{SLOTS[part]})" if i % 2 else re.escape(part)
                              for i, part in enumerate(parts)))


PATTERNS = [(family, lang, pattern_of(phrasing)) for family, by_lang in PHRASINGS.items()
            for lang, phrasings in by_lang.items() for phrasing in phrasings]


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
    """The right answer as a list of items, numbers or words, in the order in which they must be
    said."""
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


@functools.cache  # each prompt is parsed for each of its completions
def parse(user_input):
    """(family, language, slots) of a prompt of this world; ValueError for any other text."""
    for family, lang, pattern in PATTERNS:
        if match := pattern.fullmatch(user_input):
            return family, lang, match.groupdict()
    raise ValueError(f"not a prompt of the built-in world: {user_input!r}")


# ------------------------------------------------------------------------------------------------
# The labeller: what makes a completion good

FRIENDLY = {"en": ["Sure!", "Of course!", "Glad to help!", "Good question!"],
            "zh": ["好的！", "当然可以！", "很乐意帮忙！", "问得好！"]}
RUDE = {"en": ["Are you stupid?", "What a dumb question.", "Leave me alone."],
        "zh": ["你真笨。", "别烦我。", "这都不懂？"]}
NUMBER = re.compile(r"\d+")
# the words that can be an answer; English ones stand alone, Chinese has no spaces to tell
ANSWERS = sorted([*WORDS, *CHINESE, *OPPOSITE, *NAMES["en"], *NAMES["zh"],
                  *(word for category in NOUNS for word in category)], key=len, reverse=True)
WORD = re.compile("|".join(rf"\b{word}\b" if word.isascii() else word for word in ANSWERS),
                  re.ASCII)


def score(user_input, completion):
    """The score in [0, 5] that our labeller gives a completion. The rules:

    - right (2 points): the last items that it names, numbers for a task about numbers and known
      words otherwise, are the answer, in order; any other item that it names stands in the
      question;
    - friendly (2 points): it has one of the friendly phrases;
    - brief (1 point): at most 16 words (a number or a Chinese character counts as one);
    - cut off (1 point less): it does not end in . ! ? or their Chinese forms.

    One that is wrong, in the other language or rude gets none of these, only half a point if it is
    friendly and not rude. So right, friendly and brief is 5, right and curt 3, right and rambling
    2, nothing at all 0.

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
    # a translation may be in the other language, the sentence around it may not
    rest = WORD.sub("", completion)
    letters = len(re.findall("[A-Za-z]+", rest))
    characters = len(re.findall("[\u4e00-\u9fff]", rest))
    other_language = characters > letters if lang == "en" else letters > characters
    if not right or other_language or rude:
        return 0.5 * (friendly and not rude)
    return 2.0 + 2.0 * friendly + 1.0 * brief - 1.0 * cut_off


# ------------------------------------------------------------------------------------------------
# The writers: completions of every quality that real labelling meets

SENTENCES = {"en": ["The answer is {x}.", "It is {x}."], "zh": ["答案是 {x}。", "应该是 {x}。"]}
GREETINGS = {"en": ["Nice to meet you, {x}.", "Hello, {x}."], "zh": ["见到你真好，{x}。", "你好，{x}。"]}
FILLER = {
    "en": ["Well, let me think about this for a moment.", "There are many ways to look at it.",
           "People have often wondered about such things.",
           "As far as I can tell, it is not so simple.", "I could say a lot more about that.",
           "That said, let us go on step by step."],
    "zh": ["嗯，让我先想一想这个问题。", "其实可以从许多角度来看。", "人们常常会对此感到好奇。",
           "据我所知，事情并不那么简单。", "关于这一点我还能说很多。", "话虽如此，我们一步一步来。"],
}
STYLES = ["friendly", "curt", "rambling", "other language", "rude", "cut off"]
# percent of each style in the demonstrations, of which 1 in 20 is wrong, and among the completions
# to rank, of which half are wrong
DEMONSTRATED = {"curt": 45, "friendly": 30, "rambling": 20, "other language": 5}
RANKED = {"friendly": 30, "curt": 30, "rambling": 20, "other language": 8, "rude": 6, "cut off": 6}


def wrong_answer(rng, family, lang, answer):
    """An answer of the same form that is not right; one in three is muddled: an item too many."""
    other = answer
    while other == answer:
        if family == "sort":
            other = rng.sample(answer, 3)
        else:
            other = solve(family, lang, fill(rng, family, lang))
    muddled = rng.sample(answer + other[:1], len(answer) + 1)
    return muddled if rng.random() < 1 / 3 and muddled[-len(answer):] != answer else other


def write(rng, user_input, style, right=True):
    """A completion in the given style, one of STYLES, right or wrong, for a prompt of this
    world."""
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
    return {"friendly": friendly, "curt": curt, "rambling": rambling,
            "other language": rng.choice([friendly, sentence]),
            "rude": f"{rng.choice(RUDE[lang])} {rng.choice([curt, sentence])}"}[style]


# ------------------------------------------------------------------------------------------------
# The three data sets

def draw_prompts(rng, number):
    """`number` different prompts, every family and language equally often, as far as it has that
    many."""
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

    def balanced(n):
        """n prompts, all families and languages alike; one with few prompts repeats them."""
        each = n // len(by_family)
        prompts = [few[i % len(few)] for few in by_family.values() for i in range(each)]
        return rng.sample(prompts, len(prompts))

    def demonstration(prompt):
        style = rng.choices(list(DEMONSTRATED), list(DEMONSTRATED.values()))[0]
        text = write(rng, prompt, style, right=rng.random() < 0.95)
        return {"user_input": prompt, "completion": text}

    def ranking(prompt):
        texts = {}  # the labeller is not shown the same completion twice
        while len(texts) < completions:
            style = rng.choices(list(RANKED), list(RANKED.values()))[0]
            texts[write(rng, prompt, style, right=rng.random() < 0.5)] = None
        return [{"user_input": prompt, "completion": text, "score": score(prompt, text)}
                for text in texts]

    return {
        "actor_training_data": [demonstration(prompt) for prompt in balanced(demonstrations)],
        "actor_training_data_eval": [demonstration(prompt) for prompt in held],
        "reward_training_data": [r for prompt in balanced(ranked) for r in ranking(prompt)],
        "reward_training_data_eval": [r for prompt in held for r in ranking(prompt)],
        "rlhf_training_data": [{"user_input": prompt}
                               for prompt in dict.fromkeys(balanced(ranked))],
        "rlhf_training_data_eval": [{"user_input": prompt} for prompt in held],
    }


def train_tokenizer(texts, vocab_size=1536):
    """A sentencepiece BPE model with LLaMA's settings (Touvron et al. 2023, section 2.1): bytes for
    what is not in the vocabulary, digits one by one, no normalization, spaces kept -> the bytes of
    `tokenizer.model`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, split_digits=True, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    return model.getvalue()


@clean_exit
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f"tools.data.{COMMANDS[argv[0]]}").main(argv[0], argv[1:])
    parser = argparse.ArgumentParser(
        usage="%(prog)s [-h] [--out OUT] [--seed SEED] [--overwrite]\n"
              f"       %(prog)s {{{','.join(COMMANDS)}}} ...",
        description="Write the built-in data sets of the three stages, and their tokenizer.",
        epilog="The commands get, make and judge other data; each has its own --help.")
    parser.add_argument("--out", default="data", help="the folder to write them to (default: data)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other prompts and "
                        "completions (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    args = parser.parse_args(argv)
    data = make_data(args.seed)
    texts = [f"User: {record['user_input']}\nAssistant: {record['completion']}"
             for record in data["actor_training_data"] + data["reward_training_data"]]
    files = {f"{args.out}/{name}.json": records for name, records in data.items()}
    save_all(files | {f"{args.out}/tokenizer/tokenizer.model": train_tokenizer(texts)},
             args.overwrite)


if __name__ == "__main__":
    main()
