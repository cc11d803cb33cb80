"""A verifiable reward, for `ppo.py --reward`: is the sum right? It takes the sums out of the demo's
prompts, too:

    python docs/exact_sums.py data runs/sums        # writes two files of prompts to runs/sums
"""

import json
import os
import re
import sys

SUM = re.compile(r"\+|plus|sum|[Aa]dd|加|和是")


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def score(user_input, completion):
    """1 if the last number of the answer is the sum of the two in the question, else 0."""
    return float(numbers(completion)[-1:] == [sum(numbers(user_input))])


def main(source, out):
    os.makedirs(out, exist_ok=True)
    for name in ("rlhf_training_data.json", "rlhf_training_data_eval.json"):
        with open(os.path.join(source, name), encoding="utf-8") as file:
            prompts = [record for record in json.load(file)
                       if SUM.search(record["user_input"]) and numbers(record["user_input"])]
        with open(os.path.join(out, name), "w", encoding="utf-8") as file:
            json.dump(prompts, file, ensure_ascii=False, indent=0)
        print(f"{out}/{name}: {len(prompts)} sums")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("usage: python docs/exact_sums.py DATA OUT, two folders", file=sys.stderr)
        raise SystemExit(2)
    main(*sys.argv[1:])
