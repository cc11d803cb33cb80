"""How much memory a run needs: the table of the README, and its check against measured peaks.

    python bench/budget.py            # the table: LLaMA of 1B to 70B on 1, 8 and 64 processes, full and LoRA
    python bench/budget.py --check    # random LLaMAs that fit here: two steps of each stage, peak memory beside the prediction

A measured peak is that of a process of its own (VmHWM of Linux) less what it had after its imports. Two steps, since only
the second has Adam's state beside gradients and activations; two micro-batches each, as with the stages' defaults. Each is
measured twice: with the system's allocator, which gives freed memory back, so that the peak is what was in use at one time;
and as the stages run on CPU, where model.py keeps freed memory, which is faster, and leaves holes.
"""

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

LLAMA2 = dict(vocab_size=32000, max_position_embeddings=4096)
SIZES = {  # Meta's: LLaMA 3.2 1B; LLaMA 2 7B, 13B and 70B
    "1B": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=True),
    "7B": dict(LLAMA2, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13B": dict(LLAMA2, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    "70B": dict(LLAMA2, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8),
}
CHECKED = {  # name: model, rows of a micro-batch, tokens of a row; a third of them is the response
    "21M": (dict(vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=10, num_attention_heads=6,
                 num_key_value_heads=2, max_position_embeddings=512), 8, 192),
    "49M": (dict(vocab_size=16384, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
                 num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True), 4, 192),
    "135M": (dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                  num_key_value_heads=3, max_position_embeddings=512, tie_word_embeddings=True), 2, 192),
}


def settings_of(stage, *options):
    """The settings that a stage has for a model of one's own, with these options."""
    import ppo
    import sft
    import train_rm
    with contextlib.redirect_stdout(None):
        if stage == "ppo":
            return ppo.parse(["--sft", "x", "--prompts", "x", *options])[0]
        return {"sft": sft, "rm": train_rm}[stage].parse(["--model", "x", "--dry_run", *options])


def table():
    from transformers import LlamaConfig

    import model
    settings = {(rank, n): settings_of("ppo", f"--lora_rank={rank}", f"--processes={n}") for rank in (0, 8) for n in (1, 8, 64)}
    columns = [f"{n} process{'es' * (n > 1)}{kind}" for kind in ("", ", LoRA") for n in (1, 8, 64)]
    print(f"| GiB per process | {' | '.join(columns)} | FLOP per update |")
    print("| --- " * 8 + "|")
    for name, size in SIZES.items():
        config = LlamaConfig(**size)
        budgets = [model.budget("ppo", config, args) for args in settings.values()]
        print(f"| {name} | " + " | ".join(f"{b['peak'] / 2**30:,.0f}" for b in budgets) + f" | {budgets[0]['flops']:.1e} |")


def options_of(stage, rows, length):
    new = length // 3
    if stage == "ppo":
        return [f"--{k}={v}" for k, v in dict(batch_size=2 * rows, minibatch_size=2 * rows, micro_batch_size=rows, ppo_epochs=1,
                                              max_prompt_length=length - new, max_new_tokens=new).items()]
    prompts = rows // 4 or 1 if stage == "rm" else rows
    return [f"--{k}={v}" for k, v in dict(batch_size=2 * prompts, micro_batch_size=prompts, max_length=length).items()]


def memory(field):
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


def measure(stage, name, allocator):
    """Two optimizer steps (ppo: updates) with random weights, in this process -> one line of JSON."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import model
    import ppo
    import sft
    import train_rm
    if allocator == "system":
        libc = ctypes.CDLL(None)
        for option, value in ((model.M_MMAP_MAX, 65536), (-3, 128 * 1024), (model.M_TRIM_THRESHOLD, 128 * 1024)):  # -3: M_MMAP_THRESHOLD
            libc.mallopt(option, value)
    size, rows, length = CHECKED[name]
    config, args = LlamaConfig(**size), settings_of(stage, *options_of(stage, rows, length))
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=-1)  # so that no response ends early
    torch.manual_seed(0)
    torch.randn(64, 64).requires_grad_().square().sum().backward()  # the threads and libraries of a backward pass
    before = memory("VmRSS")

    def text(n):
        return torch.randint(1, config.vocab_size, (n,)).tolist()

    def step(network, optimizer):
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def new(scalar):
        llama = model.with_linear(LlamaForCausalLM(config).eval())
        return model.ScalarHead(llama.model) if scalar else llama

    if stage == "ppo":
        actor, critic, ref, reward_model = new(False), new(True), new(False).requires_grad_(False), new(True).requires_grad_(False)
        optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True) for network in (actor, critic)]
        for _ in range(2):
            prompts = [text(args.max_prompt_length) for _ in range(args.batch_size)]
            experience, _ = ppo.make_experience(actor, critic, reward_model, ref, prompts, tokenizer, args, args.kl_coef, None)
            ppo.train_minibatch(actor, critic, *optimizers, experience, list(range(args.batch_size)), [], tokenizer, args)
    else:
        network = new(stage == "rm")
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
        for _ in range(2):
            for _ in range(2):
                n = 4 * args.micro_batch_size if stage == "rm" else args.micro_batch_size
                # for SFT the prompt is one token: the budget takes all tokens for completions
                batch = model.collate([text(1) for _ in range(n)], [text(args.max_length - 1) for _ in range(n)], 0)
                if stage == "sft":
                    sft.completion_losses(network, *batch).mean().backward()
                else:
                    scores = train_rm.last_token(network(batch[0]), batch[1])
                    sum(train_rm.ranking_loss(part, torch.arange(4.0)) for part in scores.split(4)).backward()
            step(network, optimizer)
    predicted = model.budget(stage, config, args)
    bytes_ = predicted["resident"] if allocator == "kept" else predicted["peak"]
    print(json.dumps(dict(measured=memory("VmHWM") - before, predicted=bytes_, activations=predicted["activations"])))


def check(stages, names):
    """Every measured peak beside its prediction; exit code 1 when one is off by more than 15 %."""
    worst = 0.0
    print("| stage | LLaMA | memory | of it activations | predicted | measured | predicted / measured |\n" + "| --- " * 7 + "|")
    for stage in stages:
        for name in names:
            for allocator, meaning in (("system", "in use"), ("kept", "resident")):
                command = [sys.executable, __file__, "--measure", stage, name, allocator]
                result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
                ratio = result["predicted"] / result["measured"]
                worst = max(worst, abs(ratio - 1))
                mib = " | ".join(f"{result[key] / 2**20:.0f} MiB" for key in ("activations", "predicted", "measured"))
                print(f"| {stage} | {name} | {meaning} | {mib} | {ratio:.2f} |", flush=True)
    sys.exit(worst > 0.15)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How much memory a run needs.")
    parser.add_argument("--check", action="store_true", help="measure, too")
    parser.add_argument("--stages", nargs="+", default=["sft", "rm", "ppo"], help="of --check")
    parser.add_argument("--models", nargs="+", default=list(CHECKED), help="of --check")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
    elif options.check:
        check(options.stages, options.models)
    else:
        table()
