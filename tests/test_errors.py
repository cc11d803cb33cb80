"""Files appear whole or not at all."""

import io
import os
import subprocess
import sys

import pytest

from lib.errors import clean_exit, write_whole
from makers import ROOT, refused, write


def test_write_whole(tmp_path):
    path = str(tmp_path / "new" / "folder" / "file")
    for data in (b"one", b"two, longer", b""):
        write_whole(path, data)
        with open(path, "rb") as file:
            assert file.read() == data
        assert os.listdir(tmp_path / "new" / "folder") == ["file"]


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_write_whole_leaves_the_old_file_when_the_disk_is_full(tmp_path, capfd, monkeypatch, fault):
    path = write(tmp_path / "file", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fault, full)
    line = refused(capfd, write_whole, path, b"new")
    assert line == f"error: {path}: cannot be written (No space left on device)\n"
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]  # and no part of the new one


def test_write_whole_where_nothing_can_be_written(tmp_path, capfd):
    (tmp_path / "folder").mkdir()
    blocked = write(tmp_path / "plain", "x")
    for path in (str(tmp_path / "folder"), blocked + "/below"):
        assert f"error: {path}: cannot be written" in refused(capfd, write_whole, path, b"data")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("flush", [False, True])
def test_output_that_cannot_be_written_is_told_in_one_line(flush):
    code = f"from lib.errors import clean_exit; clean_exit(lambda argv: print(1, flush={flush}))()"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE,
                              text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_a_character_that_the_output_lacks_ends_nothing(monkeypatch):
    """As where Windows redirects a program."""
    bytes_ = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_, "cp1252", write_through=True))
    clean_exit(lambda argv: print("答 and é"))()
    assert bytes_.getvalue().decode("cp1252").strip() == "\\u7b54 and é"
