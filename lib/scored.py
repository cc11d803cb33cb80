"""Scored completions: which of them a reward model compares."""

import json

import torch

from lib.data import encode_records, read_records
from lib.errors import stop
from lib.health import warn_of_labels


def group_by_prompt(records, examples):
    """[[index into `examples`, ...] of each prompt]: several records share a user_input and, where
    they have one, a `comparison`. (Answers in different comparisons were never compared, and their
    scores may not have the same scale.)"""
    groups = {}
    for i, (_, _, number) in enumerate(examples):
        record = records[number - 1]
        key = json.dumps([record["user_input"], record.get("comparison")], sort_keys=True)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def read_scored(path, tokenizer, max_length, ranking):
    """Scored completions -> [(prompt, completion, number of the record, from 1)] in tokens; of each
    prompt the indices of its completions, for `ranking` only where these have different scores; and
    all scores (n,)."""
    records = read_records(path, "user_input", "completion", "score")
    examples = encode_records(records, tokenizer, max_length, path)
    groups = group_by_prompt(records, examples)
    labels = torch.tensor([float(records[number - 1]["score"]) for _, _, number in examples],
                          dtype=torch.float64)  # any number that JSON can hold
    warn_of_labels(path, records, examples)
    if len(set(labels.tolist())) == 1:
        stop(f"{path}: every score is {labels[0]}, so there is nothing to learn")
    if not ranking:
        return examples, groups, labels
    useful, same = [], []
    for group in groups:
        (useful if len(set(labels[group].tolist())) > 1 else same).append(group)
    if not useful:
        stop(f"{path}: no prompt has two completions with different scores, so there is "
             "nothing to rank; --loss regression learns the scores themselves")
    if same:
        print(f"{path}: of {len(groups)} prompts, {len(same)} left out: no two completions "
              f"with different scores, such as record {examples[same[0][0]][2]}")
    return examples, useful, labels


def with_pairs(groups, labels):
    """Groups to measure the pair accuracy on: those of `groups` with different labels. Data for
    regression may have one completion per prompt; so if these hold fewer than half of the
    completions, any 64 completions form a group. (Data for ranking hold no other groups.)"""
    useful = [group for group in groups if len(set(labels[group].tolist())) > 1]
    if 2 * sum(map(len, useful)) >= sum(map(len, groups)):
        return useful
    together = sorted(i for group in groups for i in group)
    order = torch.randperm(len(together), generator=torch.Generator().manual_seed(0))
    return [[together[i] for i in part] for part in order.split(64)]
