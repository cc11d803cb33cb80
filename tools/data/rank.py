"""A person's ranking of completions, as scores: what a reward model is trained on.

    python data_gen.py rank samples.json --out ranked.json

What is typed is on disk at once, in a journal beside the output: the same command continues where
it stopped.
"""

import os
import random
import unicodedata

from lib.data import read_records, save
from lib.errors import stop
from tools.data.commands import digest, journal_of, parser_of
from tools.data.sets import as_text, prompt_key


def read_order(text, number):
    """The level of each of `number` completions in an order such as "2>1=3", 0 being the best:
    {1: 0, 0: 1, 2: 1}. ValueError: why it is none."""
    parts = unicodedata.normalize("NFKC", text).split(">")
    try:
        levels = [[int(name) for name in part.split("=")] for part in parts]
    except ValueError:
        raise ValueError("an order looks like 2>1=3") from None
    if sorted(sum(levels, [])) != list(range(1, number + 1)):
        raise ValueError(f"an order names each of 1 to {number} once")
    return {name - 1: level for level, names in enumerate(levels) for name in names}


def shown(text):
    """A text for the terminal: a control character is shown, not obeyed."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def rank(args):
    """Scores from 5 (best) to 0 (worst), in even steps, a tie sharing one."""
    completions = {}
    for record in read_records(args.file, "user_input", "completion"):
        key = prompt_key(record["user_input"])
        completions.setdefault(key, (record["user_input"], {}))[1][record["completion"]] = None
    groups = [(user_input, list(texts)) for user_input, texts in completions.values()
              if len(texts) > 1]
    if not groups:
        stop(f"{args.file}: no prompt has two different completions, so there is nothing to rank")
    if alone := len(completions) - len(groups):
        print(f"{args.file}: of {len(completions)} prompts, {alone} left out, with one completion")
    journal = journal_of(args)
    keys = [digest("rank", prompt_key(user_input), texts) for user_input, texts in groups]
    print("Type the order of the completions, the best first, such as 2>1=3; or s to skip, b to go "
          "back, q to quit (it is saved).")
    i = next((i for i, key in enumerate(keys) if key not in journal.answers), len(keys))
    while i < len(groups):
        user_input, texts = groups[i]
        # where it stands must not tell where it is from
        order = random.Random(keys[i]).sample(range(len(texts)), len(texts))
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
            scores = [2.5] * len(texts)
            for n, which in enumerate(order):
                if worst:
                    scores[which] = 5.0 * (1 - level[n] / worst)
            journal.add(keys[i], {"scores": scores})
        i += 1
    done = [(*group, journal.answers[key]["scores"]) for group, key in zip(groups, keys)
            if key in journal.answers]
    ranked = [group for group in done if group[2]]
    print(f"{len(ranked)} prompts ranked, {len(done) - len(ranked)} skipped, "
          f"{len(groups) - len(done)} to go")
    if ranked:
        save(args.out, [{"user_input": user_input, "completion": text, "score": value}
                        for user_input, texts, scores in ranked
                        for text, value in zip(texts, scores)])
    elif done and os.path.exists(args.out):  # its last ranking was taken back
        os.remove(args.out)
        print(f"{args.out}: removed")


def main(name, argv):
    command = parser_of(
        name,
        "Shows each prompt with its completions; you type the order. Saved after every answer.",
        "python data_gen.py rank samples.json --out ranked.json")
    command.add_argument("file", metavar="FILE", help="records with user_input and completion, "
                         "several per prompt")
    command.add_argument("--out", required=True, help="file to write")
    rank(command.parse_args(argv))
