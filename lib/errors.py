"""One line that says what is wrong and where, in place of a traceback; files that appear whole."""

import contextlib
import errno
import functools
import os
import sys
import traceback

import torch
from tqdm import tqdm

from lib.distributed import end_processes, leave, started


def stop(message, code=2):
    """End the program with one line on standard error. Exit code 2: the input is wrong; 1: the run
    went wrong."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # not print: a progress bar may be on the line
    raise SystemExit(code)


def first_line(error):
    """The first line of an error's message: errors are reported in one line."""
    said = str(error).strip()
    if isinstance(error, KeyError) or not said:  # it says the key alone
        said = f"{type(error).__name__} {said}".strip()
    return said.split("\n")[0][:300]


@contextlib.contextmanager
def explain(what, advice="", code=2):
    """Whatever a library raises inside ends the program with the line `what (its message)advice`.
    For files from outside: the libraries that read them raise anything for a damaged one."""
    try:
        yield
    except Exception as error:
        said = getattr(error, "strerror", None) or first_line(error)  # an OSError has the former
        stop(f"{what} ({said}){advice}", code)


@contextlib.contextmanager
def quiet():
    """A context in which transformers prints nothing: what matters is checked and reported here."""
    from transformers.utils import logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def refuse_nan(what, tensors, advice="; did its training diverge?", code=2):
    """End the program with one line if one of {name: tensor} is not finite."""
    # One nan or inf makes a sum nan or inf. All sums are read at once: reading waits for the GPU.
    sums = {name: x.sum(dtype=torch.float32) for name, x in tensors.items()
            if x.is_floating_point()}
    device = next(iter(sums.values())).device
    if not torch.stack([x.to(device) for x in sums.values()]).isfinite().all():
        name = next(name for name, x in sums.items() if not x.isfinite())
        stop(f"{what}: {name} holds nan or inf{advice}", code)


def clean_exit(main):
    """Around a script's `main`: Ctrl-C outside a step ends in one line too. With many processes the
    group is destroyed at the end; a process that fails does not wait for the others."""
    @functools.wraps(main)
    def wrapped(argv=None):
        outermost = not started()  # ppo.py may call the main of other stages
        if hasattr(sys.stdout, "reconfigure"):  # a character that it lacks must not end a run
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            result = main(argv)
            if sys.stdout:
                sys.stdout.flush()  # at the exit its error would be a traceback
        except KeyboardInterrupt:
            tqdm.write("interrupted", file=sys.stderr)
            code = 130
        except SystemExit as end:
            code = end.code
        except Exception as error:
            code, number = 1, getattr(error, "errno", None)
            if number in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO):
                # the reader of our output, such as head, has left, or the disk is full: the exit
                # would fail to write the rest, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                if number != errno.EPIPE:
                    tqdm.write(f"error: {first_line(error)}", file=sys.stderr)
            elif started():
                traceback.print_exc()
            else:
                raise
        else:
            if outermost:
                end_processes()
            return result
        if started():
            leave(code)
        raise SystemExit(code)
    return wrapped


@contextlib.contextmanager
def replacing(path, advice="", code=2):
    """The name of a file to write beside `path`, which it then replaces: so `path` appears whole or
    not at all."""
    with explain(f"{path}: cannot be written", advice, code):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        try:
            yield path + ".part"
            with open(path + ".part", "rb+") as file:
                os.fsync(file.fileno())
            os.replace(path + ".part", path)
        finally:
            with contextlib.suppress(OSError):
                os.remove(path + ".part")


def write_whole(path, data, advice="", code=2):
    """Write bytes to `path`: the file appears whole or not at all."""
    with replacing(path, advice, code) as part, open(part, "wb") as file:
        file.write(data)
