"""The warnings of ppo.py: each at its condition, none for a healthy run.

    pytest tests/test_warnings.py
"""

import pytest

import ppo

HEALTHY = dict(score=0.5, kl=1.4, kl_error=0.1, clip_fraction=0.1, entropy=0.5, explained_variance=0.6, response_length=12.0, ended=0.98)


def run(number=30, **last):
    """The rows of a healthy run, with the given values in its last ten."""
    return [dict(HEALTHY, **(last if i >= number - 10 else {})) for i in range(number)]


@pytest.mark.parametrize("name, values", [
    ("negative KL", dict(kl=-0.5)), ("KL running away", dict(kl=9.0)), ("clipping", dict(clip_fraction=0.6)), ("entropy", dict(entropy=0.04)),
    ("critic", dict(explained_variance=-0.2)), ("cut responses", dict(ended=0.3))])
def test_each_at_its_condition(name, values):
    assert list(ppo.unhealthy(run(**values))) == [name]


@pytest.mark.parametrize("values", [{}, dict(kl=-0.3), dict(kl=5.9, clip_fraction=0.45), dict(entropy=0.06), dict(explained_variance=0.01), dict(ended=0.6)])
def test_none_within_the_usual(values):
    assert ppo.unhealthy(run(**values)) == {}


def test_a_long_response_may_be_further_away():
    assert "KL running away" not in ppo.unhealthy(run(kl=20.0, response_length=100.0))


def test_a_young_critic_is_given_time():
    assert ppo.unhealthy(run(number=10, explained_variance=-3.0)) == {}


@pytest.mark.parametrize("score, gold, warns", [(1.2, 3.9, True), (1.2, 4.4, False), (0.7, 3.9, False)])
def test_overoptimization(score, gold, warns):
    rows = run() + [dict(HEALTHY, eval_score=0.8, eval_gold=4.5)] + run(5) + [dict(HEALTHY, eval_score=score, eval_gold=gold)]
    assert list(ppo.unhealthy(rows)) == ["over-optimization"] * warns
