"""Many processes: torchrun --nproc_per_node=8 sft.py ...

All of them run the same script on the same data, and draw the same batches. Each takes its share of
the rows of a batch; losses, divided by the sizes of the whole batch, and gradients are summed over
the processes. With one process none of this does anything.
"""

import atexit
import datetime
import os
import sys

import torch
import torch.distributed as dist

# Rank and world size, as torchrun sets them; without torchrun 0 and 1
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

if WORLD > 1:  # one process does not need what takes a second to import
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor


def start_processes(args):
    """Join the process group of torchrun. Only rank 0 prints and writes files.

    An error ends its process at once, and torchrun then ends the others. To wait for another
    process longer than --process_timeout minutes is an error.
    """
    if WORLD == 1 or started():
        return
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise SystemExit(f"error: torch {torch.__version__}: many processes need a newer one, "
                         "whose FSDP2 can sum gradients")
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=datetime.timedelta(minutes=args.process_timeout))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # errors go to stderr, from every rank


def started():
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def end_processes():
    """Destroy the process group once all are done. Threads of gloo may outlive the group, and would
    abort the process at Python's exit: so this process ends without waiting for them."""
    if started():
        wait_for_all()
        dist.destroy_process_group()
        atexit.register(leave)


def leave(code=0):
    """End this process at once: Python's own exit may wait for a group that has lost a member."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def to_device(model, args):
    """The model on --device; with many processes each holds a shard of all weights, gradients and
    optimizer states (FSDP2), and gathers a layer only while it computes. Embedding, last norm and
    head are gathered in the forward pass of the whole model, and stay so until its backward pass:
    the stages project hidden states after that forward pass."""
    for layer in model.model.layers:
        layer.recompute = args.gradient_checkpointing
    if WORLD > 1:
        # float32 masters; with --dtype bfloat16 the layers are gathered in bf16, gradients are
        # summed in float32, and activations keep the precision that autocast gives them in one
        # process
        dtype = torch.bfloat16 if args.dtype == "bfloat16" else None  # None: as they are
        mesh = dist.init_device_mesh(torch.device(args.device).type, (WORLD,))
        for module in [*model.model.layers, model]:
            policy = MixedPrecisionPolicy(param_dtype=None if module is model else dtype,
                                          reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(module, mesh=mesh, mp_policy=policy,
                        reshard_after_forward=module is not model)
            module.set_gradient_divide_factor(1.0)  # the sum, where FSDP by itself takes the mean
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return model.to(args.device)


def is_sharded(model):
    """Whether this process now holds only its shard of the layers."""
    return is_shard(next(model.model.layers.parameters()))


def is_shard(x):
    """Whether a tensor is this process's shard of a larger one."""
    return WORLD > 1 and isinstance(x, DTensor)


def release(model):
    """Free what a forward pass left gathered: the parameters are then the optimizer's own."""
    if WORLD > 1:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def my_parts(rows, size):
    """This process's micro-batches of the batch `rows`, [(part, weight)]: every WORLD-th row,
    `size` at a time.

    A pass through the model needs all processes, so each has the same number of parts. One that has
    no row left repeats a row of another with weight 0; all else has weight 1.
    """
    rows = list(rows)
    mine, passes = rows[RANK::WORLD], -(-len(rows) // (WORLD * size))
    parts = [mine[i * size:(i + 1) * size] for i in range(passes)]
    return [(part, 1) if part else (rows[:1], 0) for part in parts]


def micro_batches(rows, lengths, size):
    """Cut rows, `lengths` tokens each, into parts of similar lengths, so that little is padded ->
    [(part, weight)]; of many processes, those of this one, as in `my_parts`. A part has at most as
    many tokens, padding included, as `size` of the longest rows: many short ones go together."""
    rows = sorted(rows, key=lambda i: lengths[i])
    most = size * max(lengths, default=0)

    def cut(rows):
        parts = []
        for i in rows:  # the longest so far
            if not parts or (len(parts[-1]) + 1) * lengths[i] > most:
                parts.append([])
            parts[-1].append(i)
        return parts

    everyones = [cut(rows[rank::WORLD]) for rank in range(WORLD)]
    passes, mine = max(map(len, everyones)), everyones[RANK]
    return [(part, 1) for part in mine] + [(rows[:1], 0)] * (passes - len(mine))


def own_stream(generator):
    """This process's own random numbers, seeded from a generator that all share; with one process,
    or without a generator, that itself."""
    if WORLD == 1 or generator is None:
        return generator
    seeds = torch.randint(2**62, (WORLD,), generator=generator, device=generator.device)
    return torch.Generator(generator.device).manual_seed(seeds[RANK].item())


def gather_rows(function, parts, number):
    """Call `function(rows)` for each (rows, weight) of `parts`; it gives tensors (len(rows), ...)
    -> the tensors (number, ...) that hold the rows of all parts and of all processes."""
    wholes = None
    for rows, weight in parts:
        found = function(rows)
        if wholes is None:
            wholes = [x.new_zeros(number, *x.shape[1:]) for x in found]
        for whole, x in zip(wholes, found):
            whole[torch.tensor(rows).to(x.device, non_blocking=True)] = weight * x
    return [total(whole) for whole in wholes]


def total(x):
    """The sum over all processes of a number or a tensor. Where each fills in its rows of zeros,
    the sum is the whole."""
    if WORLD == 1:
        return x
    device = "cpu" if dist.get_backend() == "gloo" else torch.cuda.current_device()
    if torch.is_tensor(x):
        summed = x.detach().to(device, copy=True)
    else:
        summed = torch.tensor(x, device=device, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.to(x.device) if torch.is_tensor(x) else summed.item()


def from_rank_0(function, number):
    """The `number` floats that `function()` gives on rank 0, which alone calls it."""
    floats = function() if RANK == 0 else [0.0] * number
    return total(torch.tensor(floats, dtype=torch.float64)).tolist()


def largest(x):
    """The largest over all processes of a number, or of anything else that can be compared."""
    if WORLD == 1:
        return x
    everyones = [None] * WORLD
    dist.all_gather_object(everyones, x)
    return max(everyones)


def wait_for_all():
    """A barrier: wait for all processes."""
    total(0)


def clip_gradients(model, max_norm):
    """Scale the gradient down to length `max_norm` if it is longer -> its length before, a
    scalar."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if is_shard(norm) else norm


def named_wholes(model, everywhere=False):
    """(name, whole tensor) of each parameter: on the CPU of rank 0, to be saved, or `everywhere`,
    to compute with. Every process takes part; without `everywhere` the others get None for what is
    sharded."""
    release(model)
    for name, parameter in model.named_parameters():
        yield name, in_one_piece(parameter.detach(), everywhere)


def in_one_piece(x, everywhere=False):
    """The whole of a sharded tensor, on the CPU of rank 0, or `everywhere` on its device; any other
    tensor as it is."""
    if not is_shard(x):
        return x
    x = x.full_tensor()
    if everywhere:
        return x
    return x.cpu() if RANK == 0 else None


def as_held(x, p):
    """A whole tensor as the parameter `p` is held: this process's shard of it if `p` is sharded.
    The reverse of `in_one_piece`."""
    if not is_shard(p):
        return x
    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
