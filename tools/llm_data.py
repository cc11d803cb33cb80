"""Data from an LLM: new instructions, and scores in place of a human labeller's.

    python data_gen.py self-instruct seed_tasks.jsonl --number 1000 --model llama --out data/new
    python data_gen.py prompts seed_tasks.jsonl --number 1000 --model llama --out data/more
    python data_gen.py score samples.json --model llama --out scored.json

(or python -m tools.llm_data score ...). The LLM is any server with OpenAI's chat API, at
--api_base. Every answer is on disk the moment it arrives, in a journal beside the output: the same
command continues where it stopped, and asks nothing twice.
"""

import argparse
import json
import math
import os
import random
import re
import unicodedata
from collections import Counter

from lib.data import read_records, save, what_is_wrong
from lib.errors import clean_exit, explain, stop
from lib.rewards import Judge, number
from lib.settings import positive
from tools.commands import EVAL_SHARE, OUT, Journal, add_command, journal_of
from tools.get_data import as_text, convert, save_sets
from tools.llm import add_llm, ask

# ------------------------------------------------------------------------------------------------
# What the LLM is asked. A templates.json with some of these keys overrides them

TEMPLATES = {
    "actor": "Here are some tasks that people have given to an assistant:\n\n{examples}\n\nWrite "
             "{number} new ones, in {language}. Vary the subject, the kind of task, the wording "
             "and the length. Each must make sense without the others and be answerable with text "
             "alone. Reply with nothing but a numbered list.",
    "rlhf": "These are things that users have said to a chat assistant:\n\n{examples}\n\nThink of "
            "{number} other users and write what each of them says first, in {language}: "
            "questions and requests as different as possible, each complete in itself. Reply with "
            "nothing but a numbered list.",
    "reward": "You grade the answers of an assistant. A user wrote:\n\n{user_input}\n\nThe "
              "assistant answered:\n\n{completion}\n\nHow good is the answer? Look at whether it "
              "does what was asked, is true, clear, polite and no longer than it needs to be. Give "
              "a number from 0 (useless) to 5 (could not be better), decimals allowed. Reply with "
              "one line: Score: <number>",
}
NEEDED = {"actor": ["examples"], "rlhf": ["examples"], "reward": ["user_input", "completion"]}


def template_of(name, path):
    """The template `name`: that of the file `path`, or of a templates.json in this folder, or the
    built-in one. A file that is not JSON is the template itself."""
    if not path and os.path.exists("templates.json"):
        path = "templates.json"
    template = TEMPLATES[name]
    if path:
        with explain(f"{path}: cannot be read as templates"):
            with open(path, encoding="utf-8-sig") as file:
                template = file.read()
            if path.endswith(".json"):
                template = json.loads(template).get(name, TEMPLATES[name])
            if not isinstance(template, str):
                raise TypeError(f"what stands under '{name}' is not a text")
    for slot in NEEDED[name]:
        if f"{{{slot}}}" not in template:
            stop(f"{path}: template '{name}' lacks its placeholder {{{slot}}}")
    return template


def fill_in(template, **slots):
    """Fills every `{slot}` at once: a brace in what is filled in stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda found: str(slots.get(found[1], found[0])), template)


# ------------------------------------------------------------------------------------------------
# score

DIGITS = dict(zip("零〇一二两三四五六七八九十", [0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10]))
NUMERAL = f"([{''.join(DIGITS)}])"
VALUE = r"(-?\d+(?:\.\d+)?)"
SCALE = r"满分(?:是|为)?\s*:?\s*\d+\s*分?|\b\d\s*(?:-|–|~|to|到|至)\s*\d+\b"  # "0 to 5": no score
NAMED = (r"(?i)(?:scores?|rating|grade|评分|得分|分数|打分|给)[^\w-]{0,6}"
         r"(?:\b(?:is|of|as)\b|是|为|打|它|出|了)?[^\w-]{0,6}"
         rf"{VALUE}(?:\s*分?\s*(?:/|out of|of)\s*(\d+))?")
SCALED = rf"{VALUE}(?:\s*分?\s*(?:/|out of)\s*(\d+)|\s*分)"
ALONE = rf"(?<![\w.]){VALUE}(?!\w)"


def judged(answer):
    """The score of a judge's answer; None if there is none, or if it was cut: what it would have
    said in the end is not known."""
    return None if answer["finish"] == "length" else read_score(answer["text"])


def read_score(text):
    """The score in [0, 5] that a judge's text gives, or None: of "Score: 4/5", "**4.5**", "4,5",
    "8 out of 10" (4.0), "四分半" (4.5).

    The last number after a word for score counts; else the last one with a scale ("4/5", "4分");
    else a number that is the only one.
    """
    text = unicodedata.normalize("NFKC", text).replace("负", "-")
    # Chinese numerals where a score can stand: with 点, before 分, or at the end. (第一 is no score)
    text = re.sub(f"{NUMERAL}点{NUMERAL}", lambda m: f"{DIGITS[m[1]]}.{DIGITS[m[2]]}", text)
    text = re.sub(rf"{NUMERAL}(?=\s*(?:分|/)|\s*[。.!]?\s*$)", lambda m: str(DIGITS[m[1]]), text)
    text = re.sub(r"(\d)\s*分半", r"\1.5分", text)
    text = re.sub(r"(?<![\d.,])(\d+),(\d{1,2})(?![\d,])", r"\1.\2", text)
    text = re.sub(SCALE, " ", text)
    alone = set(re.findall(ALONE, text))
    if found := re.findall(NAMED, text) or re.findall(SCALED, text):
        value, scale = found[-1]
    elif len(alone) == 1:
        value, scale = alone.pop(), ""
    else:
        return None
    value = float(value) * 5 / (float(scale or 5) or 5)
    return value if 0 <= value <= 5 else None


def score(args):
    """Scores every record without a score. What stays without one goes to `..._unscored`, so that
    train_rm.py takes the rest."""
    if not (args.model or args.judge):
        stop("score needs --model or --judge")
    records = read_records(args.file, "user_input", "completion")
    todo = []
    for n, record in enumerate(records, 1):
        if record.get("score") is None:
            todo.append((n, record))
        elif wrong := what_is_wrong("score", record["score"]):
            stop(f"{args.file}: record {n}: field 'score' {wrong}")
    judge = Judge("--judge", args.judge) if args.judge else None
    template = "" if judge else template_of("reward", args.reward_template or args.templates)
    journal = journal_of(args)
    if judge:
        judge.check(args.file, records)
        scores = []
        for n, record in todo:
            with explain(f"{args.file}: record {n}: {args.judge} cannot judge it"):
                asked = {name: value for name, value in record.items() if name != "score"}
                scores += map(number, judge.ask([asked], [record["completion"]], [True]))
    else:
        questions = [("", fill_in(template, user_input=as_text(record["user_input"]),
                                  completion=record["completion"])) for _, record in todo]
        scores = ask(args, journal, questions, judged, "score")
    for (_, record), value in zip(todo, scores):
        record["score"] = value
    scored = [record for record in records if record["score"] is not None]
    if not scored:
        stop(f"{args.file}: not one record got a score; look at the answers in {journal.path}",
             code=1)
    save(args.out, scored)
    folder, name = os.path.split(args.out)
    stem, dot, ending = name.partition(".")
    rest = os.path.join(folder, f"{stem}_unscored{dot}{ending}")
    unscored = [{key: value for key, value in record.items() if key != "score"}
                for record in records if record["score"] is None]
    if unscored:
        save(rest, unscored)
    elif os.path.exists(rest):
        os.remove(rest)


# ------------------------------------------------------------------------------------------------
# self-instruct and prompts: new instructions from a few (Wang et al. 2022, section 2 and appendix
# A.2)

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
    number = r"(?m)^([ \t]*)[*#]*(?:\d+|[一二三四五六七八九十]+)[ \t]*[.)、．:：][*]*"
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
    journal = Journal(os.path.join(args.out, f"{args.command}.journal.jsonl"), outputs,
                      args.overwrite)
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


@clean_exit
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, template, make, summary in (
            ("self-instruct", "actor", ["actor", "rlhf"], "New instructions from the seed tasks in "
             "FILE, and answers to them, by an LLM: demonstrations and prompts."),
            ("prompts", "rlhf", ["rlhf"], "More prompts for PPO, by an LLM, from the examples in "
             "FILE.")):
        command = add_command(
            commands, name, new_data, summary,
            f"python data_gen.py {name} seed_tasks.jsonl --number 1000 --language both --api_base "
            "http://localhost:8000/v1 --model llama --out data/new",
            ("number", 100, "new instructions", positive),
            ("per_request", 8, "instructions per answer", positive),
            ("forbidden_words", None, "comma-separated; no instruction may contain one; without: "
             "what text cannot show", str),
            OUT, EVAL_SHARE)
        command.set_defaults(template=template, make=make)
        command.add_argument("file", metavar="FILE", help="a few instructions, in any layout that "
                             "import knows")
        command.add_argument("--language", choices=["en", "zh", "both"], default="en",
                             help="of the new instructions (default: en)")
        add_llm(command, 0.7, 2048)
    command = add_command(
        commands, "score", score,
        "Scores every record of FILE that has no score yet, by an LLM or a Python file.",
        "OPENAI_API_KEY=... python data_gen.py score samples.json --model gpt-4o-mini --out "
        "scored.json\n"
        "  python data_gen.py score samples.json --judge data_gen.py --out scored.json",
        ("judge", None, "Python file with score(user_input, completion), in place of an LLM", str),
        ("reward_template", None, "file with the template of the question (a text, or JSON with "
         "key reward)", str))
    command.add_argument("file", metavar="FILE", help="records with user_input and completion")
    command.add_argument("--out", required=True, help="file to write")
    add_llm(command, 0.1, 1024)
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    main()
