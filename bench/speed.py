"""Speed and memory of this repo beside those of what a user would pick instead, on this machine, in one run.

    pip install -r requirements.txt -r bench/requirements.txt
    python bench/speed.py                                     # every comparison: hours on a small machine
    python bench/speed.py --only ppo_float32 generate_demo    # some of them (--help names all)
    python bench/speed.py --only scaling                      # how the cost of a PPO update grows
    python bench/speed.py --profile                           # where the time of one of our PPO updates or generations goes
    python bench/speed.py --model SmolLM2-135M.gguf           # on a real LLaMA; else random weights of the same size
    python bench/speed.py --tiny                              # does everything run? The figures mean nothing

Generation is compared with `LlamaForCausalLM.generate`, the stages with TRL's PPOTrainer, SFTTrainer and RewardTrainer:
same weights, token sequences, precision, batch and optimizer steps. Neither side is tuned beyond its defaults but for
the sizes at the top of this file. Our SFT and RM batches hold records of similar length, as sft.py and train_rm.py make
them; TRL's are shuffled, as its trainers make them.

Every measured side is a process of its own, since its peak memory is compared: ours, peer, ours, peer, ... A ratio is
that of two neighbours; the table has the median over the pairs, with the smallest and the largest. Within a process the
first two updates (or generations) are warm-up, and the median of the others counts: the memory of a process still grows
in the second. An epoch of SFT or RM counts whole.

"Realistic": prompts from 4 tokens to the longest with a mean of about 0.4 of it, and the end of sequence made likelier
on both sides, by the same hook, so that responses have a mean of about a third of the longest. Else nothing ends early.
"""

import argparse
import itertools
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

PPO_MICRO_BATCH, SFT_MICRO_BATCH, RM_MICRO_BATCH = 4, 8, 4  # of ours; TRL's micro-batch is its whole mini-batch
WARM_UP = 2  # updates, or generations
LR = "1e-6"  # of every optimizer here: it changes no time
REAL = dict(model="real", batch=16, prompt=64, new=48)
DEMO = dict(model="demo", batch=64, prompt=24, new=40, times=5)  # ppo.py's demo; quick, so five times as often as --updates says
EPOCH = dict(model="real", records=64, batch=8, max_length=512)
COMPARISONS = {
    "generate_demo": dict(DEMO, kind="generate"),
    "generate_demo_realistic": dict(DEMO, kind="generate", realistic=True),
    "generate_real": dict(REAL, kind="generate"),
    "generate_real_realistic": dict(REAL, kind="generate", realistic=True),
    "ppo_float32": dict(REAL, kind="ppo"),
    "ppo_float32_realistic": dict(REAL, kind="ppo", realistic=True),
    "ppo_bf16": dict(REAL, kind="ppo", bf16=True),
    "sft": dict(EPOCH, kind="sft"),
    "rm": dict(EPOCH, kind="rm"),
}
TINY = dict(batch=4, prompt=12, new=6, records=8, max_length=64)  # replaces these sizes with --tiny
SIZE_135M = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                 max_position_embeddings=2048, tie_word_embeddings=True)
SIZE_TINY = dict(SIZE_135M, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1)
# the model and the update that --only scaling begins from
SIZE_SCALING = dict(vocab_size=4096, hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=2048, tie_word_embeddings=True)
SCALING = dict(batch=8, prompt=64, response=32, layers=4)
SCALING_TINY = dict(batch=2, prompt=8, response=4, layers=1)


# ---------------------------------------------------------------------------------------------------------------------
# How many floating-point operations the matrix products need. A product of (n, k) and (k, m) takes 2 n k m.
# Only real tokens count: padding is work that a side does, not work that is needed.

def forward_flops(config, length, projected):
    """FLOP of one forward pass of LLaMA over a sequence of `length` tokens, `projected` of which go through the
    vocabulary projection.

    Per token and layer: 2 x parameters of its linear layers. Attention: QK^T and AV, each 2 x heads x head_dim for each
    position that a token may look at, itself included. With a KV cache it is the same sum, whichever way it is cut.
    """
    width, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    linear = 2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size  # q and o, k and v, the MLP's three
    looked_at = length * (length + 1) // 2
    return config.num_hidden_layers * (2 * linear * length + 4 * queries * looked_at) + 2 * width * config.vocab_size * projected


def generation_flops(config, lengths):
    """FLOP of prefill and decoding: every token but the last sampled one goes through the model once, and every sampled
    token costs one vocabulary projection. `lengths`: (tokens of the prompt, of the response) of each row."""
    return sum(forward_flops(config, prompt + response - 1, response) for prompt, response in lengths)


def update_flops(config, lengths):
    """FLOP of a PPO update of one epoch: generation; a forward pass of reference, reward model and critic; forward and
    backward (twice the forward) of actor and critic. Vocabulary projections at response positions only. `lengths` as above."""
    with_words = sum(forward_flops(config, prompt + response, response) for prompt, response in lengths)
    with_scalars = sum(forward_flops(config, prompt + response, 0) for prompt, response in lengths)
    return generation_flops(config, lengths) + with_words + 2 * with_scalars + 3 * with_words + 3 * with_scalars


def epoch_flops(config, kind, sequences):
    """FLOP of an epoch, forward and backward, of "sft": [[prompt, completion], ...] with the vocabulary projection at the
    completion only; or of "rm": [[chosen, rejected], ...], each with its prompt before it, without projection."""
    if kind == "sft":
        return sum(3 * forward_flops(config, len(prompt) + len(completion), len(completion)) for prompt, completion in sequences)
    return sum(3 * forward_flops(config, len(text), 0) for pair in sequences for text in pair)


# ---------------------------------------------------------------------------------------------------------------------
# What both sides get

def random_prompts(work, vocabulary):
    """`work["batch"]` prompts of random tokens, the same on both sides and in every update."""
    import torch
    generator = torch.Generator().manual_seed(0)
    lengths = [work["prompt"]] * work["batch"]
    if work.get("realistic"):
        lengths = (4 + (work["prompt"] - 4) * torch.rand(work["batch"], generator=generator) ** 1.8).long().tolist()
        lengths[0] = work["prompt"]
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def make_end_likelier(model, eos_token_id, log_odds=-2.8):
    """From now on the end of sequence has about these log odds against all other tokens, whatever came before."""
    import torch

    def hook(module, inputs, logits):
        logits = logits.clone()
        logits[..., eos_token_id] = torch.logsumexp(logits.detach(), -1) + log_odds
        return logits
    model.get_output_embeddings().register_forward_hook(hook)


def lengths_written(tokens, eos_token_id):
    """How many tokens each row of (B, N) has up to and including its first end of sequence."""
    ends = (tokens == eos_token_id).int()
    return (ends.cumsum(1) - ends == 0).sum(1).tolist()


WORDS = ("the of and to in is for on that with as by at from it an be are this was or which can one have not more has but "
         "their all some other time when how we may use new first people would about into than also work make data").split()


def synthetic_records(number):
    """Demonstrations and scored pairs of plain words, about one token a word. The lengths are spread as Alpaca's: a
    completion has 60 words in the median, 13 to 280 in nineteen of twenty, 400 at most; a prompt 20 in the median."""
    rng = random.Random(0)
    text = lambda median, spread, most: " ".join(  # noqa: E731
        rng.choices(WORDS, k=min(most, max(1, round(rng.lognormvariate(math.log(median), spread))))))
    demonstrations = [dict(user_input=text(20, 0.5, 80), completion=text(60, 0.8, 400)) for _ in range(number)]
    pairs = []
    for _ in range(number):
        prompt = text(20, 0.5, 80)
        pairs += [dict(user_input=prompt, completion=text(60, 0.8, 400), score=score) for score in (1.0, 0.0)]
    return demonstrations, pairs


def prepare(run, folder):
    """Write the models as Hugging Face directories and the data, as records for us and as tokens for the peer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from model import encode_records, load_llama, load_tokenizer, read_records, save_checkpoint

    def word_tokenizer(size):
        words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
        words += [f"w{i}" for i in range(size - len(words))]
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")

    torch.manual_seed(0)
    tokenizer = word_tokenizer(1536)  # the vocabulary of the built-in data
    save_checkpoint(load_llama(None, tokenizer), tokenizer, f"{folder}/demo")
    if not run["real"]:
        return
    if run["model"]:
        tokenizer = load_tokenizer(run["model"])
        model = load_llama(run["model"], tokenizer)
    else:
        tokenizer = word_tokenizer(512 if run["tiny"] else 49152)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **(SIZE_TINY if run["tiny"] else SIZE_135M)))
    save_checkpoint(model, tokenizer, f"{folder}/real")

    tokenizer, sizes = load_tokenizer(f"{folder}/real"), run["work"]["sft"]
    number, max_length = sizes["records"], sizes["max_length"]
    sft, rm = synthetic_records(number)
    if run["data"]:
        sft = read_records(os.path.join(run["data"], "actor_training_data.json"), "user_input", "completion")
        rm = read_records(os.path.join(run["data"], "reward_training_data.json"), "user_input", "completion", "score")
    # only what fits is written, so that both sides train on all of it
    examples = encode_records(sft, tokenizer, max_length, "sft")[:number]
    write(f"{folder}/sft.json", [sft[n - 1] for *_, n in examples])
    write(f"{folder}/sft_tokens.json", [(prompt, completion) for prompt, completion, _ in examples])
    groups = {}
    for prompt, completion, n in encode_records(rm, tokenizer, max_length, "rm"):
        groups.setdefault(json.dumps(rm[n - 1]["user_input"]), []).append((rm[n - 1]["score"], n, prompt, completion))
    pairs = [(max(group), min(group)) for group in groups.values() if max(group)[0] > min(group)[0]][:number]
    write(f"{folder}/rm.json", [rm[n - 1] for pair in pairs for _, n, *_ in pair])
    # a prompt that is cut to fit is cut differently for either completion
    write(f"{folder}/rm_tokens.json", [(best[2] + best[3], worst[2] + worst[3]) for best, worst in pairs])
    if min(len(examples), len(pairs)) < number:
        print(f"only {len(examples)} demonstrations and {len(pairs)} pairs", file=sys.stderr)


def write(path, data):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file)


def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def timed(step, updates):
    """Run `step` WARM_UP times, then `updates` times -> seconds of each of these, and what each returned."""
    for _ in range(WARM_UP):
        step()
    seconds, results = [], []
    for _ in range(updates):
        started = time.perf_counter()
        results.append(step())
        seconds.append(time.perf_counter() - started)
    return seconds, results


# ---------------------------------------------------------------------------------------------------------------------
# Ours. Each returns seconds, FLOP, and the tokens of a response where there are responses.

def summary(seconds, flops, lengths):
    """Medians over the updates; `lengths`: of each update the (prompt, response) lengths of its rows."""
    responses = [response for update in lengths for _, response in update]
    return dict(seconds=statistics.median(seconds), flops=statistics.median(flops), tokens=statistics.mean(responses),
                flops_per_s=statistics.median(f / s for f, s in zip(flops, seconds)))


def generate_parts(work, folder):
    """A function that answers the prompts of a comparison, these prompts, and the configuration of its model."""
    import torch

    from model import generate, left_pad, load_llama, load_tokenizer
    tokenizer = load_tokenizer(f"{folder}/{work['model']}")
    model = load_llama(f"{folder}/{work['model']}", tokenizer)
    prompts = random_prompts(work, model.config.vocab_size)
    if work.get("realistic"):
        make_end_likelier(model, tokenizer.eos_token_id)
    eos, generator = tokenizer.eos_token_id if work.get("realistic") else -1, torch.Generator().manual_seed(work["seed"])
    inputs = left_pad(prompts, tokenizer.pad_token_id)
    return lambda: generate(model, *inputs, work["new"], eos, generator=generator), prompts, model.config


def ours_generate(work, folder):
    answer, prompts, config = generate_parts(work, folder)
    seconds, outs = timed(answer, work["updates"])
    lengths = [[(len(p), int(n)) for p, n in zip(prompts, out.mask.sum(1))] for out in outs]
    return summary(seconds, [generation_flops(config, rows) for rows in lengths], lengths)


def ppo_step(actor, critic, reward_model, ref, prompts, tokenizer, new, seed=0, bf16=False):
    """A function that does one update as ppo.main's loop does, one epoch of one mini-batch, and returns the (prompt,
    response) lengths of its rows."""
    import torch

    import ppo
    args, _ = ppo.parse(["--sft", "-", "--rm", "-", "--prompts", "-", "--device", "cpu", "--dtype", "bfloat16" if bf16 else "float32",
                         "--batch_size", str(len(prompts)), "--minibatch_size", str(len(prompts)), "--ppo_epochs", "1",
                         "--micro_batch_size", str(PPO_MICRO_BATCH), "--max_prompt_length", str(max(map(len, prompts))),
                         "--max_new_tokens", str(new), "--lr", LR, "--critic_lr", LR])
    ref.requires_grad_(False)
    reward_model.requires_grad_(False)
    actor_optimizer = torch.optim.AdamW(actor.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=args.critic_lr, eps=1e-5, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(seed)

    def step():
        experience, _ = ppo.make_experience(actor, critic, reward_model, ref, prompts, tokenizer, args, args.kl_coef, generator)
        for _ in range(args.ppo_epochs):
            order = torch.randperm(len(prompts)).tolist()
            for start in range(0, len(order), args.minibatch_size):
                ppo.train_minibatch(actor, critic, actor_optimizer, critic_optimizer, experience,
                                    order[start:start + args.minibatch_size], [], tokenizer, args)
        return [(len(p), len(r)) for p, r in zip(experience["prompts"], experience["responses"])]
    return step


def ppo_parts(work, folder):
    """The step function of a comparison, and the configuration of its model."""
    from model import ScalarHead, load_llama, load_tokenizer
    path = f"{folder}/{work['model']}"
    tokenizer = load_tokenizer(path)
    actor, ref = load_llama(path, tokenizer), load_llama(path, tokenizer)
    critic, reward_model = ScalarHead(load_llama(path, tokenizer).model), ScalarHead(load_llama(path, tokenizer).model)
    prompts = random_prompts(work, actor.config.vocab_size)
    if work.get("realistic"):
        make_end_likelier(actor, tokenizer.eos_token_id)
        make_end_likelier(ref, tokenizer.eos_token_id)
    else:
        tokenizer = never_ends(tokenizer.pad_token_id)
    step = ppo_step(actor, critic, reward_model, ref, prompts, tokenizer, work["new"], work["seed"], work.get("bf16"))
    return step, actor.config


def never_ends(pad_token_id):
    """What ppo.py's functions use of a tokenizer, with an end of sequence that no model samples."""
    return argparse.Namespace(pad_token_id=pad_token_id, eos_token_id=-1)


def ours_ppo(work, folder):
    step, config = ppo_parts(work, folder)
    seconds, lengths = timed(step, work["updates"])
    return summary(seconds, [update_flops(config, rows) for rows in lengths], lengths)


def timed_epoch(stage, options, folder):
    """Run the stage's main -> seconds from the opening of metrics.csv, when all is loaded, to its last row."""
    times = []

    class TimedMetrics(stage.Metrics):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            times.append(time.perf_counter())

        def log(self, **row):
            super().log(**row)
            times.append(time.perf_counter())
    stage.Metrics = TimedMetrics
    stage.main([*options, "--model", f"{folder}/real", "--out", f"{folder}/out", "--overwrite", "--epochs", "1", "--lr", LR,
                "--device", "cpu"])
    return times[-1] - times[0]


def ours_epoch(work, folder):
    from transformers import LlamaConfig

    import sft
    import train_rm
    kind = work["kind"]
    options = ["--data", f"{folder}/{kind}.json", "--batch_size", str(work["batch"]), "--max_length", str(work["max_length"]),
               "--micro_batch_size", str(SFT_MICRO_BATCH if kind == "sft" else RM_MICRO_BATCH)]
    if kind == "rm":
        options += ["--demonstrations", f"{folder}/sft.json"]
    seconds = timed_epoch(sft if kind == "sft" else train_rm, options, folder)
    flops = epoch_flops(LlamaConfig.from_pretrained(f"{folder}/real"), kind, read(f"{folder}/{kind}_tokens.json"))
    return dict(seconds=seconds, flops=flops, flops_per_s=flops / seconds)


def measure_peak(work, folder):
    """FLOP/s of a product of two square matrices, the fastest of several sizes and runs."""
    import torch
    result = {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        best = 0.0
        for n in (256, 512) if work["tiny"] else (1024, 1536, 2048, 3072):
            a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
            seconds, _ = timed(lambda: a @ b, 5)
            best = max(best, 2 * n ** 3 / min(seconds))
        result[name] = best
    return result


def scaling(work, folder):
    """Seconds and FLOP of our PPO update when one of its sizes is doubled, and doubled again."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from model import ScalarHead, with_linear
    rows = []
    first = SCALING_TINY if work["tiny"] else SCALING
    for name, factor in [("", 1)] + [(name, factor) for name in first for factor in (2, 4)]:
        sizes = first | ({name: first[name] * factor} if name else {})
        config = LlamaConfig(num_hidden_layers=sizes["layers"], **SIZE_SCALING)
        torch.manual_seed(0)
        actor, critic, reward_model, ref = (with_linear(LlamaForCausalLM(config).eval()) for _ in range(4))
        step = ppo_step(actor, ScalarHead(critic.model), ScalarHead(reward_model.model), ref, random_prompts(sizes, config.vocab_size),
                        never_ends(pad_token_id=0), sizes["response"])
        seconds, lengths = timed(step, work["updates"])
        rows.append(dict(name=name, factor=factor, seconds=statistics.median(seconds), flops=update_flops(config, lengths[0]), sizes=sizes))
    return dict(rows=rows)


def profile(work, folder):
    """The operators that take the most time in one of our PPO updates, or generations."""
    import torch
    step = (generate_parts if work["kind"] == "generate" else ppo_parts)(work, folder)[0]
    timed(step, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    return dict(table=profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


# ---------------------------------------------------------------------------------------------------------------------
# The peers

def peer_generate(work, folder):
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/{work['model']}")
    model = LlamaForCausalLM.from_pretrained(f"{folder}/{work['model']}", dtype=torch.float32).eval()
    prompts = random_prompts(work, model.config.vocab_size)
    if work.get("realistic"):
        make_end_likelier(model, tokenizer.eos_token_id)
    model.generation_config.eos_token_id = tokenizer.eos_token_id if work.get("realistic") else None
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(work["seed"])
    options = dict(attention_mask=mask, max_new_tokens=work["new"], do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                   pad_token_id=tokenizer.pad_token_id)
    seconds, outs = timed(lambda: model.generate(input_ids, **options), work["updates"])
    eos = tokenizer.eos_token_id if work.get("realistic") else -1
    written = [n for out in outs for n in lengths_written(out[:, longest:], eos)]
    return dict(seconds=statistics.median(seconds), tokens=statistics.mean(written))


def peer_ppo(work, folder):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    path, batch, updates = f"{folder}/{work['model']}", work["batch"], WARM_UP + work["updates"]
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    policy, ref = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    value, reward = (AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32) for _ in range(2))
    for model in (value, reward):
        model.config.pad_token_id = tokenizer.pad_token_id
    if work.get("realistic"):
        make_end_likelier(policy, tokenizer.eos_token_id)
        make_end_likelier(ref, tokenizer.eos_token_id)
    # one batch, the same at each update
    prompts = Dataset.from_list([{"input_ids": p} for p in random_prompts(work, policy.config.vocab_size)])
    eos = tokenizer.eos_token_id if work.get("realistic") else -1
    config = PPOConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=batch, gradient_accumulation_steps=1, num_mini_batches=1, num_ppo_epochs=1,
        total_episodes=batch * updates, response_length=work["new"], stop_token="eos" if work.get("realistic") else None,
        local_rollout_forward_batch_size=batch, temperature=1.0, num_sample_generations=0, save_strategy="no", report_to="none",
        use_cpu=True, learning_rate=float(LR), bf16=bool(work.get("bf16")), logging_steps=1, disable_tqdm=True,
        seed=work["seed"])
    times, written, generate = [], [], policy.generate

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())

    def counted(*args, **kwargs):
        out = generate(*args, **kwargs)
        written.append(lengths_written(out.sequences[:, kwargs["input_ids"].shape[1]:], eos))
        return out
    policy.generate = counted
    trainer = PPOTrainer(args=config, processing_class=tokenizer, model=policy, ref_model=ref, reward_model=reward, value_model=value,
                         train_dataset=prompts, eval_dataset=prompts, callbacks=[Clock()])
    trainer.train()
    seconds = [after - before for before, after in zip(times, times[1:])][WARM_UP - 1:]  # the first update ends at times[0]
    return dict(seconds=statistics.median(seconds), tokens=statistics.mean(n for update in written[WARM_UP:] for n in update))


def peer_epoch(work, folder):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
    path, sequences = f"{folder}/real", read(f"{folder}/{work['kind']}_tokens.json")
    tokenizer = AutoTokenizer.from_pretrained(path)
    options = dict(output_dir=f"{folder}/trl", per_device_train_batch_size=work["batch"], gradient_accumulation_steps=1,
                   num_train_epochs=1, max_length=work["max_length"], learning_rate=float(LR), use_cpu=True, bf16=False, fp16=False,
                   save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1000, gradient_checkpointing=False)
    if work["kind"] == "sft":
        data = Dataset.from_list([{"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
                                  for prompt, completion in sequences])
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        trainer = SFTTrainer(model=model, args=SFTConfig(**options), train_dataset=data, processing_class=tokenizer)
    else:
        data = Dataset.from_list([{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in sequences])
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
        trainer = RewardTrainer(model=model, args=RewardConfig(**options), train_dataset=data, processing_class=tokenizer)
    if len(trainer.train_dataset) != len(sequences):
        raise RuntimeError(f"TRL dropped {len(sequences) - len(trainer.train_dataset)} records")
    started = time.perf_counter()
    trainer.train()
    return dict(seconds=time.perf_counter() - started)


WORKERS = {("ours", "generate"): ours_generate, ("ours", "ppo"): ours_ppo, ("ours", "sft"): ours_epoch, ("ours", "rm"): ours_epoch,
           ("peer", "generate"): peer_generate, ("peer", "ppo"): peer_ppo, ("peer", "sft"): peer_epoch, ("peer", "rm"): peer_epoch,
           ("ours", "peak"): measure_peak, ("ours", "scaling"): scaling, ("ours", "profile"): profile}


def worker(side, name, folder, seed):
    """One process: measure one side of one comparison, and leave the result in the folder."""
    if side == "ours":
        sys.path.insert(0, ROOT)
    run = read(f"{folder}/run.json")
    if name == "prepare":
        prepare(run, folder)
        result = {}
    else:
        work = run["work"].get(name.removeprefix("profile:"), {})
        work |= dict(updates=run["updates"] * work.get("times", 1), tiny=run["tiny"], seed=int(seed))
        kind = "profile" if name.startswith("profile:") else work.get("kind", name)
        result = WORKERS[side, kind](work, folder)
    import torch
    import transformers
    result |= dict(gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # in KiB on Linux
                   threads=torch.get_num_threads(), torch=torch.__version__, transformers=transformers.__version__)
    write(f"{folder}/result.json", result)


# ---------------------------------------------------------------------------------------------------------------------
# The run. This process never imports torch: Linux begins a child's peak memory with that of the process it came from.

def fail(message, code):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def start(python, side, name, folder, seed=0):
    """Run one worker -> its result."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
    done = subprocess.run([python, os.path.abspath(__file__), "--worker", side, name, folder, str(seed)], env=environment, cwd=folder,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 2 and "error: " in done.stdout:  # wrong input, told in one line
        fail(done.stdout.strip().split("\n")[-1].removeprefix("error: "), 2)
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
        fail(f"{side}, {name}: the process ended with code {done.returncode}; its last output stands above", 1)
    return read(f"{folder}/result.json")


def spread(values, digits=2):
    """Median (smallest..largest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def compare(name, work, repeats, python, folder):
    """Ours, peer, ours, peer, ... -> a row of the table."""
    pairs, shares = [], []
    for number in range(1, repeats + 1):
        peak = start(sys.executable, "ours", "peak", folder)["bf16" if work.get("bf16") else "float32"]
        # a seed a pair: at realistic lengths the responses, and so the work, are drawn anew
        ours, peer = start(sys.executable, "ours", name, folder, number), start(python, "peer", name, folder, number)
        if different := [key for key in ("threads", "torch", "transformers") if ours[key] != peer[key]]:
            print("warning: " + ", ".join(f"{key}: ours {ours[key]}, peer {peer[key]}" for key in different), file=sys.stderr)
        pairs.append((ours, peer))
        shares.append(ours["flops_per_s"] / peak)
        print(f"{name} {number}/{repeats}: ours {ours['seconds']:.3g} s, peer {peer['seconds']:.3g} s; ours {ours['gib']:.2f} GiB, peer "
              f"{peer['gib']:.2f} GiB; ours {ours['flops_per_s'] / 1e9:.1f} of {peak / 1e9:.1f} GFLOP/s", file=sys.stderr, flush=True)
    median = lambda side, key: statistics.median(pair[side][key] for pair in pairs)  # noqa: E731
    tokens = f"{median(0, 'tokens'):.1f}, {median(1, 'tokens'):.1f}" if "tokens" in pairs[0][0] else ""
    return [name, spread([peer["seconds"] / ours["seconds"] for ours, peer in pairs]),
            spread([100 * ours["gib"] / peer["gib"] for ours, peer in pairs], 0) + " %", spread([100 * s for s in shares], 0) + " %",
            f"{median(0, 'seconds'):.3g}, {median(1, 'seconds'):.3g}", f"{median(0, 'gib'):.2f}, {median(1, 'gib'):.2f}",
            f"{median(0, 'flops') / 1e9:.3g}", tokens]


def table(head, rows):
    """Print a Markdown table, each row as soon as `rows` yields it."""
    for row in itertools.chain((head, ["---"] * len(head)), rows):
        print("| " + " | ".join(row) + " |", flush=True)
    print()


def machine():
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[*COMPARISONS, "scaling"],
                        help=f"of {', '.join(COMPARISONS)}, scaling (default: all)")
    parser.add_argument("--model", help="a real LLaMA: a Hugging Face or Meta directory or a .gguf file (default: random weights of 135M)")
    parser.add_argument("--data", help="folder with actor_training_data.json and reward_training_data.json (default: synthetic texts)")
    parser.add_argument("--python", default=sys.executable, help="the Python that has TRL, for the peer's processes (default: this one)")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of processes a comparison")
    parser.add_argument("--updates", type=int, default=2, help="measured updates, or generations, in each process, after two to warm up")
    parser.add_argument("--profile", action="store_true",
                        help="only profile our side of the PPO updates and generations named by --only (default: ppo_float32)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--worker", nargs=4, metavar=("SIDE", "NAME", "FOLDER", "SEED"), help="what each process is started with")
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)
    if os.path.dirname(args.python):
        args.python = os.path.abspath(args.python)
    if args.repeats < 1 or args.updates < 1:
        fail("--repeats and --updates must be at least 1", 2)
    chosen = args.only or ["ppo_float32"] if args.profile else args.only or [*COMPARISONS, "scaling"]
    if args.profile and any(COMPARISONS.get(name, {}).get("kind") not in ("ppo", "generate") for name in chosen):
        fail("--profile needs names of PPO updates or generations in --only, such as ppo_bf16", 2)
    compared = [] if args.profile else [name for name in chosen if name in COMPARISONS]
    if any(COMPARISONS[name]["kind"] != "generate" for name in compared):
        try:
            has_trl = subprocess.run([args.python, "-c", "import trl.experimental.ppo"], capture_output=True).returncode == 0
        except OSError as error:
            fail(f"--python {args.python}: cannot be run ({error.strerror})", 2)
        if not has_trl:
            fail(f"{args.python} has no trl 1.12.0: pip install -r bench/requirements.txt, or name another --python", 2)

    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        shrink = lambda work: work | {key: n for key, n in TINY.items() if args.tiny and key in work}  # noqa: E731
        absolute = lambda path: path and os.path.abspath(path)  # noqa: E731
        write(f"{folder}/run.json", dict(
            model=absolute(args.model), data=absolute(args.data), updates=args.updates, tiny=args.tiny,
            work={name: shrink(work) for name, work in COMPARISONS.items()},
            real=any(COMPARISONS[name]["model"] == "real" for name in chosen if name in COMPARISONS)))
        made = start(sys.executable, "ours", "prepare", folder)
        print(f"{machine()}, {made['threads']} threads, torch {made['torch']}, transformers {made['transformers']}; "
              f"model: {args.model or 'random weights'}; {args.repeats} pairs of processes, {args.updates} updates each after two to warm up"
              + ("; TINY SIZES: the figures mean nothing" if args.tiny else "") + "\n", flush=True)
        if args.profile:
            for name in chosen:
                print(f"{name}\n{start(sys.executable, 'ours', 'profile:' + name, folder)['table']}")
            return
        if compared:
            table(["measure", "speed, times the peer's", "peak memory, of the peer's", "share of the matrix-product peak",
                   "seconds: ours, peer", "peak GiB: ours, peer", "GFLOP", "tokens a response: ours, peer"],
                  (compare(name, COMPARISONS[name], args.repeats, args.python, folder) for name in compared))
        if "scaling" in chosen:
            first, *others = start(sys.executable, "ours", "scaling", folder)["rows"]
            table(["PPO update", "seconds, times the first's", "FLOP, times the first's", "seconds", "GFLOP", ", ".join(first["sizes"])],
                  [[f"{row['name']} x {row['factor']}" if row["name"] else "the first", f"{row['seconds'] / first['seconds']:.2f}",
                    f"{row['flops'] / first['flops']:.2f}", f"{row['seconds']:.3g}", f"{row['flops'] / 1e9:.3g}",
                    ", ".join(map(str, row["sizes"].values()))] for row in (first, *others)])


if __name__ == "__main__":
    main()
