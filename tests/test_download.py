"""`data_gen.py download`: huggingface_hub itself, on files where its cache puts them, and on a hub
that breaks off.

    pytest tests/test_download.py
"""

import hashlib
import http.server
import re

import pytest
from data_commands import EN, SHP, ZH, lines, pair, read, refused, run, write
from huggingface_hub import constants

from tools.data import download


@pytest.fixture
def hub_is(monkeypatch):
    """Changes what huggingface_hub has read from the environment."""

    def change(**settings):
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)

    return change


def cached(home, repository, path, text):
    """A file as the hub's cache lays it out."""
    repo = home / f"datasets--{repository.replace('/', '--')}"
    write(repo / "refs/main", "0123456789abcdef")
    write(repo / "snapshots/0123456789abcdef" / path, text)


def test_download_from_the_cache(tmp_path, capsys, hub_is):
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
    hub_is(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE=True)
    made = ["--make", "reward", "rlhf"]
    run("download", "hh", *made, path=tmp_path / "hh", number_of_samples=40)
    prompts = [
        r["user_input"]
        for twin in ("", "_eval")
        for r in read(tmp_path / f"hh/rlhf_training_data{twin}.json")
    ]
    assert sorted(prompts) == sorted(f"{folder} {i}" for folder in folders for i in range(10))
    assert len(read(tmp_path / "hh/reward_training_data.json")) == 2 * 38
    run("download", "shp", parts="askbaking", path=tmp_path / "shp", eval_share=0)
    assert read(tmp_path / "shp/reward_training_data.json") == pair(EN, 2.0) + pair(ZH, 3.0)
    line = refused(
        capsys, lambda: run("download", "shp", path=tmp_path / "x", parts="askvet"), code=1
    )
    assert "cannot be downloaded" in line and "data_gen.py import" in line
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


def test_download_goes_on_where_it_broke_off(tmp_path, serve, capsys, hub_is):
    # the library writes 10 MB at a time
    records = [
        SHP | {"history": f"Question {i} {'x' * 10**6}"} for i in range(24)
    ]
    hub = serve(BrokenHub, content=lines(records).encode(), cuts=1, missing="askhr", sent=[])
    hub_is(
        ENDPOINT=hub.address,
        HUGGINGFACE_CO_URL_TEMPLATE=constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
            constants.ENDPOINT, hub.address
        ),
        HF_HUB_CACHE=str(tmp_path / "hub"),
        HF_HUB_DISABLE_XET=True,
        HF_HUB_OFFLINE=False,
    )

    def shp():
        parts = ["--parts", "askvet", "askhr"]
        run("download", "shp", *parts, path=tmp_path / "shp", eval_share=0)

    with pytest.raises(SystemExit) as end:
        shp()
    said = capsys.readouterr().err
    assert (
        end.value.code == 1
        and "askhr/train.json: cannot be downloaded" in said
        and "Run this again" in said
    )
    assert [part for part, _ in hub.sent] == ["askvet"] * 2 and hub.sent[1][
        1
    ] >= 10_000_000  # not from 0
    assert not (tmp_path / "shp").exists()
    hub.missing = "nothing"
    shp()
    assert hub.sent[2:] == [("askhr", 0)]  # the first file is there
    assert len(read(tmp_path / "shp/reward_training_data.json")) == 2 * 24
