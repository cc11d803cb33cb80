"""Importing a file changes nothing but what it defines."""

import subprocess
import sys

import pytest

from makers import ROOT

MODULES = [
    "lib.errors",
    "lib.settings",
    "lib.training",
    "lib.run",
    "lib.curves",
    "lib.data",
    "lib.checkpoints",
    "lib.tokenizer",
    "lib.distributed",
    "lib.health",
    "lib.cpu",
    "model",
    "sft",
    "train_rm",
    "ppo",
    "data_gen",
]


@pytest.mark.parametrize("module", MODULES)
def test_importing_has_no_side_effect(module):
    """What transformers, PyTorch, warnings and logging would do is the same before and after."""
    code = (
        "import importlib, logging, signal, sys, warnings, torch, transformers\n"
        "from torch import nn\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n"
        "from transformers.models.llama import modeling_llama\n"
        "from transformers.utils import logging as theirs\n"
        "def state():\n"
        "    return (dict(ALL_ATTENTION_FUNCTIONS), nn.Linear.forward, modeling_llama.LlamaAttention.forward,\n"
        "            modeling_llama.LlamaModel.forward, list(warnings.filters), logging.getLogger().level,\n"
        "            theirs.get_verbosity(), theirs.is_progress_bar_enabled(), torch.get_num_threads(),\n"
        "            torch.is_grad_enabled(), torch.get_default_dtype(), torch.initial_seed(),\n"
        "            signal.getsignal(signal.SIGINT), sys.stdout, torch.backends.mkldnn.enabled)\n"
        "torch.manual_seed(7)\n"
        "before = state()\n"
        f"importlib.import_module({module!r})\n"
        "assert state() == before, (before, state())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and not done.stdout, done.stderr
