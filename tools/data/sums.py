"""Tasks whose answers can be checked: sums and comparisons of numbers of several digits, in the
phrasings of the built-in world.

    python data_gen.py sums            # writes data/sums in seconds

    actor_training_data.json   demonstrations, with the mistakes that people make
    rlhf_training_data.json    other tasks, each with its answer: {"user_input", "answer"}

Each has its held-out twin, and no sum or comparison stands in two of the four files, however it is
asked. The tokenizer is that of the built-in world, trained on these texts.

The authors of the demonstrations slip in --mistakes of the tasks: they forget to carry in a sum
(47 + 85 = 122), and compare two numbers from the last digit on (91 or 28: 28). Often nothing comes
of it: 47 + 81 has nothing to carry. SFT learns the mistakes with the rest. A reward that checks
answers can undo that.
"""

import math
import random

from data_gen import PHRASINGS, SENTENCES, solve, train_tokenizer
from lib.data import save_all
from lib.errors import explain, stop
from lib.settings import positive
from tools.data.commands import parser_of, share


def draw(rng, digits, number):
    """`number` tasks, sums and comparisons, English and Chinese in turn, no two of a kind with the
    same two numbers -> [(language, record with user_input and answer, the answer of
    somebody who slips)]."""
    tasks, seen = [], set()
    while len(tasks) < number:
        family, lang = (("sum", "en"), ("larger", "zh"), ("sum", "zh"), ("larger", "en"))[
            len(tasks) % 4]
        a, b = (rng.randrange(10 ** (digits - 1), 10 ** digits) for _ in "ab")
        if a != b and (pair := (family, min(a, b), max(a, b))) not in seen:
            seen.add(pair)
            slots = {"a": str(a), "b": str(b)}
            # numbers of equal length: the larger text is the larger number
            answer, = solve(family, lang, slots)
            asked = rng.choice(PHRASINGS[family][lang]).format(**slots)
            tasks.append((lang, {"user_input": asked, "answer": answer}, slip(family, **slots)))
    return tasks


def slip(family, a, b):
    """The answer of somebody who forgets to carry, or compares from the last digit on; `a` and `b`
    are texts of equal length."""
    if family == "larger":
        return max(a, b, key=lambda number: number[::-1])
    first, *columns = (int(x) + int(y) for x, y in zip(a, b))
    return str(first) + "".join(str(column % 10) for column in columns)


def demonstration(rng, mistakes, lang, task, slipped):
    said = slipped if rng.random() < mistakes else task["answer"]
    return {"user_input": task["user_input"],
            "completion": rng.choice(SENTENCES[lang]).format(x=said)}


def make(args):
    rng = random.Random(args.seed)
    numbers = {"actor_training_data": args.demonstrations, "actor_training_data_eval": 200,
               "rlhf_training_data": args.prompts, "rlhf_training_data_eval": 400}
    if args.digits > 100:  # Python reads no number of more than 4300
        stop(f"--digits {args.digits}: at most 100")
    wanted, least = sum(numbers.values()), 10 ** (args.digits - 1)
    there = 2 * math.comb(9 * least, 2)  # pairs of numbers, for sums and for comparisons
    if wanted > there:
        stop(f"{wanted} tasks are asked for, and two numbers of {args.digits} digits make {there}: "
             "give more --digits, fewer --demonstrations or fewer --prompts")
    tasks = draw(rng, args.digits, wanted)
    files = {}
    for name, number in numbers.items():
        part, tasks = tasks[:number], tasks[number:]
        is_actors = name.startswith("actor")
        files[f"{args.out}/{name}.json"] = [
            demonstration(rng, args.mistakes, *task) if is_actors else task[1] for task in part]
    texts = [f"User: {record['user_input']}\nAssistant: {record['completion']}"
             for record in files[f"{args.out}/actor_training_data.json"]]
    with explain(f"--demonstrations {args.demonstrations}: too few to train a tokenizer on"):
        tokenizer = train_tokenizer(texts, vocab_size=420)
    save_all(files | {f"{args.out}/tokenizer/tokenizer.model": tokenizer}, args.overwrite)


def main(name, argv):
    command = parser_of(
        name, "sums and comparisons whose answers can be checked",
        "python data_gen.py sums --digits 2",
        ("out", "data/sums", "folder to write the files to", str),
        ("digits", 2, "digits of each number", positive),
        ("demonstrations", 4000, "demonstrations for SFT", positive),
        ("mistakes", 0.6, "share of them whose author slips", share),
        ("prompts", 2000, "tasks for PPO", positive))
    make(command.parse_args(argv))
