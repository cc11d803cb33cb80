"""bench/forks: other algorithms, as small changes of ppo.py."""

import importlib.util
import math
import os
import shutil
import subprocess

import pytest
import torch

from makers import ROOT, read_rows, slow_values
from model import load_scalar_head

FORKS = sorted(path.stem for path in (ROOT / "bench" / "forks").glob("*.diff"))


@pytest.fixture
def fork(request, tmp_path):
    """(name, ppo.py with a fork's diff applied, as a module)."""
    shutil.copy(ROOT / "ppo.py", tmp_path / "ppo.py")
    diff = ROOT / "bench" / "forks" / f"{request.param}.diff"
    subprocess.run(
        ["git", "apply", diff],
        cwd=tmp_path,
        check=True,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
    )
    spec = importlib.util.spec_from_file_location(f"ppo_{request.param}", tmp_path / "ppo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return request.param, module


def slow_advantages(name, rewards, masks, group):
    """The advantage of each response, by loops; `rewards`, `masks`: lists, a row per response."""
    returns = [math.fsum(r for r, m in zip(row, mask) if m) for row, mask in zip(rewards, masks)]
    if name == "reinforce":
        return [r - math.fsum(returns) / len(returns) for r in returns]
    advantages = []
    for i, r in enumerate(returns):
        first = i // group * group
        everyone = returns[first : first + group]
        if name == "rloo":
            others = [x for j, x in enumerate(everyone) if first + j != i]
            advantages.append(r - math.fsum(others) / len(others))
        else:
            mean = math.fsum(everyone) / group
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in everyone) / (group - 1))
            advantages.append((r - mean) / max(deviation, 1e-4))
    return advantages


@pytest.mark.parametrize("fork", FORKS, indirect=True)
def test_each_fork_is_small_and_does_what_its_paper_says(
    fork, ppo_argv, rm_run, tmp_path, monkeypatch
):
    """Three updates; the advantages of each against a plain loop; a fork with groups answers each
    prompt so many times."""
    name, module = fork
    seen, make_experience = [], module.make_experience

    def keep(*given):
        experience, row = make_experience(*given)
        seen[-1]["experience"] = experience
        return experience, row

    def spy(function):
        works = getattr(module, function)

        def call(*given):
            result = works(*given)
            if function == "token_rewards":
                seen.append({})
            seen[-1][function] = (given, result)
            return result

        return call

    monkeypatch.setattr(module, "make_experience", keep)
    for function in ("token_rewards", "gae"):
        monkeypatch.setattr(module, function, spy(function))
    no_critic = name != "dense"
    argv = ppo_argv(
        updates=3, ppo_epochs=1, critic_lr=None if no_critic else 1e-3, out=tmp_path / "out"
    )
    module.main(argv)
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 4 and all(
        row["score"] is not None and row["kl"] is not None for row in rows[1:]
    )
    assert (tmp_path / "out" / "critic").exists() != no_critic
    for update in seen:
        experience = update["experience"]
        mask = experience["mask"]
        (scores, kl, _, kl_coef), rewards = update["token_rewards"]
        if name == "dense":
            reward_model = load_scalar_head(rm_run.folder)
            dense = update["gae"][0][0]
            for i, (prompt, response) in enumerate(experience["texts"]):
                with torch.no_grad():
                    values = slow_values(reward_model, prompt + response)
                potentials = [0.0, *values[len(prompt) : -1].tolist(), 0.0]
                for t in range(len(response)):
                    expected = rewards[i, t].item() + potentials[t + 1] - potentials[t]
                    assert dense[i, t].item() == pytest.approx(expected, abs=1e-3)
            continue
        assert kl_coef == (0.0 if name == "grpo" else 0.1) and "gae" not in update
        assert name != "grpo" or experience["kl_coef"] == 0.1  # of the loss, as --kl_target has it
        expected = slow_advantages(name, rewards.tolist(), mask.tolist(), 4)
        for i, advantage in enumerate(expected):
            length = int(mask[i].sum())
            assert experience["advantages"][i, :length].tolist() == pytest.approx(
                [advantage] * length, abs=1e-4
            )
            assert not experience["advantages"][i, length:].any()
        prompts = [prompt for prompt, _ in experience["texts"]]
        if name in ("rloo", "grpo"):
            assert (
                all(prompts[i] == prompts[i // 4 * 4] for i in range(8))
                and prompts[0] != prompts[4]
            )


@pytest.mark.parametrize("fork", ["grpo", "rloo"], indirect=True)
@pytest.mark.parametrize("size, group", [(8, 3), (8, 1)])
def test_a_batch_is_whole_groups(fork, size, group, ppo_argv, tmp_path, capsys):
    argv = ppo_argv(critic_lr=None, batch_size=size, group_size=group, out=tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        fork[1].main(argv)
    assert ended.value.code == 2 and "a multiple of --group_size" in capsys.readouterr().err


@pytest.mark.parametrize("fork", ["grpo"], indirect=True)
def test_the_kl_coefficient_in_the_loss_adapts(fork, ppo_argv, tmp_path, monkeypatch):
    """With --kl_target that of the second update is not --kl_coef."""
    _, module = fork
    used, policy_backward = [], module.policy_backward

    def spy(actor, parts, experience, *rest):
        used.append(experience["kl_coef"])
        policy_backward(actor, parts, experience, *rest)

    monkeypatch.setattr(module, "policy_backward", spy)
    module.main(ppo_argv(critic_lr=None, updates=2, ppo_epochs=1, kl_target=1, kl_horizon=20,
                         out=tmp_path / "out"))
    rows = read_rows(tmp_path / "out")[-2:]
    assert used == pytest.approx([row["kl_coef"] for row in rows for _ in range(2)], rel=1e-4)
    assert used[0] == 0.1 and used[-1] != 0.1


@pytest.mark.parametrize("fork", ["dense"], indirect=True)
def test_dense_rewards_need_a_reward_model_on_tokens(fork, ppo_argv, tmp_path, capsys):
    reward = tmp_path / "reward.py"
    reward.write_text("def score(user_input, completion):\n    return 1.0\n")
    with pytest.raises(SystemExit) as ended:
        fork[1].main(ppo_argv(rm=None, reward=reward, out=tmp_path / "out"))
    assert ended.value.code == 2 and "dense rewards" in capsys.readouterr().err


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_changes_at_most_60_lines(name):
    text = (ROOT / "bench" / "forks" / f"{name}.diff").read_text("utf-8")
    head, body = text.split("--- a/ppo.py\n")
    changed = [
        line for line in body.splitlines() if line[:1] in "+-" and not line.startswith("+++")
    ]
    assert len(changed) <= 60 and len(head.splitlines()) <= 12 and "What changes:" in head
    # more goes than comes
    assert name == "dense" or 2 * sum(line[0] == "-" for line in changed) > len(
        changed
    )
