"""A function of the user's that scores texts, in a Python file: --reward, --gold, and `data_gen.py
score`. lib/rewards.py and docs/reward.md say how it is written."""

import inspect
import numbers
import os
import runpy
import sys
import traceback

import torch

from lib.errors import explain, first_line, stop


class Judge:
    """The function of a Python file, `score` of one text or `scores` of many:

        judge(records, completions, ended) -> their scores, finite floats

    `records`: those of the prompts; `ended`: whether each response ended, or was cut. A parameter
    named `ended` gets that. Every other one beside user_input and completion is a field of the
    record, which may lack it if the parameter has a default. `**record` gets all fields that are
    left. `scores` gets a list of each. The first two parameters may have other names.
    """

    def __init__(self, option, path):
        """Ends the program with one line if there is no such function."""
        self.path, pair = path, ["user_input", "completion"]
        with explain(f"{option} {path}: not a Python file with a function score(user_input, "
                     "completion), or scores(user_inputs, completions)"):
            found = runpy.run_path(path)
            self.batched = callable(found.get("scores"))
            self.function = found["scores" if self.batched else "score"]
            if not callable(self.function):
                raise TypeError("score is not a function")
        if self.batched:
            pair = ["user_inputs", "completions"]
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # some of those written in C do not say
            parameters = inspect.signature(lambda *given: 0).parameters.values()
        kinds = {kind: [p for p in parameters if p.kind == kind] for kind in
                 (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)}
        any_number, self.takes_all = map(bool, kinds.values())
        named = {p.name: p for p in parameters if p not in sum(kinds.values(), [])}
        in_order = [p.name for p in named.values() if p.kind != inspect.Parameter.KEYWORD_ONLY]
        # the names of the parameters that get user_input and completion: these, wherever they
        # stand, or whatever stands first and second
        self.pair = [name if name in named else
                     in_order[i] if i < len(in_order) and in_order[i] not in pair else None
                     for i, name in enumerate(pair)]
        self.by_place = any_number and not in_order or self.pair == in_order[:2]
        if not self.by_place and self.pair[1] is None:
            stop(f"{option} {path}: {'scores' if self.batched else 'score'} has no parameter "
                 f"{pair[1]}")
        self.wants_ended = "ended" in named and "ended" not in self.pair
        self.fields = {name: p.default is p.empty for name, p in named.items()
                       if name not in (*self.pair, "ended")}  # whether it must be there

    def check(self, path, records):
        """Ends the program with one line if these records lack a field, or if it is not clear what
        a parameter is."""
        for number, record in enumerate(records, 1):
            where = f"{path}: record {number}"
            for field in (name for name, needed in self.fields.items() if needed):
                if field not in record:
                    stop(f"{where}: field '{field}' is missing, a parameter of {self.path}")
            for name, what in zip(self.pair, ("user_input", "completion")):
                if name in record and name != what:
                    stop(f"{where}: has a field '{name}', but in {self.path} the parameter of that "
                         f"name gets the {what}: rename one of them")
            if self.wants_ended and "ended" in record:
                stop(f"{where}: has a field 'ended', but in {self.path} the parameter of that name "
                     "says whether the response ended: rename the field")

    def ask(self, records, completions, ended):
        """What the function gives for these texts, a list; raises what it raises."""
        there = dict.fromkeys(name for record in records for name in record)
        names = [name for name in self.fields if name in there]
        if self.takes_all:
            names += [name for name in there if name not in (*names, *self.pair)]
        by_name = {name: [record.get(name) for record in records] for name in names}
        if self.wants_ended:
            by_name["ended"] = list(ended)
        texts = [[record["user_input"] for record in records], list(completions)]
        if not self.by_place:
            by_name |= {name: text for name, text in zip(self.pair, texts) if name}
            texts = []
        if self.batched:
            scores = self.function(*texts, **by_name)
            if isinstance(scores, (str, dict)) or not hasattr(scores, "__len__"):
                raise TypeError(f"scores gave {described(scores)}, not a list of numbers")
            if len(scores) != len(records):
                raise ValueError(f"{len(scores)} scores for {len(records)} texts")
            return list(scores)
        return [self.function(*(text[i] for text in texts),
                              **{name: values[i] for name, values in by_name.items()})
                for i in range(len(records))]

    @torch.random.fork_rng(devices=[])  # random numbers that it draws move nothing of the run
    def __call__(self, records, completions, ended):
        scores, texts = [], list(zip(records, completions, ended))
        for group in [texts] if self.batched else [[text] for text in texts]:
            asked = group[0][0]["user_input"]
            try:
                for (record, *_), score in zip(group, self.ask(*zip(*group))):
                    asked = record["user_input"]
                    scores.append(number(score))
            except (Exception, SystemExit) as error:
                lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                         if os.path.realpath(frame.filename) == os.path.realpath(self.path)]
                where = f"line {lines[-1]}: {type(error).__name__}: " if lines else ""
                stop(f"{self.path}: {where}{first_line(error)}, on a response to "
                     f"{str(asked)[:100]!r}", code=1)
        return scores


def described(value):
    """A value that is no score, in a few words."""
    if value is None or isinstance(value, (str, float)):
        return repr(value)[:100]
    return f"{repr(value)[:100]} ({type(value).__name__})"


def number(score):
    """A score as a float; one of numpy or torch is a number, too. Raises ValueError for anything
    else."""
    if getattr(score, "ndim", None) == 0:
        score = score.item()
    if not isinstance(score, numbers.Real) or not abs(score) <= sys.float_info.max:
        raise ValueError(f"the score is {described(score)}, which is not a finite number")
    return float(score)
