"""bench/gpu.py, on a CPU: that all of it runs, and what it must find on any device.

    pytest tests/test_gpu.py
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run("--steps", ...): bench/gpu.py with these options, on a CPU."""
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "bench" / "gpu.py")
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)

    def run(*options):
        command = ["gpu.py", "--small", "--device", "cpu", "--out", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", [gpu.__file__, *command[1:]])
        gpu.main()

    run.limits = gpu.LIMITS
    return run


def test_all_steps_in_small(run, tmp_path):
    """What the steps find, in this process: all but the real run, resuming and the demo, which have
    tests of their own."""
    steps = ["checks", "start", "smollm2", "large", "tests"]
    run("--worker", *steps)
    report = {step: json.loads((tmp_path / f"{step}.json").read_text()) for step in steps}
    assert all(found["ended"] == "done" for found in report.values())
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


def test_the_report_and_a_step_that_takes_too_long(run, tmp_path, monkeypatch):
    """In a process of its own, which is watched."""
    monkeypatch.setitem(run.limits, "large", 600)
    monkeypatch.setitem(run.limits, "checks", 0)
    with pytest.raises(SystemExit) as ended:
        run("--steps", "large", "checks")
    assert ended.value.code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [part["ended"].split(",")[0] for part in report.values()] == ["done", "cut off"]
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Not a GPU") and "## checks: cut off, " in text
    assert "| parameters | " in text
