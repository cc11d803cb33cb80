"""The run directory: metrics, and when its state is saved (lib/state.py) and put back.

    runs/sft/metrics.csv   a row per logged step        runs/sft/curves.png   drawn from it
    runs/ppo/samples.jsonl a row per held-out answer of each evaluation
    runs/sft/last/         the state to resume from     runs/sft/*            the exported model
"""

import contextlib
import csv
import errno
import glob
import itertools
import json
import os
import re
import shutil
import time

import torch
from tqdm import tqdm

from lib import kernels, state
from lib.curves import draw_curves
from lib.distributed import RANK, WORLD, wait_for_all
from lib.errors import explain, stop
from lib.signals import Signals

TIDY_EVERY = 60  # seconds; memory that was given back is slow to get again, page by page
LOGS = ["metrics.csv", "samples.jsonl"]  # --resume cuts off what came after the saved state
SAVED_IS_LEFT = "; --resume continues from what is saved in last/"
# files that a new run removes first, since they would say that the model is whole
RESULTS = ["config.json", "critic/config.json", "curves.png", *LOGS]


def inputs_of(args, settings):
    """{setting: path} of the files and folders that a run reads: what the first group of its table
    names, but --out. (A hub name is neither.)"""
    first_group = itertools.takewhile(lambda row: not isinstance(row, str), settings[1:])
    names = [row[0] for row in first_group if row[0] != "out" and not isinstance(row[-1], list)]
    given = {name: path for name in names if isinstance(path := getattr(args, name), str)}
    if given.get("reward"):  # it takes the place of --rm
        given.pop("rm", None)
    return {name: path for name, path in given.items() if os.path.exists(path)}


def locked(folder):
    """The file `folder`/.lock, locked while it is open and this process lives, however it ends; or
    the program ends with one line, since another process holds it."""
    try:
        import fcntl
    except ImportError:  # on Windows
        return None
    with explain(f"{folder}: cannot be written"):
        file = open(os.path.join(folder, ".lock"), "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            stop(f"{folder}: another run is writing there; wait for its end, or name another --out")
        # else the file system has no locks
    return file


class Run:
    """A run in `args.out`: its metrics, its saved state, its progress bar.

    `settings`: the stage's table (lib.settings). `metrics`: a row (column, what it is) or (column,
    what it is, panel, label) of each; the columns of metrics.csv, and the panels of curves.png.

    Made before anything is loaded: it refuses a folder that holds another run. `begin` once all
    input is read: only then does an earlier run in the folder end, or the folder get a file.
    """

    def __init__(self, args, name, settings, metrics):
        self.args, self.folder, self.name, self.state = args, args.out, name, None
        self.settings, self.metrics = settings, metrics
        self.last = os.path.join(args.out, "last")
        if args.resume and args.overwrite:
            stop("--resume continues a run, --overwrite starts it over: give one of them")
        holds = [name for name in [*RESULTS, "last", "tensorboard"]
                 if os.path.exists(os.path.join(args.out, name))] + self.exports()
        if holds and not (args.resume or args.overwrite):
            stop(f"{args.out}: holds an earlier run; --resume continues it, --overwrite "
                 "replaces it, --out names another")
        for setting, path in inputs_of(args, settings).items():
            whole_out, whole_path = (os.path.join(os.path.realpath(name), "")
                                     for name in (args.out, path))
            if whole_out.startswith(whole_path) or whole_path.startswith(whole_out):
                stop(f"--out {args.out} and --{setting} {path} overlap: a run does "
                     "not write where it reads; name another --out")
        if args.tensorboard:
            with explain("--tensorboard needs a package", ": pip install tensorboard"):
                from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        with explain(f"{args.out}: cannot be written"):
            os.makedirs(args.out, exist_ok=True)
        if torch.device(args.device).type == "cpu":
            kernels.keep_freed_memory()
        self.tidy_at = 0.0
        if args.resume and os.path.exists(os.path.join(self.last, "state.json")):
            self.state = state.read(self.last, args)
        elif args.resume and "curves.png" in holds:  # it is complete
            stop(f"{self.last}: missing, so this run cannot be resumed; another --out starts a new "
                 "one")
        elif args.resume and holds:
            print(f"{self.last}: nothing was saved there: the run starts from the beginning")

    def begin(self, steps, trained, generators, kept):
        """Open metrics.csv, and put back what was saved -> `kept`, as it was saved or else as it is
        given: a dict of numbers, texts and lists, which the caller changes and each `save` holds.

        `trained`: {name: (model, its optimizer)}; `generators`: {name: torch.Generator}.
        """
        self.trained, self.generators = trained, generators
        self.inputs = {name: state.fingerprint(path)
                       for name, path in inputs_of(self.args, self.settings).items()}
        for name, before in (self.state or {}).get("inputs", {}).items():
            if self.inputs.get(name) != before and not self.args.accept_changed_data:
                stop(f"--{name} {getattr(self.args, name)}: no longer what it was when this run "
                     "was saved; --accept_changed_data continues with it as it is now")
        self.lock = locked(self.folder) if RANK == 0 else None
        wait_for_all()  # until each process has seen what the folder held
        path = os.path.join(self.folder, "metrics.csv") if RANK == 0 else os.devnull
        with explain(f"{path}: cannot be written"):
            if RANK == 0 and self.state is None:
                for name in [*RESULTS, "last/state.json"]:
                    if os.path.exists(os.path.join(self.folder, name)):
                        os.remove(os.path.join(self.folder, name))
                for name in [*self.exports(), self.last, os.path.join(self.folder, "tensorboard")]:
                    shutil.rmtree(name, ignore_errors=True)
            elif RANK == 0:
                for name, size in self.state["log_bytes"].items():
                    log = os.path.join(self.folder, name)
                    there = os.path.getsize(log) if os.path.exists(log) else 0
                    if there < size:
                        stop(f"{log}: {there} bytes, where the saved state counts {size}: put it "
                             "back as it was; another --out starts a new run")
                    if there:
                        os.truncate(log, size)
            self.file = open(path, "a" if self.state else "w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, [column for column, *_ in self.metrics])
        if self.state is None:
            self.writer.writeheader()
            self.file.flush()
        self.kept = kept
        if self.state:  # a state of earlier code may lack a field
            self.kept = kept | state.restore(self.state, self.last, trained, generators)
        self.step, self.steps = self.kept.pop("step", 0), steps
        if self.step > steps:
            stop(f"{self.folder}: {self.step} steps are done, and with the data as it is now there "
                 f"are {steps} in all: nothing is left to do")
        self.board = None
        if self.args.tensorboard and RANK == 0:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(os.path.join(self.folder, "tensorboard"),
                                       purge_step=self.step + 1 if self.state else None)
        self.signals = Signals()
        self.bar = tqdm(total=steps, initial=self.step, desc=self.name, dynamic_ncols=True,
                        disable=RANK > 0)
        return self.kept

    def log(self, **row):
        """A row of metrics.csv, on disk at once. Fields that a step does not have stay empty."""
        if strangers := row.keys() - set(self.writer.fieldnames):
            raise KeyError(f"{min(strangers)}: logged, but not in the table METRICS")
        with explain(f"{self.file.name}: cannot be written", SAVED_IS_LEFT, code=1):
            self.writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value
                                  for key, value in row.items()})
            self.file.flush()
        if self.board:
            step = self.writer.fieldnames[0]
            for name, value in row.items():
                if name != step and value is not None:
                    self.board.add_scalar(name, value, row[step])
            self.board.flush()

    def log_samples(self, step, samples):
        """Append what an evaluation answered, dicts, to samples.jsonl, on disk at once -> the
        answers."""
        answers = [sample["completion"] for sample in samples]
        if RANK > 0 or not samples:
            return answers
        path = os.path.join(self.folder, "samples.jsonl")
        with explain(f"{path}: cannot be written", SAVED_IS_LEFT, code=1):
            with open(path, "a", encoding="utf-8") as file:
                for number, sample in enumerate(samples, 1):
                    row = dict(update=step, number=number, **sample)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        if self.board:  # four spaces: Markdown leaves it as it is
            text = json.dumps(samples, ensure_ascii=False, indent=1)
            self.board.add_text("samples", "    " + text.replace("\n", "\n    "), step)
        return answers

    def end_step(self, postfix, export):
        """Move the bar; save the state where it is due; end the run after a signal.
        `export(folder)` writes the model as it is now, for --keep."""
        self.step += 1
        self.bar.set_postfix_str(postfix, refresh=False)
        self.bar.update()
        if torch.device(self.args.device).type == "cpu" and time.monotonic() > self.tidy_at:
            kernels.return_freed_memory()
            self.tidy_at = time.monotonic() + TIDY_EVERY
        self.signals.agree()
        if self.step % self.args.save_every == 0 or self.step == self.steps or self.signals.caught:
            if self.signals.caught:  # there may be little time
                self.save()
            if self.args.keep:  # before the state, which says that this step is done
                export(os.path.join(self.folder, f"step-{self.step}"))
                for old in self.exports()[:-self.args.keep] if RANK == 0 else []:
                    shutil.rmtree(old, ignore_errors=True)  # a link, or open elsewhere: it stays
            if not self.signals.caught:
                self.save()
        if self.signals.caught:
            self.signals.leave(self.folder)

    @contextlib.contextmanager
    def saved_if_it_ends(self):
        """For code that learns nothing, but draws random numbers and may end the program, as a
        judge that fails does: the state before it is then saved. (Not with many processes, which
        would have to save together.)"""
        states = torch.get_rng_state(), *(g.get_state() for g in self.generators.values())
        try:
            yield
        except SystemExit:
            if WORLD == 1 and self.step:
                torch.set_rng_state(states[0])
                for generator, before in zip(self.generators.values(), states[1:]):
                    generator.set_state(before)
                self.save()
                print(f"saved in {self.last}: --resume continues from there")
            raise

    def finish(self):
        """The end of the last step: `curves.png`."""
        self.bar.close()
        self.signals.restore()
        self.file.close()
        if self.lock:
            self.lock.close()
        if self.board:
            self.board.close()
        if RANK == 0:
            with explain(f"{self.folder}/curves.png: cannot be drawn", "; the model is saved", 1):
                draw_curves(self.folder, self.metrics)
        print(f"saved {self.folder}")
        if self.signals.came:  # after the last step; whoever started this run may go no further
            raise SystemExit(128 + self.signals.came)

    def exports(self):
        """The folders step-N, the newest last."""
        found = [name for name in glob.glob(os.path.join(glob.escape(self.folder), "step-*"))
                 if re.fullmatch(r"step-\d+", os.path.basename(name))]  # not a copy of the user's
        return sorted(found, key=lambda name: int(name.rsplit("-", 1)[1]))

    def save(self):
        """Write `last/`: all that is needed to continue exactly as if nothing had happened."""
        tensors = state.tensors_of(self.trained, self.generators)
        if RANK > 0:
            return
        with explain(f"{self.file.name}: cannot be written", "; what was saved before stays",
                     code=1):
            os.fsync(self.file.fileno())
        logs = {name: os.path.join(self.folder, name) for name in LOGS}
        log_bytes = {name: os.path.getsize(path) if os.path.exists(path) else 0
                     for name, path in logs.items()}
        state.write(self.last, tensors, dict(
            log_bytes=log_bytes, settings=vars(self.args), inputs=self.inputs,
            progress=dict(self.kept, step=self.step)))
