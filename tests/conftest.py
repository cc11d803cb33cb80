"""What every test needs: the scripts importable from wherever pytest is started, no network, one
thread."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that names a hub model finds it on disk, or nowhere
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402

torch.set_num_threads(1)
