"""Held-out pair accuracy comes from the pairs that the loss learns from."""

import torch

import train_rm


def test_ranking_counts_only_pairs_of_one_prompt(monkeypatch):
    """One prompt whose two completions are in the right order, and five whose completions tie: the
    accuracy is 1, whatever the scores of different prompts are."""
    labels = torch.tensor([0.0, 1.0, *[3.0] * 5, *[2.0] * 5])
    scores = torch.tensor([5.0, 6.0, *[1.0] * 5, *[4.0] * 5])
    ties = [[2, 3], [4, 5], [6], [7, 8], [9, 10], [11]]
    monkeypatch.setattr(train_rm, "score_texts", lambda *_: scores)
    accuracy, margin, _, by_gap = train_rm.evaluate(None, None, [[0, 1]], labels, None, 0)
    assert (accuracy, margin, by_gap) == (1.0, 1.0, [(1.0, 1.0, 1)])
    # regression learns from all groups, and makes prompts comparable
    across, *_ = train_rm.evaluate(None, None, [[0, 1], *ties], labels, None, 0)
    pairs = [scores[i] > scores[j] for i in range(12) for j in range(12) if labels[i] > labels[j]]
    assert abs(across - float(sum(pairs) / len(pairs))) < 1e-6 and across < 0.5
