"""`data_gen.py download`: huggingface_hub itself, on files where its cache puts them, and on a hub
that breaks off.

    pytest tests/test_download.py
"""

import hashlib
import http.server
import os
import re
import subprocess
import sys

import pytest
from data_commands import EN, ROOT, SHP, ZH, lines, pair, read, refused, run, write

from tools.data import download


def subprocess_run(argv, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        [sys.executable, ROOT / "data_gen.py", *map(str, argv)],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def cached(home, repository, path, text):
    """A file as the hub's cache lays it out."""
    repo = home / f"datasets--{repository.replace('/', '--')}"
    write(repo / "refs/main", "0123456789abcdef")
    write(repo / "snapshots/0123456789abcdef" / path, text)


def test_download_from_the_cache(tmp_path, capsys):
    folders = download.HUB["hh"][1]
    for folder in folders:
        cached(
            tmp_path / "hub",
            "Anthropic/hh-rlhf",
            f"{folder}/train.jsonl.gz",
            lines(
                {
                    "chosen": f"\n\nHuman: {folder} {i}\n\nAssistant: Good.",
                    "rejected": f"\n\nHuman: {folder} {i}\n\nAssistant: Bad.",
                }
                for i in range(20)
            ),
        )
    cached(
        tmp_path / "hub",
        "stanfordnlp/SHP",
        "askbaking/train.json",
        lines([SHP, SHP | {"history": ZH, "score_ratio": 7.0}]),
    )
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    hh = subprocess_run(
        [
            "download",
            "hh",
            "--path",
            tmp_path / "hh",
            "--number_of_samples",
            40,
            "--make",
            "reward",
            "rlhf",
        ],
        **env,
    )
    assert hh.returncode == 0, hh.stderr
    prompts = [
        r["user_input"]
        for twin in ("", "_eval")
        for r in read(tmp_path / f"hh/rlhf_training_data{twin}.json")
    ]
    assert sorted(prompts) == sorted(f"{folder} {i}" for folder in folders for i in range(10))
    assert len(read(tmp_path / "hh/reward_training_data.json")) == 2 * 38
    shp = subprocess_run(
        ["download", "shp", "--parts", "askbaking", "--path", tmp_path / "shp", "--eval_share", 0],
        **env,
    )
    assert shp.returncode == 0, shp.stderr
    assert read(tmp_path / "shp/reward_training_data.json") == pair(EN, 2.0) + pair(ZH, 3.0)
    lacking = subprocess_run(
        ["download", "shp", "--parts", "askvet", "--path", tmp_path / "x"], **env
    )
    assert lacking.returncode == 1 and len(lacking.stderr.strip().split("\n")) == 1
    assert "cannot be downloaded" in lacking.stderr and "data_gen.py import" in lacking.stderr
    line = refused(
        capsys, lambda: run("download", "shp", path=tmp_path / "x", parts="askme")
    )
    assert "askbaking" in line and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "option, value", [("make", "rlhf"), ("parts", "x"), ("number_of_samples", 3), ("eval_share", 0)]
)
def test_the_ratings_come_whole(tmp_path, capsys, option, value):
    line = refused(
        capsys, lambda: run("download", "ratings", path=tmp_path / "x", **{option: value})
    )
    assert f"--{option}" in line and not (tmp_path / "x").exists()


class BrokenHub(http.server.BaseHTTPRequestHandler):
    """Serves one text under every name as the hub does, except `missing`; cuts the connection in
    the middle of the first `cuts`."""

    def do_HEAD(self):
        content, start = self.server.content, 0
        if "/resolve/" not in self.path or self.server.missing in self.path:
            return self.send_error(404)
        if wanted := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(self.path.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        return start

    def do_GET(self):
        if (start := self.do_HEAD()) is not None:
            self.server.sent.append((self.path.split("/")[-2], start))
            self.server.cuts -= 1
            self.wfile.write(
                self.server.content[
                    start : len(self.server.content) // 2 if self.server.cuts >= 0 else None
                ]
            )

    def log_message(self, *args):
        pass


def test_download_goes_on_where_it_broke_off(tmp_path, serve):
    # the library writes 10 MB at a time
    records = [
        SHP | {"history": f"Question {i} {'x' * 8000}"} for i in range(3000)
    ]
    hub = serve(BrokenHub, content=lines(records).encode(), cuts=1, missing="askhr", sent=[])
    argv = [
        "download",
        "shp",
        "--parts",
        "askvet",
        "askhr",
        "--path",
        tmp_path / "shp",
        "--eval_share",
        0,
    ]
    env = {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
    }
    first = subprocess_run(argv, **env)
    assert (
        first.returncode == 1
        and "askhr/train.json: cannot be downloaded" in first.stderr
        and "Run this again" in first.stderr
    )
    assert [part for part, _ in hub.sent] == ["askvet"] * 2 and hub.sent[1][
        1
    ] >= 10_000_000  # not from 0
    assert not (tmp_path / "shp").exists()
    hub.missing = "nothing"
    again = subprocess_run(argv, **env)
    assert again.returncode == 0, again.stderr
    assert hub.sent[2:] == [("askhr", 0)]  # the first file is there
    assert len(read(tmp_path / "shp/reward_training_data.json")) == 2 * 3000
