"""A decoding step as a CUDA graph."""

import functools

import torch

from lib.distributed import is_sharded


def can_be_captured(llama):
    """Whether a decoding step is nothing but kernels on a CUDA device. FSDP communicates in it,
    dynamic rotary frequencies look at the positions in Python, and quantized layers are code of
    others."""
    weights = list(llama.parameters())
    return (weights[0].is_cuda and not is_sharded(llama)
            and llama.model.rotary_emb.rope_type != "dynamic"
            and all(weight.is_floating_point() for weight in weights))


@functools.cache
def side_stream(device):
    """One stream of a device for all captures: for each stream libraries keep a workspace."""
    return torch.cuda.Stream(device)


def captured(step, state):
    """`step` as a CUDA graph: launched as a whole, where Python takes longer to launch its kernels
    one by one than the GPU to compute them. `step` changes tensors in place. Capturing runs
    it twice first; those of `state` are then put back."""
    device, before = state[0].device, [x.clone() for x in state]
    with torch.cuda.device(device):  # with --device cuda:1 the current one is another
        stream = side_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries allocate and choose kernels the first times
                step()
                for x, value in zip(state, before):
                    x.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    return graph.replay
