"""What only a GPU shows, found out in eight minutes on one: is it right there, how fast, how large?

    python bench/gpu.py                              # writes runs/gpu/report.md, step by step
    python bench/gpu.py --steps smollm2 large        # some of the steps
    python bench/gpu.py --steps real --limit 300     # one of them, with another time limit
    python bench/gpu.py --small --device cpu         # does everything run? The figures mean nothing

The steps, in the order of their worth. They share one process, since to start Python takes 15 s on
some hosts; a step that outlives its time limit ends the process, and the next begins a new one.
What a step finds it writes down at once, so that a run that is cut off is not lost:

    checks    logits and gradients beside transformers in float32 and bf16, generation beside a
              model without a cache, how often a step waits for the device, how many kernels a layer
              launches
    start     ratio and KL before the first step: float32, TF32, bf16, LoRA on a bf16 base
    smollm2   a PPO update of 64 x (64 + 128) tokens at the sizes of SmolLM2-135M: tokens per second
              of rollout and training, shares of the time, memory beside the predicted, FLOP/s; and
              TRL's update, if it is installed
    large     the same at 1.2 billion parameters in bf16, all weights and LoRA
    resume    kill -9 and --resume, twice: the same weights?
    tests     pytest of the maths, decoding and resuming
    real      bench/real_run.py with ten times the episodes, as far as the time goes; its data and
              model are fetched from the network, or lie in --real
    demo      python ppo.py: gold score, seconds. Left out unless named: its model is so small that
              a CPU is as fast

Weights are random where only time and memory are looked at. FLOP are counted as tools.budget counts
them; the share of the device's peak (MFU) is of --peak_tflops, by default that of an H100 for dense
bf16 products.
"""

import argparse
import contextlib
import csv
import gc
import glob
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, f"{ROOT}/bench", f"{ROOT}/tests"]

import data_gen  # noqa: E402
import ppo  # noqa: E402
import sft  # noqa: E402
import speed  # noqa: E402: of bench/
from lib.data import collate, left_pad  # noqa: E402
from lib.flops import update_flops  # noqa: E402
from model import (DEMO_MODEL, Llama, ScalarHead, generate, load_tokenizer,  # noqa: E402
                   random_llama, save_checkpoint, states_of, tokens_of)
from tools.budget import budget, networks, settings  # noqa: E402
from waits import waits, waits_of_steps  # noqa: E402: of tests/

LIMITS = dict(checks=45, start=30, smollm2=90, large=60, resume=110, tests=70, real=60,
              demo=240)  # seconds
SIZE_135M = dict(speed.SIZE_135M, vocab_size=49152)
SIZE_1B = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
               num_attention_heads=32, num_key_value_heads=8, head_dim=64,
               max_position_embeddings=2048, tie_word_embeddings=True)
SIZE_SMALL = dict(vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)


def synchronize(args):
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------
# The steps. tell(name, value) writes down what is found

def largest_error(ours, theirs):
    """Relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def checks(args, tell):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZE_SMALL)
    theirs = LlamaForCausalLM(config).to(args.device)
    ours = Llama(theirs.config).to(args.device)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(3, 200, (4, 50), device=args.device)
    for dtype in ("float32", "bfloat16"):
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=dtype != "float32"):
            logits = ours.lm_head(ours(ids)).float(), theirs(ids).logits.float()
        for model, out in zip((ours, theirs), logits):
            model.zero_grad()
            out.logsumexp(-1).square().mean().backward()
        gradients = zip(*(dict(model.named_parameters()).items() for model in (ours, theirs)))
        tell(f"logits beside transformers, {dtype}", largest_error(*logits))
        tell(f"gradients beside transformers, {dtype}",
             max(largest_error(a.grad, b.grad) for (_, a), (_, b) in gradients))

    prompts = [torch.randint(3, 200, (n,)).tolist() for n in (1, 9, 4, 30)]
    padded = left_pad(prompts, 0, args.device)
    out, same = generate(ours, *padded, 20, [7, 8], temperature=0), 0
    for prompt, row, mask in zip(prompts, out.tokens, out.mask):
        text = list(prompt)
        while len(text) < len(prompt) + 20 and (len(text) == len(prompt) or text[-1] not in (7, 8)):
            with torch.no_grad():
                hidden = ours(torch.tensor([text], device=args.device))
            text.append(ours.lm_head(hidden[0, -1]).argmax().item())
        same += row[mask.bool()].tolist() == text[len(prompt):]
    tell("greedy answers that equal those of a model without a cache", f"{same} of {len(prompts)}")
    generator = torch.Generator(args.device).manual_seed(0)
    out = generate(ours, *padded, 20, [7, 8], generator=generator)
    texts = [(prompt, row[mask.bool()].tolist())
             for prompt, row, mask in zip(prompts, out.tokens, out.mask)]
    input_ids, places = collate(texts, 0, args.device)
    with torch.no_grad():
        logits = ours.lm_head(states_of(ours(input_ids), places))
    trained = ppo.logprobs_from_logits(logits, tokens_of(input_ids, places))
    tell("log probabilities of sampling beside those of training, largest difference",
         (trained - out.logprobs[out.mask.bool()]).abs().max().item())
    with waits() as found:
        generate(ours, *padded, 20, [999], generator=generator)
    tell("waits for the device in 20 tokens", len(found))
    demonstrations(args)
    counts = waits_of_steps(sft, [
        "--data", f"{args.out}/demos.json", "--tokenizer", f"{args.out}/run/data/tokenizer",
        "--eval_data", "", "--epochs", "1", "--batch_size", "16", "--micro_batch_size", "4",
        "--device", args.device, "--out", f"{args.out}/sft", "--overwrite"])
    tell("waits for the device in a step of sft.py", max(counts))
    for dtype in ("float32", "bfloat16"):
        for part, number in launches_of_a_layer(args, dtype).items():
            tell(f"kernels that a layer launches, {dtype}, {part}", number)


def launches_of_a_layer(args, dtype):
    """Kernels of a forward and of a backward pass, in a model of four layers less one of two. On a
    CPU: the operators that compute something."""
    on_gpu = args.device.startswith("cuda")
    activity = torch.profiler.ProfilerActivity
    counts = []
    for layers in (4, 2):
        llama = Llama(LlamaConfig(**SIZE_SMALL | dict(num_hidden_layers=layers))).to(args.device)
        for p in llama.parameters():
            torch.nn.init.normal_(p, std=0.02)
        ids = torch.randint(3, 200, (4, 50), device=args.device)

        def forward():
            with torch.autocast(args.device.split(":")[0], torch.bfloat16,
                                enabled=dtype != "float32"):
                return llama(ids).float().square().sum()

        forward().backward()
        loss, found = None, []
        for part in ("forward", "backward"):
            with torch.profiler.profile(activities=[activity.CUDA if on_gpu else
                                                    activity.CPU]) as profiler:
                if part == "forward":
                    loss = forward()
                else:
                    loss.backward()
                synchronize(args)
            events = [event for event in profiler.events() if (  # on a GPU, no calls that launch
                event.device_type == torch.autograd.DeviceType.CUDA if on_gpu
                else not event.cpu_children)]
            found.append(len(events))
        counts.append(found)
    return {part: (four - two) / 2
            for part, four, two in zip(("forward", "backward"), *counts)}


def run_script(*argv, folder):
    """A script of the repository, in a folder of its own."""
    os.makedirs(folder, exist_ok=True)
    subprocess.run([sys.executable, f"{ROOT}/{argv[0]}", *map(str, argv[1:])], cwd=folder,
                   check=True)


def small_run(args):
    """The folder of a run that has the demo's data, and random models of its sizes for SFT and
    reward model."""
    folder = f"{args.out}/run"
    if not os.path.exists(f"{folder}/runs/rm/config.json"):
        os.makedirs(folder, exist_ok=True)
        before = os.getcwd()
        os.chdir(folder)
        data_gen.main([])
        os.chdir(before)
        tokenizer = load_tokenizer(f"{folder}/data/tokenizer")
        torch.manual_seed(0)
        size = SIZE_SMALL if args.small else DEMO_MODEL
        policy = random_llama(LlamaConfig(**size | dict(vocab_size=len(tokenizer))))
        save_checkpoint(policy, tokenizer, f"{folder}/runs/sft")
        save_checkpoint(ScalarHead(policy.model), tokenizer, f"{folder}/runs/rm")
    return folder


def demonstrations(args):
    """A cut of the demo's demonstrations."""
    with open(f"{small_run(args)}/data/actor_training_data.json", encoding="utf-8") as file:
        records = json.load(file)[:64 if args.small else 256]
    with open(f"{args.out}/demos.json", "w", encoding="utf-8") as file:
        json.dump(records, file)


def rows_of(folder):
    with open(f"{folder}/metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def demo(args, tell):
    folder, small = f"{args.out}/demo", args.small
    stages = [("data_gen.py", "data", []), ("sft.py", "sft", ["--epochs", 1] if small else []),
              ("train_rm.py", "rm", ["--epochs", 1, "--eval_data", ""] if small else []),
              ("ppo.py", "ppo", ["--updates", 2, "--eval_number", 8] if small else [])]
    if small:  # of all the data, the reward model would take minutes
        shutil.copytree(f"{small_run(args)}/data", f"{folder}/data", dirs_exist_ok=True)
        for name in ("reward_training_data", "actor_training_data"):
            with open(f"{folder}/data/{name}.json", encoding="utf-8") as file:
                records = json.load(file)[:200]
            with open(f"{folder}/data/{name}.json", "w", encoding="utf-8") as file:
                json.dump(records, file)
    for script, name, options in stages[small:]:
        started = time.time()
        more = ["--device", args.device, "--overwrite"] if name != "data" else []
        run_script(script, *more, *options, folder=folder)
        tell(f"seconds of {script}", round(time.time() - started, 1))
    rows = rows_of(f"{folder}/runs/ppo")
    tell("gold score, SFT", float(rows[0]["eval_gold"]))
    tell("gold score, PPO", float(rows[-1]["eval_gold"]))
    tell("KL, nats per response", float(rows[-1]["kl"]))


def start(args, tell):
    """One mini-batch, of one pass: every ratio is that before the first step."""
    folder, out = small_run(args), f"{args.out}/start"
    rows, new = ("16", "8") if args.small else ("64", "40")
    for name, options in {"float32": [], "TF32": ["--tf32"], "bf16": ["--dtype", "bfloat16"],
                          "LoRA, bf16 base": ["--dtype", "bfloat16", "--base_dtype", "bfloat16",
                                              "--lora_rank", "4"]}.items():
        ppo.main(["--sft", f"{folder}/runs/sft", "--rm", f"{folder}/runs/rm", "--prompts",
                  f"{folder}/data/rlhf_training_data.json", "--updates", "1", "--ppo_epochs", "1",
                  "--batch_size", rows, "--minibatch_size", rows, "--micro_batch_size", "16",
                  "--max_new_tokens", new, "--device", args.device, "--out", out, "--overwrite",
                  *options])
        row = rows_of(out)[-1]
        tell(f"largest ratio, {name}", float(row["largest_ratio"]))
        tell(f"KL, {name}", float(row["kl"]))


def clocked(args, clock, name, function):
    def wrapped(*given, **options):
        synchronize(args)
        started = time.perf_counter()
        result = function(*given, **options)
        synchronize(args)
        clock[name] = clock.get(name, 0.0) + time.perf_counter() - started
        return result
    return wrapped


def update(args, tell, size, name, *options):
    """A PPO update, the median of three after one that warms up."""
    batch, prompt, new = (8, 16, 16) if args.small else (64, 64, 128)
    config = LlamaConfig(**size)
    ppo_args = settings("ppo", [
        f"--batch_size={batch}", f"--minibatch_size={batch}", "--ppo_epochs=1",
        f"--micro_batch_size={min(16, batch)}", f"--max_prompt_length={prompt}",
        f"--max_new_tokens={new}", f"--device={args.device}", "--rm=-", "--prompts=-", *options])
    torch.manual_seed(0)
    actor, critic, ref, reward_model = (
        model.to(args.device) for model in networks("ppo", config, ppo_args, args.device))
    trained = {which: (model, torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-6, eps=1e-5, fused=True))
        for which, model in (("actor", actor), ("critic", critic))}
    prompts = torch.randint(3, config.vocab_size, (batch, prompt)).tolist()
    tokenizer = SimpleNamespace(pad_token_id=0, end_ids=[-1])  # nothing ends early
    generator = torch.Generator(args.device).manual_seed(0)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    clocks, originals = [], (ppo.answer, ppo.score_responses)
    for _ in range(1 + (1 if args.small else 3)):
        clock, rows = {}, torch.randperm(batch).tolist()
        ppo.answer = clocked(args, clock, "rollout", originals[0])
        ppo.score_responses = clocked(args, clock, "reward model", originals[1])
        synchronize(args)
        started = time.perf_counter()
        experience, _ = ppo.make_experience(actor, critic, reward_model, ref, prompts, [rows],
                                            tokenizer, ppo_args, 0.05, generator)
        synchronize(args)
        clock["experience"] = time.perf_counter() - started
        clocked(args, clock, "training", ppo.train_minibatch)(trained, experience, rows, [],
                                                              tokenizer, ppo_args)
        clock["reference and critic"] = (clock.pop("experience") - clock["rollout"]
                                         - clock["reward model"])
        clocks.append(clock)
    ppo.answer, ppo.score_responses = originals
    clock = {part: statistics.median(clock[part] for clock in clocks[1:]) for part in clocks[0]}
    seconds = sum(clock.values())
    flops = update_flops(config, [(prompt, new)] * batch, ppo_args) / seconds
    tell(f"{name}: seconds per update", seconds)
    for part, spent in clock.items():
        tell(f"{name}: share of the time, {part}", spent / seconds)
    tell(f"{name}: tokens per second, rollout (new ones)", batch * new / clock["rollout"])
    tell(f"{name}: tokens per second, training", batch * (prompt + new) / clock["training"])
    tell(f"{name}: TFLOP/s", flops / 1e12)
    tell(f"{name}: MFU", flops / 1e12 / args.peak_tflops)
    tell(f"{name}: GiB predicted", budget("ppo", config, ppo_args)["peak"] / 2**30)
    if args.device.startswith("cuda"):
        tell(f"{name}: GiB at the peak", torch.cuda.max_memory_allocated() / 2**30)


def smollm2(args, tell):
    size = SIZE_SMALL if args.small else SIZE_135M
    update(args, tell, size, "bf16", "--dtype=bfloat16")
    update(args, tell, size, "float32")
    update(args, tell, size, "float32 with TF32", "--tf32")
    torch.set_float32_matmul_precision("highest")
    try:
        import trl  # noqa: F401
    except ImportError:
        return tell("TRL", "not installed")
    folder = f"{args.out}/trl"
    os.makedirs(folder, exist_ok=True)
    work = speed.REAL | dict(kind="ppo", dtype="bfloat16", device=args.device, seed=0, updates=2,
                             batch=64, prompt=64, new=128)
    if args.small:
        work |= dict(batch=4, prompt=8, new=8)
    speed.prepare(SimpleNamespace(demo=None, model=None, tiny=args.small, data=None), {"ppo": work},
                  folder)
    tell("TRL, bf16: seconds per update", speed.peer_update(work, folder)["seconds"])


def large(args, tell):
    size = SIZE_SMALL if args.small else SIZE_1B
    with torch.device("meta"):
        tell("parameters", sum(p.numel() for p in Llama(LlamaConfig(**size)).parameters()))
    update(args, tell, size, "LoRA", "--dtype=bfloat16", "--base_dtype=bfloat16", "--lora_rank=8")
    update(args, tell, size, "all weights", "--dtype=bfloat16")


def resume(args, tell):
    """The demo's PPO, from random models."""
    folder = small_run(args)
    options = ["--sft", "runs/sft", "--rm", "runs/rm", "--prompts", "data/rlhf_training_data.json",
               "--updates", 6, "--save_every", 1, "--eval_prompts", "", "--gold", "",
               "--batch_size", 32, "--max_new_tokens", 20, "--lr", "2e-4", "--device", args.device]
    for name in ("whole", "killed"):  # of an earlier call
        shutil.rmtree(f"{folder}/runs/{name}", ignore_errors=True)
    run_script("ppo.py", *options, "--out", "runs/whole", folder=folder)
    for kill_after in (2, 4, None):
        command = [sys.executable, f"{ROOT}/ppo.py", *map(str, options), "--out", "runs/killed",
                   *(["--resume"] if kill_after != 2 else [])]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        state = f"{folder}/runs/killed/last/state.json"
        while process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                with open(state) as file:
                    if kill_after and json.load(file)["progress"]["step"] >= kill_after:
                        process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        tell(f"killed after update {kill_after}" if kill_after else "then", {
            -signal.SIGKILL: "yes", 0: "ended"}.get(process.returncode, process.returncode))
    from safetensors.torch import load_file
    whole, killed = (load_file(f"{folder}/runs/{name}/model.safetensors")
                     for name in ("whole", "killed"))
    tell("largest difference of a weight",
         max((whole[name] - killed[name]).abs().max().item() for name in whole))


def tests(args, tell):
    """Reported test by test, since there may not be time for all. (The others are for a CPU: a
    process that has seen a GPU cannot fork those that they need, and they compare bytes.)"""
    files = [f"{ROOT}/test_ppo_math.py",
             *sorted(glob.glob(f"{ROOT}/tests/test_decoding*.py")), f"{ROOT}/tests/test_kernels.py"]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *files]
    hidden = {} if args.device.startswith("cuda") else {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command + (["-k", "gae or whiten"] if args.small else []), cwd=ROOT,
                               stdout=subprocess.PIPE, text=True, env=os.environ | hidden)
    found = {"PASSED": [], "FAILED": [], "ERROR": [], "SKIPPED": []}
    for line in process.stdout:
        print(line, end="", flush=True)
        if match := re.match(r"(.+::.+) (PASSED|FAILED|ERROR|SKIPPED)", line):
            name, outcome = match.groups()
            found[outcome].append(name)
            tell(f"tests {outcome.lower()}", len(found[outcome]))
            tell("which failed", ", ".join(found["FAILED"] + found["ERROR"]) or "none")
    if process.wait() not in (0, 1):  # 1: some failed, which the report says
        raise SystemExit(process.returncode)


def real(args, tell):
    folder = args.real or f"{args.out}/real"
    command = [sys.executable, f"{ROOT}/bench/real_run.py", "--out", folder, "--seeds", "0",
               "--device", args.device, "--episodes", "40320"]
    process = subprocess.Popen([*command, "--small"] if args.small else command)
    while process.poll() is None:
        time.sleep(1)
        with contextlib.suppress(OSError, IndexError):
            judged = [row for row in rows_of(f"{folder}/ppo-0") if row["eval_gold"]]
            tell("gold score of greedy answers", [float(row["eval_gold"]) for row in judged])
            tell("after updates", [int(row["update"]) for row in judged])
    if process.returncode:
        raise SystemExit(process.returncode)


# ------------------------------------------------------------------------------------------------
# The run

def work(args):
    """The steps, one after the other, in this process. {step}.json: what a step finds, and how it
    ended."""
    for step in args.worker:
        path, found = f"{args.out}/{step}.json", {}

        def tell(name, value):
            found[name] = value
            write(path, dict(found=found))
            if step not in ("tests", "real"):  # these report the same names again and again
                print(f"{step}: {name}: {value}", flush=True)

        write(path, dict(found={}))
        try:
            globals()[step](args, tell)
            ended = "done"
        except (Exception, SystemExit):  # a stage ends the program with one line
            traceback.print_exc()
            ended = "failed, see the .log files"
        write(path, dict(found=found, ended=ended))
        gc.collect()
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()


def write(path, value):
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(path + ".part", path)


def read(args, step):
    with contextlib.suppress(OSError):
        with open(f"{args.out}/{step}.json", encoding="utf-8") as file:
            return json.load(file)


def run_steps(args, steps, how):
    """Start a process that works these off, watch it, and note in `how` how each step ended -> the
    steps that are left, if one had to be ended with the process."""
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--worker", *steps]
    with open(f"{args.out}/{steps[0]}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)
    for number, step in enumerate(steps):
        started = time.time()
        limit = (args.limit or LIMITS[step]) + (30 if number == 0 else 0)  # to start Python
        while process.poll() is None and time.time() - started < limit:
            if "ended" in (read(args, step) or {}):
                break
            time.sleep(0.05)
        ended = (read(args, step) or {}).get("ended")
        how[step] = (f"{ended or ('cut off' if process.poll() is None else 'failed')}, "
                     f"{time.time() - started:.0f} s")
        print(f"{step}: {how[step]}", flush=True)
        write_report(args, how)
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return steps[number + 1:]
    process.wait()
    return []


def shown(value):
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.2e}" if abs(value) < 1e-3 else f"{value:,.4g}"
    return str(value)


def write_report(args, how):
    """report.md and report.json of what is there so far. `how`: {step: how it ended}."""
    device = (torch.cuda.get_device_name() if args.device.startswith("cuda") else
              f"a CPU, {os.cpu_count()} cores")
    lines = ["# What a GPU shows" if args.device.startswith("cuda") else "# Not a GPU", "",
             f"`python bench/gpu.py`, {device}, torch {torch.__version__}, "
             f"{time.strftime('%Y-%m-%d')}"]
    everything = {}
    for step, ended in how.items():
        found = (read(args, step) or {}).get("found", {})
        everything[step] = dict(ended=ended, found=found)
        lines += ["", f"## {step}: {ended}", "", "| | |", "| --- | --- |"]
        lines += [f"| {name} | {shown(value)} |" for name, value in found.items()]
    with open(f"{args.out}/report.md", "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    with open(f"{args.out}/report.json", "w", encoding="utf-8") as file:
        json.dump(everything, file, indent=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=LIMITS,
                        default=[step for step in LIMITS if step != "demo"])
    parser.add_argument("--limit", type=float, help="seconds for each step, in place of its own")
    parser.add_argument("--out", default="runs/gpu", help="where everything goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--real", help="a folder in which real_run.py --steps data has been run")
    parser.add_argument("--peak_tflops", type=float, default=989, help="of the device, in bf16")
    parser.add_argument("--small", action="store_true", help="does everything run?")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = os.path.abspath(args.out)
    os.makedirs(args.out, exist_ok=True)
    if args.worker:
        return work(args)
    for step in args.steps:
        with contextlib.suppress(OSError):
            os.remove(f"{args.out}/{step}.json")
    how, left = {}, args.steps
    while left:
        left = run_steps(args, left, how)
    print(f"{args.out}/report.md")
    raise SystemExit(any("failed" in ended for ended in how.values()))


if __name__ == "__main__":
    main()
