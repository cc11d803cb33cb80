"""Speed and memory of this repo beside those of what a user would pick instead, on this machine.

    pip install -r requirements.txt -r bench/requirements.txt
    python bench/speed.py                                   # all of it: hours on a small machine
    python bench/speed.py --only ppo_float32 generate_demo  # some comparisons (--help names all)
    python bench/speed.py --against ../before               # beside another checkout of this repo
    python bench/speed.py --only scaling                    # how the cost of a PPO update grows
    python bench/speed.py --profile                         # where the time of an update goes
    python bench/speed.py --model SmolLM2-135M.gguf         # a real LLaMA; else random weights
    python bench/speed.py --tiny                            # does everything run?

Generation is compared with `LlamaForCausalLM.generate`, the stages with TRL's PPOTrainer,
SFTTrainer and RewardTrainer: same weights, token sequences, precision, batch and optimizer steps.
Neither side is tuned beyond its defaults but for the sizes at the top of this file. Our SFT and RM
batches hold records of similar length, as sft.py and train_rm.py make them; TRL's are shuffled, as
its trainers make them. `--against` puts another checkout in place of these peers.

Each side is a process of its own, since its peak memory is compared: ours, peer, peer, ours, ... A
ratio is that of two neighbours; the table has the median over the pairs, with the smallest and the
largest. In each process two updates (or generations) warm up, since its memory still grows in the
second, and the median of the others counts. An epoch of SFT or RM counts whole.

"Realistic": prompts from 4 tokens to the longest, 0.4 of it on average; and on both sides the same
hook makes the end of sequence likelier, so that responses have about a third of the longest on
average. Else nothing ends early.
"""

import argparse
import importlib
import inspect
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import torch
from transformers import LlamaConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

WARM_UP = 2  # updates, or generations
LR = "1e-6"  # of every optimizer here: it changes no time
# `micro`: rows of our micro-batches, by default or more; TRL's are its whole mini-batches
REAL = dict(model="real", batch=16, micro=4, prompt=64, new=48)
DEMO = dict(kind="generate", model="demo", batch=64, prompt=24, new=40, times=5)  # times --updates
COMPARISONS = {
    "generate_demo": dict(DEMO),
    "generate_demo_realistic": dict(DEMO, realistic=True),
    "generate_real": dict(REAL, kind="generate"),
    "generate_real_realistic": dict(REAL, kind="generate", realistic=True),
    "ppo_float32": dict(REAL, kind="ppo"),
    "ppo_float32_realistic": dict(REAL, kind="ppo", realistic=True),
    "ppo_bf16": dict(REAL, kind="ppo", dtype="bfloat16"),
    "sft": dict(kind="sft", model="real", batch=8, micro=4, records=64, max_length=512),
    "rm": dict(kind="rm", model="real", batch=8, micro=4, records=64, max_length=512),
}
# the update from which --only scaling begins, and its model
SCALING = dict(batch=8, prompt=64, new=32, layers=4)
SIZE_SCALING = dict(vocab_size=4096, hidden_size=256, intermediate_size=768, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True)
SIZE_135M = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                 num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
                 tie_word_embeddings=True)
# what --tiny puts in the place of these sizes
TINY = dict(batch=4, prompt=12, new=6, records=8, max_length=64, layers=1)
SIZE_TINY = dict(SIZE_135M, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=3, num_key_value_heads=1)


def write(path, data):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file)


def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


# ------------------------------------------------------------------------------------------------
# What both sides get

WORDS = ("the of and to in is for on that with as by at from it an be are this was or which can "
         "one have not more has but their all some other time when how we may use new first people "
         "would about into than also work make data").split()


def word_tokenizer(size):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    words += [f"w{i}" for i in range(size - len(words))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>", pad_token="<pad>")


def random_prompts(work, vocabulary):
    """`batch` prompts of random tokens, the same on both sides and in every update."""
    generator = torch.Generator().manual_seed(0)
    lengths = [work["prompt"]] * work["batch"]
    if work.get("realistic"):
        share = torch.rand(work["batch"], generator=generator) ** 1.8
        lengths = [work["prompt"], *(4 + (work["prompt"] - 4) * share[1:]).long().tolist()]
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def synthetic_records(number):
    """Demonstrations and scored pairs of plain words, about one token each. The lengths are spread
    as Alpaca's: a completion has 60 words in the median, 13 to 280 in nineteen of twenty, 400 at
    most; a prompt 20 in the median."""
    rng = random.Random(0)

    def text(median, spread, most):
        words = max(1, round(rng.lognormvariate(math.log(median), spread)))
        return " ".join(rng.choices(WORDS, k=min(most, words)))

    demonstrations = [dict(user_input=text(20, 0.5, 80), completion=text(60, 0.8, 400))
                      for _ in range(number)]
    pairs = []
    for _ in range(number):
        prompt = text(20, 0.5, 80)
        pairs += [dict(user_input=prompt, completion=text(60, 0.8, 400), score=score)
                  for score in (1.0, 0.0)]
    return demonstrations, pairs


def prepare(args, works, folder):
    """Write the models that `works` need as Hugging Face directories, their prompts, and the data:
    as records for us, as tokens for TRL."""
    from lib.data import encode_records, read_records
    from model import load_llama, load_tokenizer, random_llama, save_checkpoint
    torch.manual_seed(0)
    sizes = {"demo": (args.demo, 1536, None),  # the vocabulary of the built-in data
             "real": (args.model, *((512, SIZE_TINY) if args.tiny else (49152, SIZE_135M)))}
    for name in {work["model"] for work in works.values()}:
        path, words, size = sizes[name]
        if not path:
            word_tokenizer(words).save_pretrained(f"{folder}/{name}")
        tokenizer = load_tokenizer(path or f"{folder}/{name}")
        if path or not size:
            llama = load_llama(path, tokenizer)
        else:
            llama = random_llama(LlamaConfig(vocab_size=len(tokenizer), **size))
        save_checkpoint(llama, tokenizer, f"{folder}/{name}")
        for work in works.values():
            if work["model"] == name and "prompt" in work:
                work["prompts"] = random_prompts(work, llama.config.vocab_size)
    for kind in works.keys() & {"sft", "rm"}:
        work, tokenizer = works[kind], load_tokenizer(f"{folder}/real")
        number, max_length = work["records"], work["max_length"]
        demonstrations, scored = synthetic_records(number)
        if args.data:
            demonstrations = read_records(f"{args.data}/actor_training_data.json", "user_input",
                                          "completion")
            scored = read_records(f"{args.data}/reward_training_data.json", "user_input",
                                  "completion", "score")
        # only what fits is written, so that both sides train on all of it
        examples = encode_records(demonstrations, tokenizer, max_length, "sft")[:number]
        write(f"{folder}/sft.json", [demonstrations[n - 1] for *_, n in examples])
        work["tokens"] = [(prompt, completion) for prompt, completion, _ in examples]
        if kind == "rm":
            groups = {}
            for prompt, completion, n in encode_records(scored, tokenizer, max_length, "rm"):
                record = scored[n - 1]
                groups.setdefault(json.dumps(record["user_input"]), []).append(
                    (record["score"], n, prompt + completion))
            pairs = [(max(group), min(group)) for group in groups.values()]
            pairs = [(best, worst) for best, worst in pairs if best[0] > worst[0]][:number]
            write(f"{folder}/rm.json", [scored[n - 1] for pair in pairs for _, n, _ in pair])
            work["tokens"] = [(best[2], worst[2]) for best, worst in pairs]
        if len(work["tokens"]) < number:
            print(f"{kind}: only {len(work['tokens'])} of {number} records", file=sys.stderr)


def left_pad(prompts, pad_token_id):
    longest = max(map(len, prompts))
    return (torch.tensor([[pad_token_id] * (longest - len(p)) + p for p in prompts]),
            torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]))


def make_end_likelier(work, eos_token_id, *models):
    """At realistic lengths the end of sequence has from now on about these log odds against all
    other tokens, whatever came before -> its id; else -1, which no model samples."""
    def hook(module, inputs, logits, log_odds=-2.8):
        logits = logits.clone()
        logits[..., eos_token_id] = torch.logsumexp(logits.detach(), -1) + log_odds
        return logits

    if not work.get("realistic"):
        return -1
    for model in models:
        model.lm_head.register_forward_hook(hook)
    return eos_token_id


def with_prompts(work, tokens, eos_token_id):
    """[(tokens of the prompt, of the response)]; a row of `tokens` (B, N) counts up to and
    including its first end of sequence."""
    ends = (tokens == eos_token_id).int()
    written = (ends.cumsum(1) - ends == 0).sum(1).tolist()
    return list(zip(map(len, work["prompts"]), written))


def timed(step, updates):
    """Run `step` WARM_UP times, then `updates` times -> the median of the seconds of each of these,
    and what each returned."""
    for _ in range(WARM_UP):
        step()
    seconds, results = [], []
    for _ in range(updates):
        started = time.perf_counter()
        results.append(step())
        seconds.append(time.perf_counter() - started)
    return dict(seconds=statistics.median(seconds), texts=results)


# ------------------------------------------------------------------------------------------------
# Ours: this checkout, or that of --against, which may be of the time before lib/, when model.py
# held everything

def our_generation(work, folder):
    """A function that answers the prompts once."""
    from model import generate, load_llama, load_tokenizer
    tokenizer = load_tokenizer(f"{folder}/{work['model']}")
    llama = load_llama(f"{folder}/{work['model']}", tokenizer)
    eos, generator = make_end_likelier(work, tokenizer.eos_token_id, llama), torch.Generator()
    generator.manual_seed(work["seed"])
    inputs = left_pad(work["prompts"], tokenizer.pad_token_id)

    def step():
        out = generate(llama, *inputs, work["new"], eos, generator=generator)
        return list(zip(map(len, work["prompts"]), out.mask.sum(1).int().tolist()))
    return step


def our_update(work, folder):
    """A function that does one PPO update, of one epoch and one mini-batch."""
    from model import ScalarHead, load_llama, load_tokenizer
    path = f"{folder}/{work['model']}"
    tokenizer = load_tokenizer(path)
    actor, critic, ref, reward_model = (load_llama(path, tokenizer) for _ in range(4))
    eos = make_end_likelier(work, tokenizer.eos_token_id, actor, ref)
    return ppo_step(work, actor, ScalarHead(critic.model), ref, ScalarHead(reward_model.model),
                    tokenizer.pad_token_id, eos)


def ppo_step(work, actor, critic, ref, reward_model, pad_token_id, eos):
    import ppo
    options = dict(sft="-", rm="-", prompts="-", device="cpu", dtype=work.get("dtype", "float32"),
                   batch_size=work["batch"], minibatch_size=work["batch"], ppo_epochs=1,
                   micro_batch_size=work["micro"], max_prompt_length=work["prompt"],
                   max_new_tokens=work["new"], lr=LR, critic_lr=LR)
    options = [f"--{name}={value}" for name, value in options.items()]
    has_lib = hasattr(ppo, "SETTINGS")
    if has_lib:
        try:
            from lib.settings import parse
        except ImportError:  # it is older
            from lib.run import parse
        args, _ = parse("ppo.py", ppo.__doc__, ppo.SETTINGS, options, real_if=["sft", "rm"])
    else:
        args, _ = ppo.parse(options)
    ref.requires_grad_(False)
    reward_model.requires_grad_(False)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0,
                                    fused=True) for model in (actor, critic)]
    generator = torch.Generator().manual_seed(work.get("seed", 0))
    tokenizer = SimpleNamespace(pad_token_id=pad_token_id, eos_token_id=eos, end_ids=[eos])

    def step():
        order = torch.randperm(work["batch"]).tolist()
        minibatches = [[order]] if has_lib else []
        experience, _ = ppo.make_experience(
            actor, critic, reward_model, ref, work["prompts"], *minibatches, tokenizer, args,
            args.kl_coef, generator)
        trained = [actor, critic, *optimizers]
        if "trained" in inspect.signature(ppo.train_minibatch).parameters:  # else it is older
            trained = [dict(actor=(actor, optimizers[0]), critic=(critic, optimizers[1]))]
        ppo.train_minibatch(*trained, experience, order, [], tokenizer, args)
        return list(zip(map(len, work["prompts"]), experience["mask"].sum(1).int().tolist()))
    return step


def ours(work, folder):
    make = our_generation if work["kind"] == "generate" else our_update
    return timed(make(work, folder), work["updates"])


def our_epoch(work, folder):
    """The stage's own main, timed from the opening of metrics.csv, when all is loaded, to its last
    row."""
    import sft
    import train_rm
    kind, times = work["kind"], []
    stage = sft if kind == "sft" else train_rm

    def clocked(method):
        def wrapped(*args, **options):
            result = method(*args, **options)
            times.append(time.perf_counter())
            return result
        return wrapped

    if hasattr(stage, "Run"):
        recorder, opening = stage.Run, "begin"
    else:
        recorder, opening = stage.Metrics, "__init__"
    for name in (opening, "log"):
        setattr(recorder, name, clocked(getattr(recorder, name)))
    options = dict(model=f"{folder}/real", data=f"{folder}/{kind}.json", out=f"{folder}/out",
                   epochs=1, batch_size=work["batch"], micro_batch_size=work["micro"],
                   max_length=work["max_length"], lr=LR, device="cpu")
    if kind == "rm":
        options |= dict(demonstrations=f"{folder}/sft.json")
    stage.main(["--overwrite", *(f"--{name}={value}" for name, value in options.items())])
    return dict(seconds=times[-1] - times[0])


def profile(work, folder):
    """The operators that take the most time in an update, or a generation."""
    step = (our_generation if work["kind"] == "generate" else our_update)(work, folder)
    for _ in range(WARM_UP):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    return dict(table=profiler.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


def scaling(work, folder):
    """Seconds and FLOP of our PPO update when one of its sizes is doubled, and doubled again."""
    from model import Llama, LlamaBackbone, ScalarHead
    from lib.flops import update_flops
    from tools.budget import settings
    rows, first = [], work["first"]
    for name, factor in [("", 1), *itertools.product(first, (2, 4))]:
        sizes = first | ({name: first[name] * factor} if name else {})
        config = LlamaConfig(num_hidden_layers=sizes["layers"], **SIZE_SCALING)
        torch.manual_seed(0)
        llamas = [Llama(config), ScalarHead(LlamaBackbone(config)), Llama(config),
                  ScalarHead(LlamaBackbone(config))]
        part = sizes | dict(micro=4, prompts=random_prompts(sizes, config.vocab_size))
        result = timed(ppo_step(part, *llamas, 0, -1), work["updates"])
        flops = update_flops(config, result["texts"][0], settings("ppo", ["--ppo_epochs=1"]))
        rows.append(dict(name=name, factor=factor, seconds=result["seconds"], flops=flops,
                         sizes=sizes))
    return dict(rows=rows)


def matrix_product(work, folder):
    """FLOP/s of a product of two square matrices, the fastest of several sizes."""
    def fastest(n):
        a, b = torch.randn(2, n, n).to(getattr(torch, work.get("dtype", "float32")))
        return 2 * n ** 3 / timed(lambda: (a @ b)[0, 0].item(), 5)["seconds"]

    return dict(flops_per_s=max(map(fastest, (256, 512) if work["tiny"] else (1024, 2048, 3072))))


# ------------------------------------------------------------------------------------------------
# The peers

def peer_generation(work, folder):
    from transformers import AutoTokenizer, LlamaForCausalLM
    path = f"{folder}/{work['model']}"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    eos = make_end_likelier(work, tokenizer.eos_token_id, model)
    model.generation_config.eos_token_id = None if eos == -1 else eos
    input_ids, mask = left_pad(work["prompts"], tokenizer.pad_token_id)
    torch.manual_seed(work["seed"])

    def step():
        out = model.generate(input_ids, attention_mask=mask, max_new_tokens=work["new"],
                             do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                             pad_token_id=tokenizer.pad_token_id)
        return with_prompts(work, out[:, input_ids.shape[1]:], eos)
    return timed(step, work["updates"])


def peer_models(path, pad_token_id, number):
    """`number` language models, and as many with a scalar head."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    options = dict(dtype=torch.float32)
    scalar = [AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **options)
              for _ in range(number)]
    for model in scalar:
        model.config.pad_token_id = pad_token_id
    return [AutoModelForCausalLM.from_pretrained(path, **options) for _ in range(number)], scalar


def peer_update(work, folder):
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    path, batch = f"{folder}/{work['model']}", work["batch"]
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    (policy, ref), (value, reward) = peer_models(path, tokenizer.pad_token_id, 2)
    eos = make_end_likelier(work, tokenizer.eos_token_id, policy, ref)
    prompts = Dataset.from_list([{"input_ids": p} for p in work["prompts"]])  # of each update
    config = PPOConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=batch, num_mini_batches=1,
        gradient_accumulation_steps=1, num_ppo_epochs=1, response_length=work["new"],
        total_episodes=batch * (WARM_UP + work["updates"]), temperature=1.0,
        stop_token=None if eos == -1 else "eos", local_rollout_forward_batch_size=batch,
        num_sample_generations=0, save_strategy="no", report_to="none",
        use_cpu=work.get("device", "cpu") == "cpu", learning_rate=float(LR), bf16="dtype" in work,
        logging_steps=1, disable_tqdm=True, seed=work["seed"])
    times, texts, generate = [], [], policy.generate

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **options):
            times.append(time.perf_counter())

    def counted(*args, **options):
        out = generate(*args, **options)
        tokens = out.sequences[:, options["input_ids"].shape[1]:]
        texts.append(with_prompts(work, tokens, eos))
        return out

    policy.generate = counted
    PPOTrainer(args=config, processing_class=tokenizer, model=policy, ref_model=ref,
               reward_model=reward, value_model=value, train_dataset=prompts, eval_dataset=prompts,
               callbacks=[Clock()]).train()
    # the first update ends at times[0]
    seconds = [after - before for before, after in zip(times, times[1:])][WARM_UP - 1:]
    return dict(seconds=statistics.median(seconds), texts=texts[WARM_UP:])


def peer_epoch(work, folder):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
    path, kind = f"{folder}/real", work["kind"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    (language,), (scalar,) = peer_models(path, tokenizer.pad_token_id, 1)
    if kind == "sft":
        model, trainer, config = language, SFTTrainer, SFTConfig
        data = [{"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
                for prompt, completion in work["tokens"]]
    else:
        model, trainer, config = scalar, RewardTrainer, RewardConfig
        data = [{"chosen_ids": best, "rejected_ids": worst} for best, worst in work["tokens"]]
    del language, scalar
    options = config(output_dir=f"{folder}/trl", per_device_train_batch_size=work["batch"],
                     gradient_accumulation_steps=1, num_train_epochs=1, bf16=False, fp16=False,
                     max_length=work["max_length"], learning_rate=float(LR), use_cpu=True,
                     save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1000,
                     gradient_checkpointing=False)
    trainer = trainer(model=model, args=options, train_dataset=Dataset.from_list(data),
                      processing_class=tokenizer)
    if len(trainer.train_dataset) != len(data):
        raise RuntimeError(f"TRL dropped {len(data) - len(trainer.train_dataset)} records")
    started = time.perf_counter()
    trainer.train()
    return dict(seconds=time.perf_counter() - started)


OURS = {"generate": ours, "ppo": ours, "sft": our_epoch, "rm": our_epoch, "profile": profile,
        "scaling": scaling, "product": matrix_product}
PEERS = {"generate": peer_generation, "ppo": peer_update, "sft": peer_epoch, "rm": peer_epoch}


def worker(side, kind, folder):
    """One process: measure one side ("peer", or the folder of a checkout) of a comparison."""
    if side != "peer":
        sys.path.insert(0, side)
        # lib/cpu.py in earlier checkouts; before those, importing model did it
        for room in ("kernels", "cpu"):
            if os.path.isfile(f"{side}/lib/{room}.py"):
                importlib.import_module(f"lib.{room}").keep_freed_memory()
    result = (PEERS if side == "peer" else OURS)[kind](read(f"{folder}/work.json"), folder)
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    write(f"{folder}/result.json", result | dict(
        gib=peak / 2**20, threads=torch.get_num_threads(), torch=torch.__version__))


# ------------------------------------------------------------------------------------------------
# The run

def fail(message, code=2):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def start(python, side, work, folder, kind=None):
    """Run one worker -> its result."""
    write(f"{folder}/work.json", work)
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                       TRL_EXPERIMENTAL_SILENCE="1")
    command = [python, os.path.abspath(__file__), "--worker", side, kind or work["kind"], folder]
    done = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
        fail(f"{side}, {kind or work['kind']}: the process ended with code {done.returncode}; its "
             "last output stands above", 1)
    return read(f"{folder}/result.json")


def flops_of(work, result, folder):
    """FLOP that the matrix products of an update, a generation or an epoch need. Only real tokens
    count: padding is work that a side does, not work that is needed."""
    from lib.flops import generation_flops, training_flops, update_flops
    from tools.budget import settings
    config = LlamaConfig.from_pretrained(f"{folder}/{work['model']}")
    args = settings("ppo", ["--ppo_epochs=1", f"--dtype={work.get('dtype', 'float32')}"])
    if work["kind"] == "generate":
        return statistics.median(generation_flops(config, texts) for texts in result["texts"])
    if work["kind"] == "ppo":
        return statistics.median(update_flops(config, texts, args) for texts in result["texts"])
    if work["kind"] == "sft":
        return training_flops(config, [len(prompt + rest) for prompt, rest in work["tokens"]],
                              sum(len(completion) for _, completion in work["tokens"]), args)
    return training_flops(config, [len(text) for pair in work["tokens"] for text in pair], 0, args)


def spread(values, digits=2):
    """Median (smallest..largest)."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def compare(name, work, args, folder):
    """Ours, peer, peer, ours, ours, peer, ... -> a row of the table. Whoever comes first is up to a
    seventh slower where memory that was never used must first be had from the system."""
    pairs, shares, flops = [], [], []
    for seed in range(1, args.repeats + 1):  # at realistic lengths the seed draws the responses
        work["seed"] = seed
        product = start(sys.executable, ROOT, work, folder, "product")["flops_per_s"]
        sides = dict(ours=(sys.executable, ROOT), peer=(args.python, args.against or "peer"))
        found = {side: start(*sides[side], work, folder)
                 for side in sorted(sides, reverse=seed % 2 == 0)}
        ours, peer = found["ours"], found["peer"]
        if different := [key for key in ("threads", "torch") if ours[key] != peer[key]]:
            print(f"warning: ours and peer differ in {different}", file=sys.stderr)
        pairs.append((ours, peer))
        flops.append(flops_of(work, ours, folder))
        shares.append(100 * flops[-1] / ours["seconds"] / product)
        print(f"{name} {seed}/{args.repeats}: s {ours['seconds']:.3g}, {peer['seconds']:.3g}; "
              f"GiB {ours['gib']:.2f}, {peer['gib']:.2f}; {shares[-1]:.0f} % of "
              f"{product / 1e9:.1f} GFLOP/s", file=sys.stderr, flush=True)

    def both(of, digits):
        return ", ".join(f"{statistics.median(map(of, side)):{digits}}" for side in zip(*pairs))

    def response(result):
        return statistics.mean(response for texts in result["texts"] for _, response in texts)

    return [name, spread([peer["seconds"] / ours["seconds"] for ours, peer in pairs]),
            spread([100 * ours["gib"] / peer["gib"] for ours, peer in pairs], 0) + " %",
            spread(shares, 0) + " %", both(lambda result: result["seconds"], ".3g"),
            both(lambda result: result["gib"], ".2f"), f"{statistics.median(flops) / 1e9:.3g}",
            both(response, ".1f") if "texts" in pairs[0][0] else ""]


def table(head, rows):
    """Print a Markdown table, each row as soon as `rows` yields it."""
    for row in itertools.chain((head, ["---"] * len(head)), rows):
        print("| " + " | ".join(row) + " |", flush=True)
    print()


def machine():
    """The processor's name."""
    with open("/proc/cpuinfo") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")),
                    "unknown processor")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[*COMPARISONS, "scaling"],
                        help=f"of {', '.join(COMPARISONS)}, scaling (default: all)")
    parser.add_argument("--model", help="a real LLaMA: what the stages take as --model (default: "
                        "random weights of the size of SmolLM2-135M)")
    parser.add_argument("--demo", help="the demo's model, such as runs/ppo (default: random)")
    parser.add_argument("--data", help="folder with actor_training_data.json and "
                        "reward_training_data.json (default: synthetic texts)")
    parser.add_argument("--against", help="another checkout of this repo, to be the peer")
    parser.add_argument("--python", default=sys.executable, help="the Python of the peer's "
                        "processes, which has TRL (default: this one)")
    parser.add_argument("--repeats", type=int, default=4, help="pairs of processes per comparison")
    parser.add_argument("--updates", type=int, default=2, help="measured updates, or generations, "
                        "in each process, after two to warm up")
    parser.add_argument("--profile", action="store_true", help="only profile our PPO updates and "
                        "generations named by --only (default: ppo_float32)")
    parser.add_argument("--tiny", action="store_true", help="small sizes: the figures mean nothing")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)
    sys.path.insert(0, ROOT)
    if min(args.repeats, args.updates) < 1:
        fail("--repeats and --updates must be at least 1")
    for name in ("model", "demo", "data", "against"):  # the workers run in another folder
        if path := getattr(args, name):
            setattr(args, name, os.path.abspath(path) if os.path.exists(path) else path)
    if os.path.dirname(args.python):
        args.python = os.path.abspath(args.python)
    if args.against and not os.path.exists(f"{args.against}/ppo.py"):
        fail(f"--against {args.against}: not a checkout of this repo (no ppo.py)")
    chosen = args.only or (["ppo_float32"] if args.profile else [*COMPARISONS, "scaling"])
    works = {name: dict(COMPARISONS[name]) for name in chosen if name in COMPARISONS}
    if args.profile and any(work["kind"] in ("sft", "rm") for work in works.values()):
        fail("--profile needs names of PPO updates or generations in --only, such as ppo_bf16")
    with_trl = any(work["kind"] != "generate" for work in works.values())
    if with_trl and not (args.profile or args.against) and subprocess.run(
            [args.python, "-c", "import trl.experimental.ppo"], capture_output=True).returncode:
        fail(f"{args.python} has no trl 1.12.0: pip install -r bench/requirements.txt, or name "
             "another --python")
    for work in works.values():
        work |= dict(updates=args.updates * work.get("times", 1), tiny=args.tiny, seed=0)
        work |= {key: n for key, n in TINY.items() if args.tiny and key in work}

    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        prepare(args, works, folder)
        print(f"{machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; model: "
              f"{args.model or 'random weights'}; peer: {args.against or 'TRL, transformers'}; "
              f"{args.repeats} pairs of processes, {args.updates} updates each after two to warm up"
              + "; TINY SIZES: the figures mean nothing" * args.tiny + "\n", flush=True)
        if args.profile:
            for name, work in works.items():
                print(f"{name}\n{start(sys.executable, ROOT, work, folder, 'profile')['table']}")
            return
        if works:
            table(["measure", "speed, times the peer's", "peak memory, of the peer's",
                   "share of the matrix-product peak", "seconds: ours, peer",
                   "peak GiB: ours, peer", "GFLOP", "tokens per response: ours, peer"],
                  (compare(name, work, args, folder) for name, work in works.items()))
        if "scaling" in chosen:
            work = dict(kind="scaling", updates=args.updates,
                        first=SCALING | {key: TINY[key] for key in SCALING if args.tiny})
            first, *others = start(sys.executable, ROOT, work, folder)["rows"]
            table(["PPO update", "seconds, times the first's", "FLOP, times the first's",
                   "seconds", "GFLOP", ", ".join(first["sizes"])],
                  ([f"{row['name']} x {row['factor']}" if row["name"] else "the first",
                    f"{row['seconds'] / first['seconds']:.2f}",
                    f"{row['flops'] / first['flops']:.2f}", f"{row['seconds']:.3g}",
                    f"{row['flops'] / 1e9:.3g}", ", ".join(map(str, row["sizes"].values()))]
                   for row in (first, *others)))


if __name__ == "__main__":
    main()
