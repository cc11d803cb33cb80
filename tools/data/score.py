"""Scores in place of a human labeller's: an LLM's, or those of a Python file.

    python data_gen.py score samples.json --model llama --out scored.json

The LLM is any server with OpenAI's chat API, at --api_base. Every answer of an LLM is on disk the
moment it arrives, in a journal beside the output: the same command continues where it stopped, and
asks it nothing twice. A Python file is asked again.
"""

import os
import re
import unicodedata

from lib.data import read_records, save, what_is_wrong
from lib.errors import explain, stop
from lib.judge import Judge, number
from lib.state import fingerprint
from tools.data.commands import digest, journal_of, parser_of
from tools.data.llm import add_llm, ask
from tools.data.sets import as_text
from tools.data.templates import fill_in, template_of

DIGITS = dict(zip("零〇一二两三四五六七八九十", [0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10]))
NUMERAL = f"([{''.join(DIGITS)}])"
VALUE = r"(-?(?:\d+\.|(?<![\w.])\.)?\d+)"
# no score: "满分5分", "max_score: 5", "[0, 5]", "0 to 5"
SCALE = (r"(?i)满分(?:是|为)?\s*:?\s*\d+\s*分?|\bmax_?score\W{1,6}\d+|\[\s*[01]\s*,\s*\d+\s*\]|"
         r"\b\d\s*(?:-|–|~|to|到|至)\s*\d+\b")
# "rating", but not in "generating"; "给4" and "给4分", but not "给3个建议". The gaps are as short as
# they can be, so that the point of ".5" stays with its number.
NAMED = (r"(?i)(?:(?<![a-z])(?:scores?|rating|grade)|评分|得分|分数|打分|"
         r"给(?=\D{0,15}[\d.]+(?! ?[^\W分])))[^\w-]{0,6}?"
         r"(?:\b(?:is|of|as)\b|是|为|打|它|出|了)?[^\w-]{0,6}?"
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

    The last number after a word for score counts, if one of these words begins a line the last of
    those that do; else the last one with a scale ("4/5", "4分"); else a number that is the only one.
    """
    text = unicodedata.normalize("NFKC", text).replace("负", "-")
    # Chinese numerals where a score can stand: with 点, before 分, or at the end. (第一 is no score,
    # and 十分 is "very")
    text = re.sub(f"{NUMERAL}点{NUMERAL}", lambda m: f"{DIGITS[m[1]]}.{DIGITS[m[2]]}", text)
    text = re.sub(rf"(?!十分){NUMERAL}(?=\s*(?:分|/)|\s*[。.!]?\s*$)",
                  lambda m: str(DIGITS[m[1]]), text)
    text = re.sub(r"(\d)\s*分半", r"\1.5分", text)
    text = re.sub(SCALE, " ", text)  # before decimal commas: "[0,5]"
    text = re.sub(r"(?<![\d.,])(\d+),(\d{1,2})(?![\d,])", r"\1.\2", text)
    alone = set(re.findall(ALONE, text))
    named = list(re.finditer(NAMED, text))
    first = [match for match in named
             if not text[:match.start()].rpartition("\n")[2].strip(" *#>_-'\"{[")]
    if found := first or named or list(re.finditer(SCALED, text)):
        value, scale = found[-1].groups()
    elif len(alone) == 1:
        value, scale = alone.pop(), ""
    else:
        return None
    value = float(value) * 5 / (float(scale or 5) or 5)
    return value if 0 <= value <= 5 else None


def score(args):
    """Scores every record without a score. What stays without one goes to `..._unscored`, so that
    train_rm.py takes the rest."""
    if bool(args.model) == bool(args.judge):
        stop("score needs --model or --judge, and not both")
    folder, name = os.path.split(args.out)
    stem, dot, ending = name.partition(".")
    rest = os.path.join(folder, f"{stem}_unscored{dot}{ending}")
    if os.path.realpath(rest) == os.path.realpath(args.file):
        stop(f"--out {args.out}: what stays without a score would replace {args.file}, which is "
             "read; name another")
    records = read_records(args.file, "user_input", "completion")
    todo = []
    for n, record in enumerate(records, 1):
        if record.get("score") is None:
            todo.append((n, record))
        elif wrong := what_is_wrong("score", record["score"]):
            stop(f"{args.file}: record {n}: field 'score' {wrong}")
    judge = Judge("--judge", args.judge) if args.judge else None
    template = "" if judge else template_of("reward", args.reward_template or args.templates)
    journal = journal_of(args, rest, model=args.model, template=digest(template),
                         judge=judge and fingerprint(args.judge))
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
    unscored = [{key: value for key, value in record.items() if key != "score"}
                for record in records if record["score"] is None]
    if unscored:
        save(rest, unscored)
    elif os.path.exists(rest):
        os.remove(rest)


def main(name, argv):
    command = parser_of(
        name, "Scores every record of FILE that has no score yet, by an LLM or a Python file.",
        "OPENAI_API_KEY=... python data_gen.py score samples.json --model gpt-4o-mini --out "
        "scored.json\n"
        "  python data_gen.py score samples.json --judge data_gen.py --out scored.json",
        ("judge", None, "Python file with score(user_input, completion), in place of an LLM", str),
        ("reward_template", None, "file with the template of the question (a text, or JSON with "
         "key reward)", str))
    command.add_argument("file", metavar="FILE", help="records with user_input and completion")
    command.add_argument("--out", required=True, help="file to write")
    add_llm(command, 0.1, 1024)
    score(command.parse_args(argv))
