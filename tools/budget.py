"""How much memory and arithmetic a run needs, from the model's configuration alone.

    python ppo.py --sft path/to/sft --dry_run --processes 8
    python -m tools.budget                  # a table: LLaMA of 1B to 70B, on 1, 8 and 64 processes
    python -m tools.budget --check          # random LLaMAs that fit here: predicted and measured
    python -m tools.budget --check --stages ppo --sizes 21M --lora_rank 8

Further options, such as --lora_rank, are those of the stages. All sizes are the largest that the
settings allow: every text is as long as it may be, and no response ends early.

In the formulas: n layers; widths d of the hidden state, I of the MLP, Q of all query heads together,
K of all key heads; H query heads; V words.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import torch
from transformers import LlamaConfig

from lib import cpu
from lib.checkpoints import read_config
from lib.data import collate
from lib.run import door, parse
from model import (DEMO_MODEL, Llama, LlamaBackbone, ScalarHead, add_lora, load_tokenizer,
                   trainable)


def widths(config):
    """d, I, Q, K, V."""
    return (config.hidden_size, config.intermediate_size,
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim, config.vocab_size)


# ------------------------------------------------------------------------------------------------
# Arithmetic. A product of (a, b) and (b, c) takes 2 a b c floating-point operations; all else is
# small beside the products

def forward_flops(config, texts, projected):
    """FLOP of a forward pass over `texts`, their lengths in tokens, of which `projected` tokens go
    through the vocabulary projection: 2 per weight and token; and in each layer 4 Q per token and
    token that it may look at, itself included (QK^T and AV)."""
    d, i, q, k, v = widths(config)
    weights = config.num_hidden_layers * (2 * d * q + 2 * d * k + 3 * d * i)
    pairs = sum(length * (length + 1) // 2 for length in texts)
    attention = 4 * q * config.num_hidden_layers * pairs
    return 2 * weights * sum(texts) + attention + 2 * d * v * projected


def training_flops(config, texts, projected, args):
    """FLOP of forward and backward pass. The latter computes the gradients of inputs and weights,
    with LoRA those of inputs only (the adapters' own are left out: below 1 %); checkpointing adds
    a forward pass."""
    passes = (2 if args.lora_rank else 3) + args.gradient_checkpointing
    return passes * forward_flops(config, texts, projected)


def generation_flops(config, texts):
    """FLOP of sampling. `texts`: (tokens of the prompt, of the response). With the cache every
    token but the last goes through the layers once, and every response token costs a projection."""
    return forward_flops(config, [prompt + response - 1 for prompt, response in texts],
                         sum(response for _, response in texts))


def update_flops(config, texts, args):
    """FLOP of a PPO update without the PTX term; `texts` as in `generation_flops`."""
    lengths = [prompt + response for prompt, response in texts]
    projected = sum(response for _, response in texts)
    asked = 1 if args.dtype == args.base_dtype == "float32" else 2  # the reference, and the actor
    experience = (generation_flops(config, texts)
                  + asked * forward_flops(config, lengths, projected)
                  + 2 * forward_flops(config, lengths, 0))  # critic, reward model
    training = (training_flops(config, lengths, projected, args)
                + training_flops(config, lengths, 0, args))
    return experience + args.ppo_epochs * training


# ------------------------------------------------------------------------------------------------
# Memory

def networks(stage, config, args, device="meta"):
    """The LLaMAs of a stage ("sft", "rm", "ppo") -> (those that learn, those that do not). On the
    meta device a tensor has a shape, and takes no memory."""
    def learning(network):
        return add_lora(network, args.lora_rank, args.lora_alpha, args.lora_targets,
                        args.base_dtype)

    with torch.device(device), contextlib.redirect_stdout(None):
        learn, frozen = [], []
        if stage != "rm":
            learn.append(learning(Llama(config)))
        if stage != "sft":
            learn.append(learning(ScalarHead(LlamaBackbone(config))))
        # with LoRA, actor and critic with their adapters off are reference and reward model
        if stage == "ppo" and not args.lora_rank:
            frozen.append(Llama(config).requires_grad_(False))
        if stage == "ppo" and not (args.lora_rank and args.critic == "rm"):
            frozen.append(ScalarHead(LlamaBackbone(config)).requires_grad_(False))
        return learn, frozen


def parameters(network):
    """How many parameters there are in each part of a network."""
    parts = {"embed_tokens": "embedding", "layers": "layers", "norm": "norm", "weight": "head"}
    count = dict.fromkeys([*parts.values(), "adapters"], 0)
    for name, parameter in network.named_parameters():
        part = "adapters" if name.endswith((".A", ".B")) else parts[name.split(".")[1]]
        count[part] += parameter.numel()
    return count


def bytes_of(parameters):
    return sum(parameter.nbytes for parameter in parameters)


def layer_bytes(config, args):
    """What autograd keeps of a token in a layer.

    Of two norms the input, the normalized input (for the gradient of the norm's weight) and a
    number: 4 d + 2. The inputs of the seven matrices: one for q, k and v, one for gate and up, one
    for down, 2 d + I; o's is the output of attention. That is kept with q, k and v: 2 Q + 2 K, and
    a number per head. gate, silu(gate) and up: 3 I. All of them 4 bytes, but in bf16 2 for what
    comes out of or goes into a matrix. Where a matrix has its input cast or padded, it keeps a copy
    of its own: 5 d + Q + I. (A GPU keeps less: its norms are fused, its attention is in bf16.)
    """
    d, i, q, k, _ = widths(config)
    autocast, base = args.dtype == "bfloat16", args.base_dtype == "bfloat16"
    norms = 4 * ((2 if args.lora_rank else 4) * d + 2)
    attention = 4 * (2 * q + 2 * k + config.num_attention_heads)
    mlp = 3 * i * (2 if autocast or base else 4)
    shared, own = 4 * (2 * d + i), (2 if autocast else 4) * (5 * d + q + i)
    inputs = own if autocast or base else shared
    if torch.device(args.device).type == "cpu" and d * d >= 2**17 and inputs == shared:
        inputs = shared + own if args.lora_rank else own  # lib.cpu.linear pads
    adapters = 7 * args.lora_rank * (2 if autocast else 4)
    return norms + inputs + attention + mlp + adapters


def activation_bytes(config, rows, length, projected, copies, args):
    """Bytes at the peak of a forward and backward pass over `rows` texts, `projected` tokens of
    which get logits: all layers' activations (with checkpointing each layer's input, and all of one
    layer), 3 d after the layers; the weights in bf16, if autocast casts them; and the larger of

    - `copies` of the logits (projected, V) in float32,
    - the gradients of an MLP, 3 I per token and a (d, I) matrix, and that of a tied embedding,
      which waits to be added to the head's.
    """
    d, i, q, k, v = widths(config)
    layers, tokens, layer = config.num_hidden_layers, rows * length, layer_bytes(config, args)
    kept = 4 * d * layers + layer if args.gradient_checkpointing else layers * layer
    casts = 0
    if args.dtype == "bfloat16" and args.base_dtype == "float32":
        casts = 2 * d * v * (projected > 0)
        if args.processes == 1:  # else they are gathered in bf16
            casts += 2 * layers * (2 * d * q + 2 * d * k + 3 * d * i)
    logits = (4 * copies + 2 * (args.dtype == "bfloat16")) * projected * v
    gradients = 4 * 3 * i * tokens
    if not args.lora_rank:
        gradients += 4 * d * i + 4 * d * v * (projected > 0)
    return tokens * (kept + 12 * d) + casts + max(logits, gradients)


def rollout_bytes(config, rows, prompt, response, args):
    """Bytes of sampling: the cache, 2 n K numbers per token; and beside it what reading the prompts
    takes, or the copy of three quarters of it when a quarter of the rows has ended."""
    d, i, _, k, _ = widths(config)
    size = 2 if "bfloat16" in (args.dtype, args.base_dtype) else 4
    cache = size * 2 * config.num_hidden_layers * k * rows * (prompt + response)
    reading = 4 * rows * prompt * (3 * i + 2 * d + prompt)
    return cache + max(reading, 0.75 * cache)


def budget(stage, config, args):
    """{"weights", "gradients", "optimizer", "activations", "rollout", "gathered", "peak",
    "resident"}, bytes per process, and "flops" of an optimizer step (ppo: of an update).

    A prompt of the reward model has 4 completions. "gathered": many processes share out everything,
    but two layers, the gradient of one, and the embedding, norm and head of each model are whole
    in each (lib.distributed.place). "peak": what is there at one time; gradients are freed before a
    rollout. "resident": on a CPU freed memory is kept (lib.cpu.keep_freed_memory), and its holes
    add up to 0.3 of what is in use; that is measured, by --check.
    """
    learn, frozen = networks(stage, config, args)
    processes, context = args.processes, config.max_position_embeddings
    every = [item for network in learn + frozen for item in network.named_parameters()]
    learns = [item for item in every if item[1].requires_grad]
    weights, gradients = (bytes_of(p for _, p in items) / processes for items in (every, learns))
    gathered = 0
    if processes > 1:
        layer, ends = learn[0].model.layers[0], [p for name, p in every if ".layers." not in name]
        gathered = bytes_of(ends) + 2 * bytes_of(layer.parameters()) + bytes_of(trainable(layer))
        gathered += bytes_of(p for name, p in learn[0].named_parameters()
                             if ".layers." not in name and p.requires_grad)
    step = args.minibatch_size if stage == "ppo" else args.batch_size
    rows, rollout = min(args.micro_batch_size, -(-step // processes)), 0
    if stage == "sft":
        length, batch = min(args.max_length, context), args.batch_size
        activations = activation_bytes(config, rows, length, rows * length, 3, args)
        flops = training_flops(config, batch * [length], batch * length, args)
    elif stage == "rm":
        length = min(args.max_length, context)
        activations = activation_bytes(config, 4 * rows, length, 0, 0, args)
        flops = training_flops(config, 4 * args.batch_size * [length], 0, args)
    else:
        response, batch = args.max_new_tokens, args.batch_size
        prompt = min(args.max_prompt_length, context - response)
        length = prompt + response
        # logits and their log softmax, and for the entropy four more
        activations = activation_bytes(config, rows, length, rows * response, 6, args)
        flops = update_flops(config, batch * [(prompt, response)], args)
        if args.ptx_coef:
            activations = max(activations,
                              activation_bytes(config, rows, length, rows * length, 4, args))
            flops += args.ppo_epochs * training_flops(config, batch * [length], batch * length,
                                                      args)
        rollout = rollout_bytes(config, -(-batch // processes), prompt, response, args)
        layers = bytes_of(learn[0].model.layers.parameters())
        if processes > 1 and not args.shard_rollout:
            rollout += layers / (2 if args.dtype == "bfloat16" else 1)  # the actor is gathered
        elif args.dtype == "bfloat16" and not args.lora_rank:
            rollout += layers / 2  # what autocast casts of a model that learns, it keeps
    optimizer = 2 * gradients  # Adam has two numbers per parameter
    peak = weights + optimizer + gathered + max(gradients + activations, rollout)
    resident = peak * (1.3 if torch.device(args.device).type == "cpu" else 1)
    return dict(weights=weights, gradients=gradients, optimizer=optimizer, activations=activations,
                rollout=rollout, gathered=gathered, peak=peak, resident=resident, flops=flops)


def dry_run(stage, path, args):
    """--dry_run: print the size of the model at `path` and the budget of the run."""
    if path in ("runs/sft", "runs/rm") and not os.path.isdir(path):
        path = None  # the demo's, not yet trained
    if path is None:
        tokenizer = load_tokenizer(getattr(args, "tokenizer", None) or "data/tokenizer")
        config = LlamaConfig(vocab_size=len(tokenizer), **DEMO_MODEL)
    else:
        config = read_config(path)
    for part, number in parameters(networks(stage, config, args)[0][0]).items():
        print(f"parameters, {part}: {number:,}")
    for name, value in budget(stage, config, args).items():
        if name == "flops":
            print(f"{'an update' if stage == 'ppo' else 'an optimizer step'}, all processes: "
                  f"{value:.3e} FLOP")
        else:
            print(f"{name}: {value / 2**30:.3f} GiB per process")


# ------------------------------------------------------------------------------------------------
# The table, and the check

LLAMA_2 = dict(vocab_size=32000, max_position_embeddings=4096)
SIZES = {  # Meta's: LLaMA 3.2 1B; LLaMA 2 7B, 13B and 70B
    "1B": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
               num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
               tie_word_embeddings=True),
    "7B": dict(LLAMA_2, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
               num_attention_heads=32),
    "13B": dict(LLAMA_2, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                num_attention_heads=40),
    "70B": dict(LLAMA_2, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                num_attention_heads=64, num_key_value_heads=8),
}
CHECKED = {  # name: (model, rows of a micro-batch, tokens of a row, a third of them the response)
    "21M": (dict(vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=10,
                 num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512), 8, 190),
    "49M": (dict(vocab_size=16384, hidden_size=512, intermediate_size=1536, num_hidden_layers=12,
                 num_attention_heads=8, max_position_embeddings=512, tie_word_embeddings=True),
            4, 190),
    "135M": (dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                  num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=512,
                  tie_word_embeddings=True), 2, 190),
}


def settings(stage, options, **more):
    """The settings of a stage for a real model, with the user's `options` and `more`."""
    script = importlib.import_module("train_rm" if stage == "rm" else stage)
    model = "sft" if stage == "ppo" else "model"
    given = [f"--{model}=-", *(f"--{name}={value}" for name, value in more.items()), *options]
    with contextlib.redirect_stdout(None):
        return parse(f"{stage}.py", script.__doc__, script.SETTINGS, given, real_if=[model])[0]


def table(options):
    """Print what ppo.py needs with its settings for a real model, on GPUs."""
    columns = {f"{n} process{'es' * (n > 1)}{kind}": settings("ppo", options, lora_rank=rank,
                                                             processes=n)
               for rank, kind in ((0, ""), (8, ", LoRA")) for n in (1, 8, 64)}
    print("| GiB per process | " + " | ".join(columns) + " | FLOP per update |\n" + "| --- " * 8 + "|")
    for name, size in SIZES.items():
        budgets = []
        for args in columns.values():
            args.device = "cuda"
            budgets.append(budget("ppo", LlamaConfig(**size), args))
        peaks = " | ".join(f"{found['peak'] / 2**30:,.0f}" for found in budgets)
        print(f"| {name} | {peaks} | {budgets[0]['flops']:.1e} |")


def memory(field):
    """Bytes of this process on Linux: VmRSS now, VmHWM at its peak."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


def measure(stage, name, allocator, options):
    """Two optimizer steps (ppo: updates) of a random LLaMA in this process -> a line of JSON. Two,
    since only the second has Adam's state beside gradients and activations."""
    import ppo
    import sft
    import train_rm
    if allocator == "kept":
        cpu.keep_freed_memory()
    else:  # M_MMAP_THRESHOLD: what is larger goes back to the system as soon as it is freed
        ctypes.CDLL(None).mallopt(-3, 128 * 1024)
    size, rows, length = CHECKED[name]
    new = length // 3
    if stage == "ppo":
        more = dict(batch_size=2 * rows, minibatch_size=2 * rows, micro_batch_size=rows,
                    ppo_epochs=1, max_prompt_length=length - new, max_new_tokens=new)
    else:
        prompts = max(1, rows // 4) if stage == "rm" else rows
        more = dict(batch_size=2 * prompts, micro_batch_size=prompts, max_length=length)
    config, args = LlamaConfig(**size), settings(stage, options, device="cpu", **more)
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=-1)  # so that no response ends early
    torch.manual_seed(0)
    # the threads and libraries of a backward pass
    torch.randn(64, 64).requires_grad_().square().sum().backward()
    before = memory("VmRSS")
    learn, frozen = networks(stage, config, args, "cpu")
    for layer in [layer for network in learn for layer in network.model.layers]:
        layer.recompute = args.gradient_checkpointing
    optimizers = [torch.optim.AdamW(trainable(network), lr=1e-6, fused=True) for network in learn]

    def text(n):
        return torch.randint(1, config.vocab_size, (n,)).tolist()

    def update():
        everyone = list(range(args.batch_size))
        prompts = [text(args.max_prompt_length) for _ in everyone]
        # with LoRA and one model for two, as in ppo.py
        ref, reward_model = ([*learn, *frozen][-2:] if args.critic == "rm" or not args.lora_rank
                             else (learn[0], frozen[0]))
        experience, _ = ppo.make_experience(*learn, reward_model, ref, prompts, [everyone],
                                            tokenizer, args, args.kl_coef, None)
        ppo.train_minibatch(*learn, *optimizers, experience, everyone, [], tokenizer, args)

    def step():
        (network,), (optimizer,) = learn, optimizers
        for _ in range(2):  # micro-batches
            n = args.micro_batch_size * (4 if stage == "rm" else 1)
            batch = collate([(text(1), text(args.max_length - 1)) for _ in range(n)], 0)
            with sft.autocast(args):
                if stage == "sft":
                    loss = sft.completion_losses(network, *batch).mean()
                else:
                    scores = train_rm.last_token(network(batch[0]), batch[1])
                    loss = sum(train_rm.ranking_loss(part, torch.arange(4.0))
                               for part in scores.split(4))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        update() if stage == "ppo" else step()
    found = budget(stage, config, args)
    print(json.dumps(dict(measured=memory("VmHWM") - before, activations=found["activations"],
                          predicted=found["resident" if allocator == "kept" else "peak"])))


def check(stages, names, options):
    """Print every measured peak beside its prediction -> whether none is off by more than 15 %.

    A peak is that of a process of its own, less what it had after its imports. Each is measured
    twice: freed memory given back, so that the peak is what was in use at one time; and freed
    memory kept, as the stages do on a CPU.
    """
    worst = 0.0
    print("| stage | LLaMA | memory | of it activations | predicted | measured | ratio |\n"
          + "| --- " * 7 + "|")
    for stage, name in [(stage, name) for stage in stages for name in names]:
        for allocator, meaning in (("returned", "in use"), ("kept", "resident")):
            command = [sys.executable, "-m", "tools.budget", "--measure", stage, name, allocator,
                       *options]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            result = json.loads(done.stdout.splitlines()[-1])
            ratio = result["predicted"] / result["measured"]
            worst = max(worst, abs(ratio - 1))
            mib = " | ".join(f"{result[key] / 2**20:.0f} MiB"
                             for key in ("activations", "predicted", "measured"))
            print(f"| {stage} | {name} | {meaning} | {mib} | {ratio:.2f} |", flush=True)
    return worst <= 0.15


@door
def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.budget", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure, too")
    parser.add_argument("--stages", nargs="+", default=["sft", "rm", "ppo"], help="of --check")
    parser.add_argument("--sizes", nargs="+", default=list(CHECKED), choices=CHECKED,
                        help="of --check")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args, options = parser.parse_known_args(argv)
    if args.measure:
        measure(*args.measure, options)
    elif args.check:
        raise SystemExit(not check(args.stages, args.sizes, options))
    else:
        table(options)


if __name__ == "__main__":
    main()
