"""New instructions from an LLM, by a few examples, and answers to them (Wang et al. 2022,
"Self-Instruct", section 2 and appendix A.2).

    python data_gen.py self-instruct seed_tasks.jsonl --number 1000 --model llama --out data/new
    python data_gen.py prompts seed_tasks.jsonl --number 1000 --model llama --out data/more

The LLM is any server with OpenAI's chat API, at --api_base. Every answer is on disk the moment it
arrives, in a journal beside the output: the same command continues where it stopped, and asks
nothing twice.
"""

import math
import os
import random
import re
from collections import Counter

from lib.errors import stop
from lib.settings import positive
from tools.data.commands import EVAL_SHARE, OUT, Journal, digest, parser_of
from tools.data.import_ import convert
from tools.data.llm import add_llm, ask
from tools.data.sets import as_text, save_sets
from tools.data.templates import fill_in, template_of

CJK = re.compile("[\u3400-\u9fff]")
LANGUAGES = {"en": "English", "zh": "Chinese (简体中文)"}
FORBIDDEN = """image images picture pictures photo photos graph graphs chart draw plot map maps
video videos audio music file files attached 图片 图像 照片 图表 画图 画一 绘制 地图 视频 音频
附件 文件""".split()  # what a text cannot show


def rouge_tokens(text):
    """Words in lower case; of Chinese, characters."""
    return re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text.lower())


def is_chinese(text):
    return 2 * len(CJK.findall(text)) > len(rouge_tokens(text))


def rouge_l(a, b):
    """ROUGE-L, F1 (Lin 2004, section 3), of two lists of tokens: 2 LCS / (len(a) + len(b)), where
    LCS is the length of their longest common subsequence."""
    row = [0] * (len(b) + 1)  # row[j]: the LCS of what of a has been read and b[:j]
    for x in a:
        above, row = row, [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return 2 * row[-1] / (len(a) + len(b)) if a and b else 0.0


def why_unfit(text, language, pool, forbidden):
    """Why a new instruction is not taken, in words, or None. `pool`: the tokens of those that are
    there."""
    tokens = rouge_tokens(text)
    if not 4 <= len(tokens) <= 150:
        return "too short or too long"
    if is_chinese(text) != (language == "zh"):
        return "in the other language"
    if any(word in (text if CJK.search(word) else tokens) for word in forbidden):
        return "with a forbidden word"
    words = set(tokens)
    for other in pool:
        # no more words than they share can be in a common subsequence: mostly, that settles it
        most = min(len(tokens), sum(word in words for word in other))
        if 2 * most >= 0.7 * (len(tokens) + len(other)) and rouge_l(tokens, other) >= 0.7:
            return "too similar"
    return None


def read_list(answer):
    """The entries of a numbered list, or None; of an answer that was cut off, without the last.

    A list inside an entry stays in it: it is indented further. What follows the last entry after an
    empty line belongs to it only if other entries have empty lines, too."""
    # "1.", "2)", "三、", "**4.**", "### 5.", "6\.", "Task 7:"; but no time, 10:30, and no 3.14
    number = (r"(?m)^([ \t]*)(?:[*#]+[ \t]*)?(?:(?:Task|User|任务|用户)[ \t]*)?"
              r"(?:\d+|[一二三四五六七八九十]+)[ \t]*\\?(?:[.．:：](?!\d)|[)、])[*]*")
    marks = list(re.finditer(number, answer["text"]))
    marks = [mark for mark in marks if len(mark[1].expandtabs()) <= len(marks[0][1].expandtabs())]
    ends = [mark.start() for mark in marks[1:]] + [len(answer["text"])]
    entries = [answer["text"][mark.end():end].strip() for mark, end in zip(marks, ends)]
    if answer["finish"] == "length":
        entries = entries[:-1]
    elif entries and not any("\n\n" in entry for entry in entries[:-1]):
        entries[-1] = entries[-1].split("\n\n")[0]
    return [without_markup(entry) for entry in entries] or None


def without_markup(entry):
    """Without bold type, and without quotation marks around all of it."""
    entry = entry.replace("**", "").strip(" \t\n*")
    for opening, closing in ('""', "“”", "''"):
        inside = entry[1:-1]
        if entry[:1] == opening and entry[-1:] == closing and not set(inside) & {opening, closing}:
            return entry[1:-1].strip()
    return entry


def read_answer(answer):
    """The text; None if it is empty, or cut off, which would teach to break off."""
    return None if answer["finish"] == "length" else answer["text"].strip() or None


def examples(known, taken, rng):
    """8 instructions as a numbered list: 6 of people and 2 of the LLM's own, as Wang et al."""
    chosen = rng.sample(taken, min(2, len(taken)))
    chosen += rng.sample(known, min(8 - len(chosen), len(known)))
    rng.shuffle(chosen)
    return "\n".join(f"{n}. {example}" for n, example in enumerate(chosen, 1))


def invent(args, journal, template, seeds):
    """--number new instructions, from rounds of up to 16 requests. What has been taken serves as an
    example from the next round on, so the result does not depend on which answer came first, and a
    run that was stopped retraces its steps in the journal."""
    languages = ["en", "zh"] if args.language == "both" else [args.language]
    forbidden = args.forbidden_words.split(",") if args.forbidden_words else FORBIDDEN
    known = {language: [seed for seed in seeds if is_chinese(seed) == (language == "zh")] or seeds
             for language in languages}
    taken = {language: [] for language in languages}
    new, pool, unfit = [], [rouge_tokens(seed) for seed in seeds], Counter()
    idle, number = 0, 0  # rounds in a row that brought nothing, rounds in all
    while len(new) < args.number and idle < 3:
        before, asked, questions = len(new), [], []
        for i in range(min(16, math.ceil((args.number - before) / args.per_request))):
            language, salt = languages[(number + i) % len(languages)], f"{number} {i}"
            rng = random.Random(f"{args.seed} {salt}")
            asked.append(language)
            questions.append((f"{args.template} {salt}", fill_in(
                template, examples=examples(known[language], taken[language], rng),
                number=args.per_request, language=LANGUAGES[language])))
        number += 1
        answers = ask(args, journal, questions, read_list, f"round {number}")
        for language, entries in zip(asked, answers):
            for entry in entries or []:
                if reason := why_unfit(entry, language, pool, forbidden):
                    unfit[reason] += 1
                elif len(new) < args.number:
                    new.append(entry)
                    taken[language].append(entry)
                    pool.append(rouge_tokens(entry))
        idle = idle + 1 if len(new) == before else 0
    print(f"{len(new)} of {args.number} new instructions; not taken: "
          + (", ".join(f"{n} {why}" for why, n in unfit.items()) or "none"))
    if not new:
        stop(f"{args.api_base}: nothing usable in three rounds; look at the answers in "
             f"{journal.path}", code=1)
    return new


def new_data(args):
    """`self-instruct` also answers what it invents; `prompts` leaves that to PPO."""
    if not args.model:
        stop(f"{args.command} needs --model")
    template = template_of(args.template, args.templates)
    seeds = convert([args.file])
    seeds = list(dict.fromkeys(as_text(record["user_input"]) for record in seeds))
    outputs = [os.path.join(args.out, f"{name}_training_data{twin}.json")
               for name in args.make for twin in ("", "_eval")]
    journal = Journal(os.path.join(args.out, f"{args.command}.journal.jsonl"), outputs, args.file,
                      args.overwrite, dict(model=args.model, template=digest(template),
                                           language=args.language, seed=args.seed))
    new = invent(args, journal, template, seeds)
    records = [{"user_input": text} for text in new]
    if "actor" in args.make:
        questions = [("answer", text) for text in new]
        answers = ask(args, journal, questions, read_answer, "answers")
        records = [{"user_input": text, "completion": answer}
                   for text, answer in zip(new, answers) if answer]
        if not records:
            stop(f"{args.api_base}: no instruction got a whole answer; look at those in "
                 f"{journal.path}, and at --max_tokens", code=1)
    save_sets(records, args, args.make, overwrite=True)  # what is there comes from this journal


def main(name, argv):
    template, make, summary = {
        "self-instruct": ("actor", ["actor", "rlhf"], "New instructions from the seed tasks in "
                          "FILE, and answers to them, by an LLM: demonstrations and prompts."),
        "prompts": ("rlhf", ["rlhf"], "More prompts for PPO, by an LLM, from the examples in "
                    "FILE."),
    }[name]
    command = parser_of(
        name, summary,
        f"python data_gen.py {name} seed_tasks.jsonl --number 1000 --language both --api_base "
        "http://localhost:8000/v1 --model llama --out data/new",
        ("number", 100, "new instructions", positive),
        ("per_request", 8, "instructions per answer", positive),
        ("forbidden_words", None, "comma-separated; no instruction may contain one (default: "
         "words for what text cannot show)", str),
        OUT, EVAL_SHARE)
    command.set_defaults(command=name, template=template, make=make)
    command.add_argument("file", metavar="FILE", help="a few instructions, in any layout that "
                         "import knows")
    command.add_argument("--language", choices=["en", "zh", "both"], default="en",
                         help="of the new instructions (default: en)")
    add_llm(command, 0.7, 2048)
    new_data(command.parse_args(argv))
