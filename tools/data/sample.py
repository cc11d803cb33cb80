"""Samples of a checkpoint: what a reward model is best trained on, once they have scores.

    python data_gen.py sample data/rlhf_training_data.json --model runs/sft --k 4 --out samples.json

What is written is on disk at once, in a journal beside the output: the same command continues where
it stopped.
"""

import os

import torch
from tqdm import tqdm

from lib.data import encode_prompts, left_pad, read_records, save
from lib.errors import stop
from lib.state import fingerprint
from lib.settings import DEVICE, above_0, positive, usable_device, whole
from model import generate, load_llama, load_tokenizer
from tools.data.commands import digest, journal_of, not_negative, parser_of
from tools.data.sets import prompt_key


def sample(args):
    """K completions per prompt, each with the fields of the prompt's record, which a judge may ask
    for; without those that were cut, which a reward model must not take for whole ones. Each batch
    has its own random numbers, so a run that was stopped and continued gives the same result."""
    records, again = {}, set()
    for record in read_records(args.file, "user_input"):
        # what was said to it before, and its score, are not those of a sample
        record = {k: value for k, value in record.items()
                  if k not in ("completion", "score", "comparison")}
        key = prompt_key(record["user_input"])
        if records.setdefault(key, record) != record:
            again.add(key)
    if again:
        print(f"{args.file}: {len(again)} prompts came again with other fields; their first "
              "records are taken")
    prompts = [record["user_input"] for record in records.values()]
    tokenizer = load_tokenizer(args.tokenizer or args.model, args.model)
    llama = load_llama(args.model, tokenizer).to(args.device)
    context = llama.config.max_position_embeddings
    room = context - args.max_new_tokens
    if room < 1:
        stop(f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt: the model's "
             f"context is {context} tokens")
    # a model that was trained again under the same name is another model
    weights = fingerprint(args.model) if os.path.exists(args.model) else ""
    options = dict(
        model=args.model, weights=weights, k=args.k, temperature=args.temperature,
        top_k=args.top_k, top_p=args.top_p, max_new_tokens=args.max_new_tokens, seed=args.seed)
    journal = journal_of(args, **options)
    how = list(options.values())
    tokens = encode_prompts(prompts, tokenizer, room, args.file)
    keys = [digest("ended", how, prompt_key(prompt)) for prompt in prompts]
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
                if keys[i] in journal.answers:  # answered in another batch, and perhaps scored
                    continue
                journal.add(keys[i], {"completions": texts[n * args.k:(n + 1) * args.k]})
        bar.update(len(batch))
    bar.close()
    written = [[text for text in journal.answers[key]["completions"] if text is not None]
               for key in keys]
    whole = sum(map(len, written))
    same = whole - sum(len(set(texts)) for texts in written)
    print(f"{len(prompts)} prompts, {args.k} completions each; left out: "
          f"{len(prompts) * args.k - whole} that were cut at --max_new_tokens, {same} that repeat "
          "another of the same prompt")
    if not whole:
        stop(f"--max_new_tokens {args.max_new_tokens}: every completion was cut; raise it, or train "
             f"{args.model} longer, until it ends its answers", code=1)
    save(args.out, [record | {"completion": text}
                    for record, texts in zip(records.values(), written)
                    for text in dict.fromkeys(texts)])


def write(prompts, seed, llama, tokenizer, args):
    """A text for each of the prompts, which are lists of tokens; None where it was cut."""
    input_ids, mask = left_pad(prompts, tokenizer.pad_token_id, args.device)
    generator = torch.Generator(args.device).manual_seed(seed)
    out = generate(llama, input_ids, mask, args.max_new_tokens, tokenizer.end_ids,
                   args.temperature, args.top_k, args.top_p, generator)
    rows = [row[used.bool()].tolist() for row, used in zip(out.tokens, out.mask)]
    return [tokenizer.decode(row, skip_special_tokens=True).strip()
            if row[-1] in tokenizer.end_ids else None for row in rows]


def main(name, argv):
    command = parser_of(
        name, "K completions per prompt from a checkpoint.",
        "python data_gen.py sample data/rlhf_training_data.json --model runs/sft --k 4 --out "
        "samples.json",
        ("model", "runs/sft", "checkpoint, as sft.py takes it", str),
        ("tokenizer", None, "where its tokenizer is, if not with it", str),
        ("k", 4, "completions per prompt", positive),
        ("max_new_tokens", 128, "longest completion, tokens", positive),
        ("temperature", 1.0, "of the sampling", not_negative),
        ("top_k", 0, "only the likeliest tokens; 0: all", whole),
        ("top_p", 1.0, "only the likeliest tokens with this probability; 1: all", above_0),
        ("batch_size", 64, "completions at a time", positive),
        ("device", DEVICE, "where to compute", usable_device))
    command.add_argument("file", metavar="FILE", help="records with user_input")
    command.add_argument("--out", required=True, help="file to write")
    sample(command.parse_args(argv))
