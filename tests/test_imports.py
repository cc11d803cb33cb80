"""Importing a file changes nothing but what it defines."""

import json
import subprocess
import sys

import pytest

from makers import ROOT

MODULES = [f"lib.{path.stem}" for path in sorted(ROOT.glob("lib/[a-z]*.py"))]
MODULES += ["model", "sft", "train_rm", "ppo", "data_gen"]
# One process imports PyTorch and transformers, and a fork of it each module.
CODE = """
import importlib, json, logging, os, signal, sys, traceback, warnings, torch, transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.utils import logging as theirs

def state():
    return (dict(ALL_ATTENTION_FUNCTIONS), nn.Linear.forward,
            modeling_llama.LlamaAttention.forward, modeling_llama.LlamaModel.forward,
            list(warnings.filters), logging.getLogger().level, theirs.get_verbosity(),
            theirs.is_progress_bar_enabled(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.get_default_dtype(), torch.initial_seed(), signal.getsignal(signal.SIGINT),
            sys.stdout, torch.backends.mkldnn.enabled)

torch.manual_seed(7)
found = {}
for module in sys.argv[1:]:
    read, write = os.pipe()
    if not os.fork():
        os.dup2(write, 1)
        code = 1
        try:
            before = state()
            importlib.import_module(module)
            assert state() == before, (before, state())
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(code)
    os.close(write)
    with open(read) as said:
        found[module] = said.read(), os.waitstatus_to_exitcode(os.wait()[1])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported():
    """{module: (what importing it printed, exit code)}"""
    done = subprocess.run([sys.executable, "-c", CODE, *MODULES], cwd=ROOT, stdout=subprocess.PIPE,
                          text=True, check=True, timeout=120)
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", MODULES)
def test_importing_has_no_side_effect(imported, module):
    """What transformers, PyTorch, warnings and logging would do is the same before and after."""
    assert imported[module] == ["", 0]
