"""Counts how often Python waits for the device. On a GPU PyTorch itself counts, by the warnings of
`torch.cuda.set_sync_debug_mode`. Without one, everything that would wait there is counted on the
CPU: a number or a list that is asked for, a size that depends on what a tensor holds, an index that
is a list. That also counts what even with a GPU is on the CPU."""

import contextlib
import warnings

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lib.run import Run

SIZES = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave"}


class OnCPU(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            self.found += masks and [name]
        elif name in SIZES:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Asked(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if name in ("tolist", "cpu", "numpy"):
            self.found.append(name)
        elif name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found += [name] * any(isinstance(part, (list, range)) for part in index)
        return function(*args, **kwargs)


@contextlib.contextmanager
def waits():
    """A list that grows by one for each wait inside."""
    found = []
    if torch.cuda.is_available():
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", message=".*called a synchronizing")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
    else:
        with OnCPU(found), Asked(found):
            yield found


def waits_of_steps(script, argv):
    """How often each step of a stage waits for the device, without saving its state."""
    counts, log = [], Run.log
    with waits() as found:

        def see(run, **row):
            counts.append(len(found))
            log(run, **row)
            found.clear()

        Run.log = see
        try:
            script.main(argv)
        finally:
            Run.log = log
    return counts[1:]  # before the first step everything is loaded
