"""What the data commands share: their command line, and a journal of what was answered."""

import argparse
import hashlib
import json
import math
import os
import threading

from lib.errors import explain, stop
from lib.settings import any_whole, number_type


def parser_of(name, summary, example, *options):
    """The parser of `data_gen.py NAME`, with these options and those that every command has."""
    command = argparse.ArgumentParser(prog=f"data_gen.py {name}", description=summary,
                                      epilog=f"example:\n  {example}",
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--overwrite", action="store_true", help="replace files that are there")
    add_options(command, ("seed", 0, "seed of every random choice", any_whole), *options)
    return command


def add_options(command, *options):
    """Options of the command line: (name, default, what it is, type)."""
    for name, default, what, kind in options:
        if default is not None:
            what += f" (default: {default})"
        command.add_argument(f"--{name}", default=default, type=kind, help=what)


share = number_type("a number from 0 to below 1", lambda x: 0 <= x < 1)
not_negative = number_type("a number from 0", lambda x: 0 <= x < math.inf)
OUT = ("out", "data", "folder to write the data sets to", str)
EVAL_SHARE = ("eval_share", 0.05, "share of the prompts that is held out, in ..._eval", share)


# ------------------------------------------------------------------------------------------------
# The journal: no answer of an LLM, a model or a person is lost, or asked for again

def digest(*parts):
    """A short name of what was asked: equal for equal parts, which are what JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class Journal:
    """{digest of what was asked: answer, a dict} as JSON Lines. An answer is on disk when `add`
    returns.

    The files in `outputs` are made of these answers and of the file `source`; `how`, {option:
    value}, is what else they depend on. If one is there without a journal at `path`, or was made of
    another source or in another way, the program ends, unless it is to `overwrite` them.
    """

    def __init__(self, path, outputs, source, overwrite, how):
        there = [output for output in outputs if os.path.exists(output)]
        if there and not os.path.exists(path) and not overwrite:
            stop(f"{there[0]}: already exists; name another --out, or give --overwrite to "
                 "replace it")
        self.path, self.answers, self.lock, whole = path, {}, threading.Lock(), 0
        with explain(f"{path}: cannot be written"):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self.file = open(path, "a+b")
            self.file.seek(0)
            for line in self.file:
                if line.endswith(b"\n"):
                    whole += len(line)
                    self.read(line)
            self.file.truncate(whole)  # the last line may be half written
        made_of = how | dict(path=os.path.relpath(source, os.path.dirname(path) or "."))
        before = made_of | self.answers.get("source", {})
        for name, value in made_of.items() if there and not overwrite else ():
            if before[name] != value:
                made = f"of {before[name]}" if name == "path" else f"with another {name}"
                stop(f"{there[0]}: was made {made}; name another --out, or give --overwrite to "
                     "replace it")
        if self.answers.get("source") != made_of:
            self.add("source", made_of)

    def read(self, line):
        try:
            entry = json.loads(line)
            self.answers[entry.pop("key")] = entry
        except (ValueError, LookupError, AttributeError, TypeError):
            pass  # a damaged line is asked for again

    def add(self, key, answer):
        with self.lock:
            self.file.write(json.dumps({"key": key} | answer).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
            self.answers[key] = answer


def journal_of(args, *more, **how):
    """The journal of a command that makes the file --out of another, and `more` beside it. `how`:
    the options on which the result depends."""
    if os.path.realpath(args.out) == os.path.realpath(args.file):
        stop(f"--out {args.out}: is the file that is read; name another")
    return Journal(args.out + ".journal.jsonl", [args.out, *more], args.file, args.overwrite, how)
