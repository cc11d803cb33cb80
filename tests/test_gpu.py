"""bench/gpu.py, on a CPU: that all of it runs, and what it must find on any device.

    pytest tests/test_gpu.py
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [str(ROOT / "bench" / "gpu.py"), "--small", "--device", "cpu", "--out"]


def test_all_steps_in_small(tmp_path):
    """All but the real run, resuming and the demo, which have tests of their own. The limits are a
    GPU's."""
    steps = ["checks", "start", "smollm2", "large", "tests"]
    command = [sys.executable, *COMMAND, tmp_path, "--limit", "600", "--steps", *steps]
    done = subprocess.run(command, capture_output=True, text=True)
    logs = "\n".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + logs
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == steps and all(r["ended"].startswith("done") for r in report.values())
    found = {step: part["found"] for step, part in report.items()}
    checks = found["checks"]
    assert checks["greedy answers that equal those of a model without a cache"] == "4 of 4"
    assert checks["logits beside transformers, float32"] < 1e-4
    assert checks["gradients beside transformers, bfloat16"] < 0.05
    assert checks["waits for the device in 20 tokens"] <= 22
    assert checks["waits for the device in a step of sft.py"] == 1
    for how in ("float32", "TF32", "bf16", "LoRA, bf16 base"):
        assert abs(found["start"][f"largest ratio, {how}"] - 1) < 1e-3
        assert abs(found["start"][f"KL, {how}"]) < 0.01
    shares = [v for name, v in found["smollm2"].items() if name.startswith("bf16: share")]
    assert len(shares) == 4 and sum(shares) == pytest.approx(1)
    assert found["tests"]["tests passed"] > 10 and found["tests"]["which failed"] == "none"
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Not a GPU") and "| 4 of 4 |" in text


def test_a_step_that_takes_too_long_is_cut_off(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "bench" / "gpu.py")
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    monkeypatch.setitem(gpu.LIMITS, "checks", -29.5)
    monkeypatch.setattr(sys, "argv", [*COMMAND, str(tmp_path), "--steps", "checks"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 0 and "## checks: cut off, " in (tmp_path / "report.md").read_text()
