"""Counts how often Python waits for the device. On a GPU PyTorch itself counts (its warnings in
`torch.cuda.set_sync_debug_mode`); without one, what would wait there is counted on the CPU: a number
or a list that is asked for, a size that depends on what a tensor holds, an index that is a list."""

import contextlib
import warnings

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

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
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
    else:
        with OnCPU(found), Asked(found):
            yield found
