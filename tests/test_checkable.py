"""bench/checkable.py and its reward; what sums and docs/exact_sums.py refuse:

    pytest tests/test_checkable.py
"""

import json
import runpy
import sys

import pytest

import data_gen
from bench import checkable
from bench.checkable_reward import score
from lib.judge import Judge
from lib.tokenizer import load_tokenizer
from model import load_llama, save_checkpoint


@pytest.mark.parametrize("sentence", sum(data_gen.SENTENCES.values(), []))
def test_the_sentences_of_the_demonstrations_are_right_with_the_answer(sentence):
    judge = Judge("--reward", f"{checkable.ROOT}/bench/checkable_reward.py")
    records = [{"user_input": "50 + 72 = ?", "answer": answer} for answer in ("122", "12")]
    completion = sentence.format(x="122")
    assert judge(records, [completion] * 2, [True, True]) == [1.0, 0.0]


@pytest.mark.parametrize("completion", [
    "", "122", "The answer is", "The answer is .", "The answer is 121.", "It is 122", "it is 122.",
    "It is 122。", "应该是 122.", "It is 121, 122, 123.", "It is 122 or 123.", "It is 121. It is 122.",
    "It is 122. It is 121.", "It is 122. It is 122.", "答案是 122。应该是 121。", "答案是 122 121。",
    "The answer is It is 122.", "It is 122.\n", "It is 0122.", "It is -122.", "It is 1 22.",
    "It is 122.0.", "It is 1220.", "It is 50 + 72.", "It is １２２.", "It is ١٢٢.", "It is not 122.",
    "The answer is 122. " + " ".join(map(str, range(200)))])
def test_no_other_text_is_right(completion):
    assert score("50 + 72 = ?", completion, "122") == 0.0


def write_run(folder, greedy, final, cpu):
    """A run of two updates as ppo.py leaves it: `greedy` {update: scores of the held-out tasks}."""
    folder.mkdir()
    rows = ["update,kl,eval_score", f"0,,{sum(greedy[0]) / len(greedy[0])}", "1,2.0,",
            f"2,4.0,{final}"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "samples.jsonl").write_text("".join(
        json.dumps(dict(update=update, score=right)) + "\n"
        for update, scores in greedy.items() for right in scores))
    (folder / "cost.json").write_text(json.dumps(dict(seconds=9.0, cpu=cpu)))
    return str(folder)


def test_the_table_is_made_of_what_the_runs_wrote(tmp_path):
    tasks = [{"user_input": "Add 59 and 72.", "answer": "131"},  # a carry
             {"user_input": "22 + 12 = ?", "answer": "34"},
             {"user_input": "请计算21 + 78。", "answer": "99"},
             {"user_input": "72和81哪个更大？", "answer": "81"}]  # 2 is more than 1
    runs = [write_run(tmp_path / "0", {0: [1, 0, 0, 0], 2: [1, 1, 0, 1]}, 0.75, 100),
            write_run(tmp_path / "1", {0: [0, 0, 0, 1], 2: [1, 1, 1, 1]}, 1.0, 140)]
    before = [checkable.row(out, tasks, last=False) for out in runs]
    after = [checkable.row(out, tasks) | dict(sampled=0.5, any=0.9) for out in runs]
    heading, _, first, last = checkable.table({"the SFT model": before, "PPO": after})
    assert heading.split(" | ")[1:5] == ["greedy", "no slip", "carries", "last digits"]
    assert first.split(" | ")[1:5] == ["0.25 (0.25 to 0.25)", "0.00 (0.00 to 0.00)",
                                       "0.50 (0.00 to 1.00)", "0.50 (0.00 to 1.00)"]
    assert last.strip("| ").split(" | ") == [
        "PPO", "0.88 (0.75 to 1.00)", "0.75 (0.50 to 1.00)", "1.00 (1.00 to 1.00)",
        "1.00 (1.00 to 1.00)", "0.50 (0.50 to 0.50)", "0.90 (0.90 to 0.90)", "3.00 (3.00 to 3.00)",
        "120.00 (100.00 to 140.00)"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Few tasks, and a random model in place of the SFT model."""
    folder = tmp_path_factory.mktemp("checkable")
    data_gen.main(["sums", "--out", f"{folder}/data", "--demonstrations", "300",
                   "--prompts", "64"])
    path = folder / "data" / "rlhf_training_data_eval.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8"))[:8]), "utf-8")
    tokenizer = load_tokenizer(f"{folder}/data/tokenizer")
    save_checkpoint(load_llama(None, tokenizer), tokenizer, f"{folder}/runs/sft")
    return folder


def tasks_of(folder):
    return json.loads((folder / "data" / "rlhf_training_data_eval.json").read_text("utf-8"))


def test_sums_of_numbers_that_python_does_not_read(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        data_gen.main(["sums", "--out", str(tmp_path), "--digits", "5000"])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line == "error: --digits 5000: at most 100\n"
    assert not list(tmp_path.iterdir())


def test_the_sums_of_the_demo_need_two_folders(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["exact_sums.py"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(f"{checkable.ROOT}/docs/exact_sums.py", run_name="__main__")
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith("usage: ") and line.count("\n") == 1


def test_a_run_of_a_fork_is_made_once(folder, monkeypatch, capsys):
    for size in ("batch_size", "minibatch_size", "micro_batch_size"):
        monkeypatch.setitem(checkable.SETTINGS, size, 8)
    checkable.prepare(str(folder), seed=0)  # all is there
    out = checkable.train(str(folder), 0, "GRPO", updates=1)
    row = checkable.row(out, tasks_of(folder))
    assert row["eval_score"] == row["sum"] == row["larger"] == row["none"] == 0.0 < row["cpu"]
    assert "GRPO: 0.000 right" in capsys.readouterr().err
    (folder / "forks" / "GRPO" / "ppo.py").write_text("this would fail")
    assert checkable.train(str(folder), 0, "GRPO", updates=1) == out


def test_samples_are_averaged_over_all_tasks(folder, monkeypatch):
    said = {}

    def odd(user_input, completion, answer):
        said.setdefault((user_input, answer), []).append(len(completion) % 2)
        return said[user_input, answer][-1]

    monkeypatch.setattr(checkable, "score", odd)
    found = checkable.sample(f"{folder}/runs/sft", tasks_of(folder))
    assert len(said) == 8 and all(len(right) == checkable.SAMPLES for right in said.values())
    assert found["sampled"] == pytest.approx(sum(map(sum, said.values())) / (8 * 8))
    assert found["any"] == sum(1 in right for right in said.values()) / 8
