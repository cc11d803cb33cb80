"""Does the suite notice a slip? One small bug at a time is planted in a copy of the repository, and
the tests that ought to catch it run until the first failure.

    python bench/mutants.py                      # the table; exit code 1 if a bug survives
    python bench/mutants.py collate 12a          # only some of them

The bugs are those of the exercises 12a to 12f (bench/bugs/*.diff), and EDITS: a line or two each,
slips that are easily made. A test counts only if it passes on the repository as it
is. What the table does not say is how many other bugs would survive.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from lib.errors import clean_exit, stop  # noqa: E402

DIFFS = {  # exercise: (function, file that ought to catch it)
    "12a": ("model.py states_of", "test_ppo_math.py"),
    "12b": ("ppo.py masked_mean", "test_ppo_math.py"),
    "12c": ("ppo.py policy_backward", "tests/test_ppo.py"),
    "12d": ("ppo.py response_logprobs", "tests/test_ppo.py"),
    "12e": ("ppo.py masked_whiten", "test_ppo_math.py"),
    "12f": ("ppo.py four_models", "tests/test_ppo.py"),
}
EDITS = {  # function: (its file, what stands there, what takes its place, who ought to catch it)
    "collate": (
        "lib/data.py", "range(len(prompt), len(text))", "range(len(prompt) - 1, len(text) - 1)",
        "tests/test_data.py"),
    "length_batches": (
        "lib/data.py", "for start in range(0, len(order), batch_size)]",
        "for start in range(0, len(order) - batch_size + 1, batch_size)]", "tests/test_data.py"),
    "sample": (
        "model.py", "ordered.cumsum(-1) - ordered >= top_p", "ordered.cumsum(-1) >= top_p",
        "tests/test_generate.py"),
    "merged": (
        "lib/lora.py", "part.scale * b @ a", "b @ a", "tests/test_lora.py"),
    "unhealthy": (
        "lib/health.py", "/ len(rows[-10:])", "/ len(rows)", "tests/test_warnings.py"),
    "ranking_loss": (
        "train_rm.py", "/ max(1, len(better))", "/ len(scores)", "test_ppo_math.py"),
    "completion_losses": (
        "sft.py", "(scale * loss.sum()).backward()", "(scale * loss.mean()).backward()",
        "tests/test_sft.py"),
    "restore": (
        "lib/state.py", 'generator.set_state(tensors[f"random.{name}"])',
        "generator.manual_seed(args.seed)", "tests/test_rewards.py"),
    "RunningDeviation": (
        "lib/rewards.py", "distance * (score - self.mean)", "distance * distance",
        "tests/test_rewards.py"),
    "renamed": (
        "lib/formats.py", "heads = config.num_key_value_heads",
        "heads = config.num_attention_heads", "tests/test_checkpoints.py"),
    "micro_batches": (
        "lib/distributed.py", "(len(parts[-1]) + 1) * lengths[i] > most:",
        "len(parts[-1]) * lengths[i] > most:", "tests/test_distributed.py"),
    "set_lr": (
        "lib/training.py", "peak * (step + 1) / warmup", "peak * step / warmup",
        "tests/test_sft.py"),
}


def planted(name, folder):
    """Plant a bug in the copy `folder`."""
    if name in DIFFS:
        diff = f"{ROOT}/bench/bugs/{name[2:]}.diff"
        above = os.environ | {"GIT_CEILING_DIRECTORIES": os.path.dirname(folder)}
        if subprocess.run(["git", "apply", diff], cwd=folder, env=above).returncode:
            stop(f"{diff}: does not apply; make it again from today's files")
        return
    file, old, new, _ = EDITS[name]
    with open(f"{folder}/{file}", encoding="utf-8") as opened:
        text = opened.read()
    if text.count(old) != 1:
        stop(f"bench/mutants.py: {name}: {old!r} stands {text.count(old)} times in {file}, and not "
             "once: take what stands there today")
    with open(f"{folder}/{file}", "w", encoding="utf-8") as opened:
        opened.write(text.replace(old, new))


def first_failure(folder, tests):
    """Run tests in `folder` until one fails -> its name, or None."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *tests], cwd=folder, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?::\w+)", done.stdout, re.M)
    if done.returncode not in (0, 1) or (done.returncode == 1) != bool(failed):
        stop(f"pytest {' '.join(tests)} ended with code {done.returncode}:\n{done.stdout}", code=1)
    return failed and failed.group(1)


def caught_by(name):
    """The test that fails with this bug, or None."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as above:
        folder = os.path.join(above, "copy")
        shutil.copytree(ROOT, folder, ignore=lambda path, names: {
            "__pycache__", ".git", ".venv", *(("data", "runs") if path == ROOT else ())})
        planted(name, folder)
        return first_failure(folder, [(DIFFS | EDITS)[name][-1]])


@clean_exit
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(DIFFS | EDITS)}; without, all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(DIFFS | EDITS):
        stop(f"{unknown.pop()}: there is no such bug; there are {', '.join(DIFFS | EDITS)}")
    names, tests = args.names or list(DIFFS | EDITS), {}
    print("| mutant | function | caught by |\n| --- | --- | --- |", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, test in zip(names, pool.map(caught_by, names)):
            tests[name] = test
            if name in DIFFS:
                mutant, function = f"exercise {name}", DIFFS[name][0]
            else:
                file, old, new, _ = EDITS[name]
                mutant, function = f"`{old}` -> `{new}`", f"{file} {name}"
            print(f"| {mutant} | {function} | {test or 'NOTHING'} |", flush=True)
    caught = sorted({test for test in tests.values() if test})
    if caught and (failed := first_failure(ROOT, caught)):
        stop(f"{failed} fails without any bug: mend that first", code=1)
    survivors = [name for name, test in tests.items() if not test]
    print(f"{len(tests) - len(survivors)} of {len(tests)} caught")
    raise SystemExit(1 if survivors else 0)


if __name__ == "__main__":
    main()
