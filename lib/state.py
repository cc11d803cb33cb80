"""The saved state of a run, `last/`: weights, optimizers, random states, progress.

A state is a file of tensors, and state.json, which names it.
"""

import hashlib
import json
import os

import torch
from safetensors.torch import load_file, save_file

from lib.distributed import as_held, in_one_piece, named_wholes
from lib.errors import explain, refuse_nan, replacing, stop, write_whole

# What --resume may change: how a run goes on, not what it is
FREE = {"out", "resume", "overwrite", "save_every", "keep", "device", "micro_batch_size",
        "process_timeout", "gradient_checkpointing", "shard_rollout",
        "accept_changed_data", "tensorboard"}
LONGER = {"updates", "epochs"}  # what --resume may raise


def fingerprint(path):
    """A hash of a file, or of a checkpoint's files; of those above 64 MB only of the size, and of
    the first and the last MB, since weights can have many GB."""
    files = [path]
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in sorted(os.listdir(path))
                 if name.endswith((".json", ".safetensors", ".bin", ".pth", ".model", ".jinja"))]
    found = hashlib.sha256()
    for name in filter(os.path.exists, files):  # a link may lead nowhere
        size = os.path.getsize(name)
        found.update(f"{os.path.basename(name)} {size}\n".encode())
        with open(name, "rb") as file:
            found.update(file.read(size if size <= 2**26 else 2**20))
            if size > 2**26:
                file.seek(-2**20, os.SEEK_END)
                found.update(file.read())
    return found.hexdigest()


def tensors_of(trained, generators):
    """{name: tensor} of what learns, of its optimizers, and of the random states. `trained`: {name:
    (model, its optimizer)}; `generators`: {name: torch.Generator}. All processes take part."""
    tensors = {}
    for name, (model, optimizer) in trained.items():
        learns = {key for key, p in model.named_parameters() if p.requires_grad}
        tensors |= {f"{name}.{key}": x for key, x in named_wholes(model) if key in learns}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}_optimizer.{index}.{field}": in_one_piece(x)
                        for field, x in moments.items()}
    for name, generator in generators.items():
        tensors[f"random.{name}"] = generator.get_state()
    return tensors | {"random.torch": torch.get_rng_state()}


def write(folder, tensors, state):
    """The tensors go into a new file, then state.json, which names it, takes the place of the old
    one: at every moment one of the two states is whole. `state`: a dict for state.json."""
    file = os.path.join(folder, f"state-{state['progress']['step']}.safetensors")
    stays = "; what was saved before stays"
    refuse_nan(f"{folder}: not written", tensors, f"{stays}. Lower --lr", code=1)
    with replacing(file, stays, code=1) as part:
        save_file({key: x.cpu().contiguous() for key, x in tensors.items()}, part)
    name = os.path.basename(file)
    write_whole(os.path.join(folder, "state.json"), json.dumps(state | dict(file=name)).encode(),
                stays, code=1)
    for other in os.listdir(folder):
        if other.startswith("state-") and other != name:
            os.remove(os.path.join(folder, other))


def moved(state, name, path):
    """Whether what this setting names is what the run read, and only lies elsewhere now."""
    return (name in state.get("inputs", {}) and bool(path) and os.path.exists(path)
            and state["inputs"][name] == fingerprint(path))


def read(folder, args):
    """What `write` wrote, with its `tensors`, if it is whole and of a run with these settings."""
    path, over = os.path.join(folder, "state.json"), "; another --out starts a new run"
    with explain(f"{path}: damaged", over):
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        before, tensors = state["settings"], os.path.join(folder, state["file"])
        state["progress"]["step"], state["log_bytes"]
    for name, value in json.loads(json.dumps(vars(args))).items():
        if name in LONGER and name in before and value > before[name]:
            print(f"--{name} {value}, where {before[name]} were planned: from here on the "
                  "learning rate falls as in a run of this length")
        elif name not in FREE and before.get(name) != value and not moved(state, name, value):
            stop(f"--{name} {value} conflicts with the run in {args.out}, which has "
                 f"{before.get(name)}; use that, or another --out")
    with explain(f"{tensors}: missing or damaged", over):
        state["tensors"] = load_file(tensors)
    return state


def restore(state, folder, trained, generators):
    """Put the tensors of a state that was `read` back where they came from -> the progress."""
    tensors = state.pop("tensors")
    with explain(f"{folder}: not a state of this run", "; another --out starts a new run"):
        for name, (model, optimizer) in trained.items():
            with torch.no_grad():
                for key, p in model.named_parameters():
                    if p.requires_grad:  # not LoRA's frozen weights
                        p.copy_(as_held(tensors[f"{name}.{key}"], p))
            moments = {}
            for key, x in tensors.items():
                if key.startswith(f"{name}_optimizer."):
                    _, index, field = key.rsplit(".", 2)
                    p = optimizer.param_groups[0]["params"][int(index)]
                    x = as_held(x, p) if x.shape == p.shape else x  # but the number of steps
                    moments.setdefault(int(index), {})[field] = x
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
        device = torch.device(state["settings"]["device"]).type
        for name, generator in generators.items():
            if generator.device.type == device:
                generator.set_state(tensors[f"random.{name}"])
            else:
                generator.manual_seed(state["settings"]["seed"] + state["progress"]["step"])
                print(f"saved on {device}: on {generator.device.type} the random numbers of "
                      f"{name} are different")
        torch.set_rng_state(tensors["random.torch"])
    return state["progress"]
