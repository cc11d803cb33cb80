"""Processes that begin with everything imported: forks of a server, which imports the libraries and
the stages once. (Importing them takes longer than most that a test does with them.)"""

import multiprocessing
import os
import sys

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    ["sft", "train_rm", "ppo", "data_gen", "pytest", "matplotlib.pyplot", "torch.distributed.fsdp"]
)


def fork(function, *given):
    """function(*given) in a process of its own, which runs -> the process."""
    process = server.Process(target=function, args=given)
    process.start()
    return process


def forget_ours():
    """What is imported of this project, as it was in the server: it is to be imported again."""
    ours = {"lib", "tools", "bench", "model", "data_gen", "sft", "train_rm", "ppo"}
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]


def redirect(log):
    """Append what this process prints to a file."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
