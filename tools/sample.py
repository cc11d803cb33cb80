"""Samples of a checkpoint, and a person's ranking of them: what a reward model is trained on.

    python data_gen.py sample data/rlhf_training_data.json --model runs/sft --k 4 --out samples.json
    python data_gen.py rank samples.json --out ranked.json

(or python -m tools.sample rank ...). What is written or typed is on disk at once, in a journal
beside the output: the same command continues where it stopped.
"""

import argparse
import os
import random
import unicodedata

import torch
from tqdm import tqdm

from lib.data import encode_prompts, left_pad, read_records, save
from lib.errors import clean_exit, stop
from lib.run import fingerprint
from lib.settings import DEVICE, positive, usable_device, whole
from model import generate, load_llama, load_tokenizer
from tools.commands import add_command, digest, journal_of, not_negative
from tools.get_data import as_text, prompt_key


# ------------------------------------------------------------------------------------------------
# sample

def sample(args):
    """K completions per prompt. Each batch has its own random numbers: a run that was stopped goes
    on with the same result."""
    records = read_records(args.file, "user_input")
    prompts = list({prompt_key(r["user_input"]): r["user_input"] for r in records}.values())
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    llama = load_llama(args.model, tokenizer).to(args.device)
    context = llama.config.max_position_embeddings
    room = context - args.max_new_tokens
    if room < 1:
        stop(f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt: the model's "
             f"context is {context} tokens")
    journal = journal_of(args)
    tokens = encode_prompts(prompts, tokenizer, room, args.file)
    # a model that was trained again under the same name is another model
    trained = fingerprint(args.model) if os.path.exists(args.model) else ""
    how = [args.model, trained, args.k, args.temperature, args.top_k, args.top_p,
           args.max_new_tokens, args.seed]
    keys = [digest("sample", how, prompt_key(prompt)) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(tokens[i]))  # little padding
    step = max(1, args.batch_size // args.k)
    bar = tqdm(total=len(prompts), desc="sample", unit="prompt", dynamic_ncols=True)
    for start in range(0, len(order), step):
        batch = order[start:start + step]
        if any(keys[i] not in journal.answers for i in batch):
            seed = int(digest(how, tokens[batch[0]])[:15], 16)
            texts = write([tokens[i] for i in batch for _ in range(args.k)], seed, llama,
                          tokenizer, args)
            for n, i in enumerate(batch):
                journal.add(keys[i], {"completions": texts[n * args.k:(n + 1) * args.k]})
        bar.update(len(batch))
    bar.close()
    written = [journal.answers[key]["completions"] for key in keys]
    same = sum(len(texts) - len(set(texts)) for texts in written)
    print(f"{len(prompts)} prompts, {args.k} completions each; {same} that a prompt has already "
          "are left out")
    save(args.out, [{"user_input": prompt, "completion": text}
                    for prompt, texts in zip(prompts, written) for text in dict.fromkeys(texts)])


def write(prompts, seed, llama, tokenizer, args):
    """One text for each of the prompts, which are lists of tokens."""
    input_ids, mask = left_pad(prompts, tokenizer.pad_token_id, args.device)
    generator = torch.Generator(args.device).manual_seed(seed)
    out = generate(llama, input_ids, mask, args.max_new_tokens, tokenizer.end_ids,
                   args.temperature, args.top_k, args.top_p, generator)
    return [tokenizer.decode(row[used.bool()].tolist(), skip_special_tokens=True).strip()
            for row, used in zip(out.tokens, out.mask)]


# ------------------------------------------------------------------------------------------------
# rank

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


@clean_exit
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = add_command(
        commands, "sample", sample, "K completions per prompt from a checkpoint.",
        "python data_gen.py sample data/rlhf_training_data.json --model runs/sft --k 4 --out "
        "samples.json",
        ("model", "runs/sft", "checkpoint, as sft.py takes it", str),
        ("tokenizer", None, "where its tokenizer is, if not with it", str),
        ("k", 4, "completions per prompt", positive),
        ("max_new_tokens", 128, "longest completion, tokens", positive),
        ("temperature", 1.0, "of the sampling", not_negative),
        ("top_k", 0, "only the likeliest tokens; 0: all", whole),
        ("top_p", 1.0, "only the likeliest tokens with this probability; 1: all", float),
        ("batch_size", 64, "completions at a time", positive),
        ("device", DEVICE, "where to compute", usable_device))
    command.add_argument("file", metavar="FILE", help="records with user_input")
    command.add_argument("--out", required=True, help="file to write")
    command = add_command(
        commands, "rank", rank,
        "Shows each prompt with its completions; you type the order. Saved after every answer.",
        "python data_gen.py rank samples.json --out ranked.json")
    command.add_argument("file", metavar="FILE", help="records with user_input and completion, "
                         "several per prompt")
    command.add_argument("--out", required=True, help="file to write")
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    main()
