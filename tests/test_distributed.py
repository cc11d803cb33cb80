"""lib/distributed.py in one process; with two: test_processes.py."""

import random

import pytest

from lib import distributed
from lib.distributed import micro_batches


@pytest.mark.parametrize("number, size", [(1, 3), (8, 1), (20, 3), (200, 8)])
def test_micro_batches_hold_each_row_once_and_no_more_than_fits(number, size):
    """No part is larger than `size` rows of the longest, padding included, and none could have
    taken the next row too."""
    rng = random.Random(number)
    lengths = [rng.randrange(1, 100) for _ in range(number)]
    parts, weights = zip(*micro_batches(range(number), lengths, size))
    assert sorted(i for part in parts for i in part) == list(range(number))
    assert set(weights) <= {1}
    most = size * max(lengths)
    for part, after in zip(parts, [*parts[1:], None]):
        assert len(part) * max(lengths[i] for i in part) <= most
        if after:
            assert (len(part) + 1) * lengths[after[0]] > most
    if number == 200:
        assert max(map(len, parts)) > 2 * size  # short rows go together


def test_no_rows_are_no_micro_batches():
    assert micro_batches([], [], 4) == []


@pytest.mark.parametrize("rows", [[6, 0, 1, 5], [4, 7]])
def test_all_processes_have_as_many_micro_batches(monkeypatch, rows):
    """One that has fewer repeats a row with weight 0; each row counts once."""
    lengths = [1, 1, 1, 30, 1, 40, 50, 2, 60]
    everyones = []
    monkeypatch.setattr(distributed, "WORLD", 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "RANK", rank)
        everyones.append(micro_batches(rows, lengths, 1))
    assert len(set(map(len, everyones))) == 1
    assert sorted(i for parts in everyones for part, weight in parts if weight for i in part) == (
        sorted(rows))
    assert {weight for parts in everyones for _, weight in parts} == {0, 1}
    assert all(part for parts in everyones for part, _ in parts)
