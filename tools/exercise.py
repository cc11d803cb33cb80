"""The exercises of docs/exercises.md: a copy of the repository in which one function is to be
written, or a bug to be found, and the test that fails until that is done.

    python -m tools.exercise 7          # makes runs/exercises/7 and runs its test there
    python -m tools.exercise 7          # again, after you have edited it: only the test
    python -m tools.exercise 12c        # the third planted bug
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys

from lib.errors import clean_exit, explain, stop

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MATHS, PPO = "test_ppo_math.py", "tests/test_ppo.py"
WRITE = {  # exercise: (file, function to be written, its test)
    "1": ("sft.py", "completion_losses", "tests/test_sft.py::test_completion_losses"),
    "2": ("model.py", "states_of", f"{MATHS}::test_the_shift_between_a_state_and_its_token"),
    "3": ("model.py", "rotate",
          "tests/test_model.py::test_logits_and_gradients_are_those_of_transformers"),
    "4": ("train_rm.py", "ranking_loss", f"{MATHS}::test_ranking_loss"),
    "5": ("model.py", "sample",
          "tests/test_generate.py::test_frequencies_and_logprobs_of_sampled_tokens"),
    "6": ("ppo.py", "logprobs_from_logits", f"{MATHS}::test_logprobs_and_entropy"),
    "7": ("ppo.py", "token_rewards", f"{MATHS}::test_score_lands_on_the_last_token"),
    "8": ("ppo.py", "gae", f"{MATHS}::test_gae_at_lambda_1_is_chatllamas_advantage"),
    "9": ("ppo.py", "masked_whiten", f"{MATHS}::test_whitened_moments"),
    "10": ("ppo.py", "policy_loss", f"{MATHS}::test_first_pass_is_reinforce"),
    "11": ("ppo.py", "value_loss", f"{MATHS}::test_value_loss_by_hand"),
}
FIND = {  # planted bug, bench/bugs/*.diff: the test that finds it
    "12a": f"{MATHS}::test_the_shift_between_a_state_and_its_token",
    "12b": f"{MATHS}::test_masked_mean_weighs_tokens_and_not_responses",
    "12c": f"{PPO}::test_an_entropy_bonus_makes_the_policy_less_sure",
    "12d": f"{PPO}::test_logprobs_and_entropy_are_at_the_sampling_temperature",
    "12e": f"{MATHS}::test_whitened_moments",
    "12f": f"{PPO}::test_actor_and_critic_are_copies_that_learn",
}


def blanked(source, name):
    """The source of a file in which the function `name` has its docstring, and nothing to do."""
    function = next(node for node in ast.parse(source).body
                    if isinstance(node, ast.FunctionDef) and node.name == name)
    docstring, rest = function.body[0], function.body[1:]
    lines = source.splitlines(keepends=True)
    lines[docstring.end_lineno:rest[-1].end_lineno] = [
        f'    raise NotImplementedError("{name} is yours to write")\n']
    return "".join(lines)


def make(number, folder):
    """The copy, with the function blanked or the bug planted."""
    os.makedirs(folder)
    for name in ["lib", "tools", "tests"]:
        shutil.copytree(f"{ROOT}/{name}", f"{folder}/{name}",
                        ignore=shutil.ignore_patterns("__pycache__"))
    for name in os.listdir(ROOT):
        if name.endswith((".py", ".toml", ".ini", ".cfg")):
            shutil.copy(f"{ROOT}/{name}", folder)
    if number in FIND:
        above = os.path.dirname(folder)
        subprocess.run(["git", "apply", f"{ROOT}/bench/bugs/{number[2:]}.diff"], cwd=folder,
                       check=True, env=os.environ | {"GIT_CEILING_DIRECTORIES": above})
        return
    file, name, _ = WRITE[number]
    with open(f"{ROOT}/{file}", encoding="utf-8") as opened:
        source = blanked(opened.read(), name)
    with open(f"{folder}/{file}", "w", encoding="utf-8") as opened:
        opened.write(source)


@clean_exit
def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.exercise", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", help=f"{', '.join([*WRITE, *FIND])}")
    parser.add_argument("--out", default="runs/exercises", help="where the copies go (default: "
                        "runs/exercises)")
    args = parser.parse_args(argv)
    if args.number not in WRITE | FIND:
        stop(f"{args.number}: there is no such exercise; there are {', '.join([*WRITE, *FIND])}")
    folder = os.path.abspath(os.path.join(args.out, args.number))
    if not os.path.exists(folder):
        shutil.rmtree(f"{folder}.part", ignore_errors=True)
        with explain(f"{folder}: cannot be made"):
            make(args.number, f"{folder}.part")
        os.replace(f"{folder}.part", folder)
    test = FIND.get(args.number) or WRITE[args.number][2]
    where = "find the bug" if args.number in FIND else "write {1} in {0}".format(
        *WRITE[args.number])
    print(f"exercise {args.number}: {where}, in {folder}; its test: {test}", flush=True)
    code = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--tb=line",
                           "-p", "no:cacheprovider", test], cwd=folder).returncode
    print("done: it is right" if code == 0 else "not yet")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
