"""Ctrl-C and SIGTERM end a run after its step, and nothing is lost."""

import signal
import sys
import threading

from tqdm import tqdm

from lib.distributed import RANK, largest, wait_for_all


class Signals:
    """Ctrl-C and SIGTERM let the step finish: after `agree`, `caught` is the signal, 0 without one.
    A second one ends the program at once."""

    def __init__(self):
        self.came = self.caught = 0
        in_main_thread = threading.current_thread() is threading.main_thread()  # only there
        self.before = {number: signal.signal(number, self.catch)
                       for number in (signal.SIGINT, signal.SIGTERM) if in_main_thread}

    def catch(self, number, frame):
        self.came = number
        self.restore()

    def agree(self):
        """Signals reach the processes at different moments; all must end after the same step."""
        self.caught = largest(self.came)

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, folder):
        """The end of an interrupted run, its state being saved: exit code 128 + the signal's
        number."""
        wait_for_all()  # rank 0 saves, and where one process ends, torchrun ends all
        self.restore()
        if RANK == 0:
            tqdm.write(f"interrupted; saved in {folder}/last: the same command with --resume "
                       "continues", file=sys.stderr)
        raise SystemExit(128 + self.caught)
