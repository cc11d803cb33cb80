"""tools/look.py, and what it reads: samples.jsonl; --tensorboard.

    pytest tests/test_look.py

The page is opened in headless Chromium and used as a person would; without a browser these tests
are skipped (Debian: apt install chromium).
"""

import base64
import csv
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

import data_gen
import ppo
import train_rm
from lib.settings import COMMON
from model import load_scalar_head, load_tokenizer, random_llama, save_checkpoint
from tools import look
from tools.texts import pieces

BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])),
               None)
NASTY = [
    "</script><script>window.pwned = 1</script>",
    '"quotes" \'single\' & <b>bold</b> <img src=x onerror="window.pwned = 1">',
    "你好，七加八是多少？",
    "emoji 😀👩‍👩‍👧 and\nnew\n\nlines\tand tabs \\ \\u003c",
    "<!-- <script> \u2028 \u2029 -->" + "verylongword" * 40,
]


def run_ppo(home, out, *more):
    ppo.main(["--sft", home.sft, "--rm", home.rm, "--prompts", home.prompts, "--eval_prompts",
              home.prompts, "--gold", home.gold, "--updates", "3", "--batch_size", "4",
              "--minibatch_size", "4", "--max_new_tokens", "12", "--eval_every", "1",
              "--max_prompt_length", "400", "--lr", "1e-3", "--critic_lr", "1e-3",
              "--save_every", "1", "--out", str(out), *more])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs of a tiny random LLaMA on prompts and completions that would be HTML, if they could."""
    folder = tmp_path_factory.mktemp("look")
    home = SimpleNamespace(folder=folder, **{name: str(folder / name) for name in (
        "sft", "rm", "ppo", "prompts", "gold", "scored")})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(
        data_gen.train_tokenizer([f"{text} {n}" for text in NASTY for n in range(20)], 330))
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=1024, initializer_range=0.2,
                         tie_word_embeddings=True)
    save_checkpoint(random_llama(config), tokenizer, home.sft)

    def write(path, records):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(records, file)

    write(home.prompts, [dict(user_input=text) for text in NASTY])
    write(home.scored, [dict(user_input=text, completion=completion, score=float(score))
                        for text in NASTY for score, completion in enumerate(NASTY)])
    with open(home.gold, "w", encoding="utf-8") as file:
        file.write("def score(user_input, completion):\n    return len(completion) / 10\n")
    train_rm.main(["--model", home.sft, "--data", home.scored, "--eval_data", home.scored,
                   "--demonstrations", home.scored, "--batch_size", "2", "--epochs", "2",
                   "--lr", "1e-3", "--max_length", "900", "--out", home.rm])
    run_ppo(home, home.ppo)
    return home


def samples_of(folder):
    with open(os.path.join(folder, "samples.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file.read().split("\n")[:-1]]


def metrics_of(folder):
    """{column: [(update, value)]} of metrics.csv."""
    with open(os.path.join(folder, "metrics.csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [(int(row["update"]), float(row[name])) for row in rows if row[name]]
            for name in list(rows[0])[1:] if any(row[name] for row in rows)}


# ------------------------------------------------------------------------------------------------
# samples.jsonl

def test_every_evaluation_leaves_every_answer(home):
    samples = samples_of(home.ppo)
    assert [(s["update"], s["number"]) for s in samples] == [
        (update, number) for update in range(4) for number in range(1, 6)]
    for row in samples:
        assert row["user_input"] == NASTY[row["number"] - 1]
        assert row["gold"] == len(row["completion"]) / 10
        assert 1 <= row["length"] <= 12 and (row["ended"] or row["length"] == 12)
        assert row["ended"] or row["score"] == -1.0  # --no_eos_score
    for name in ("score", "gold"):
        for update, mean in metrics_of(home.ppo)["eval_" + name]:
            of = [s[name] for s in samples if s["update"] == update]
            assert len(of) == 5 and mean == pytest.approx(sum(of) / 5, rel=1e-5)


def test_resume_forgets_what_came_after_the_saved_state(home, tmp_path):
    """A run that died after its last saved state: its samples, a half-written line among them, are
    cut off, and the end is that of a run that was never interrupted."""
    run_ppo(home, tmp_path / "run", "--save_every", "2")
    os.rename(tmp_path / "run", tmp_path / "whole")
    whole = samples_of(tmp_path / "whole")

    class Died(Exception):
        pass

    def die(update, *given):
        if update == 3:
            raise Died
        return show(update, *given)

    with pytest.MonkeyPatch.context() as patch:
        show = ppo.health.show
        patch.setattr(ppo.health, "show", die)
        with pytest.raises(Died):
            run_ppo(home, tmp_path / "run", "--save_every", "2")
    with open(tmp_path / "run" / "samples.jsonl", "a", encoding="utf-8") as file:
        file.write('{"update": 3, "num')
    run_ppo(home, tmp_path / "run", "--save_every", "2", "--resume")
    assert samples_of(tmp_path / "run") == whole
    run_ppo(home, tmp_path / "run", "--save_every", "2", "--overwrite")
    assert samples_of(tmp_path / "run") == whole


# ------------------------------------------------------------------------------------------------
# --tensorboard

def test_tensorboard_has_the_metrics_and_the_samples(home, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_ppo(home, tmp_path / "run", "--tensorboard")
    board = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    for name, points in metrics_of(tmp_path / "run").items():
        assert [(event.step, event.value) for event in board.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-5, abs=1e-30)) for step, value in points]
    texts = board.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [0, 1, 2, 3]
    assert "七加八" in texts[0].tensor_proto.string_val[0].decode()


def test_tensorboard_without_the_package_is_one_line(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit) as end:
        run_ppo(home, tmp_path / "run", "--tensorboard")
    lines = capsys.readouterr().err.strip().split("\n")
    assert end.value.code == 2 and len(lines) == 1 and "pip install tensorboard" in lines[0]
    assert not (tmp_path / "run").exists()


def test_tensorboard_comes_right_after_resume():
    names = [row[0] for row in COMMON if not isinstance(row, str)]
    assert names[names.index("resume") + 1] == "tensorboard"


# ------------------------------------------------------------------------------------------------
# The page's data

@pytest.fixture(scope="module")
def pages(home):
    """look.html of the PPO run with both views, and what make_experience gave for it."""
    seen = []
    make_experience = ppo.make_experience

    def keep(*given):
        result = make_experience(*given)
        seen.append({name: x.clone() if torch.is_tensor(x) else x for name, x in result[0].items()})
        return result

    path = str(home.folder / "look.html")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "make_experience", keep)
        look.main([home.ppo, home.rm, "--number", "5", "--out", path])
    with open(path, encoding="utf-8") as file:
        text = file.read()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    return SimpleNamespace(path=path, text=text, data=data, experience=seen[0])


def test_the_numbers_are_those_of_make_experience(pages):
    cards = pages.data["inside"]["cards"]
    columns = dict(kl="kl", value="old_values", reward="rewards", advantage="advantages")
    for i, (card, (_, response)) in enumerate(zip(cards, pages.experience["texts"])):
        assert len(card["tokens"]) == len(response) == pages.experience["mask"][i].sum()
        assert card["score"] == pages.experience["scores"][i].item()
        for name, column in columns.items():
            wanted = pages.experience[column][i, :len(response)].tolist()
            assert [t[name] for t in card["tokens"]] == pytest.approx(wanted, abs=1e-6)
    assert len(cards) == 5


def test_kl_and_entropy_fit_the_likeliest_tokens(pages):
    """Where the token drawn is among the five, the KL is the log of the two probabilities' ratio."""
    found = 0
    for card in pages.data["inside"]["cards"]:
        for t in card["tokens"]:
            policy, reference = dict(t["policy"]), dict(t["reference"])
            assert len(t["policy"]) == 5 and t["entropy"] > 0
            if t["raw"] in policy and min(policy[t["raw"]], reference.get(t["raw"], 0)) > 0.01:
                ratio = policy[t["raw"]] / reference[t["raw"]]
                assert t["kl"] == pytest.approx(math.log(ratio), abs=1e-3)
                found += 1
    assert found > 0  # 7 on average, of 60 tokens: it hangs on what is drawn


def test_one_step_raises_what_was_good(pages):
    """Ratios after the step go up where the advantage is positive, on the whole; and the run itself
    is as it was."""
    tokens = [t for card in pages.data["inside"]["cards"] for t in card["tokens"]]
    assert any(abs(t["ratio"] - 1) > 1e-3 for t in tokens)
    assert sum(t["advantage"] * (t["ratio"] - 1) for t in tokens) > 0


def test_reward_model_after_each_token(pages, home):
    cards = pages.data["judge"]["cards"]
    assert [card["label"].split(":")[0] for card in cards] == ["good", "bad"] * 5
    for card in cards:
        score = float(card["label"].split("score ")[1])
        assert card["tokens"][-1]["value"] == pytest.approx(score, abs=1e-3)  # read at the last
        values = [t["value"] for t in card["tokens"]]
        assert [t["change"] for t in card["tokens"]][1:] == pytest.approx(
            [b - a for a, b in zip(values, values[1:])], abs=1e-6)
    texts = {"".join(t["text"] for t in card["tokens"]) for card in cards}
    assert any("window.pwned" in text for text in texts)


def test_a_ranking_model_is_judged_on_the_pairs_of_each_prompt(home, tmp_path):
    """Also where most prompts have ties only."""
    records = [dict(user_input=text, completion=other, score=float(n if i == 0 else 3))
               for i, text in enumerate(NASTY) for n, other in enumerate(NASTY[:3])]
    (tmp_path / "scored.json").write_text(json.dumps(records))
    args = SimpleNamespace(eval_data=str(tmp_path / "scored.json"), max_length=2000, number=8,
                           loss="ranking", device="cpu", dtype="float32", micro_batch_size=4,
                           gradient_checkpointing=False,
                           state=next((home.folder / "rm" / "last").glob("*.safetensors")))
    found = look.judge(home.rm, args)
    assert [(card["prompt"], card["label"].split(",")[0]) for card in found["cards"]] == [
        (NASTY[0], "good: label 2"), (NASTY[0], "bad: label 0")]
    assert "% of 3 pairs" in found["about"]


def test_reliability_by_hand():
    margins = torch.tensor([0.1, -0.1, 3.0, 3.0, 3.0, -3.0, 0.0])
    right = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.5])
    low, high = look.reliability(margins, right)
    sigmoid = [1 / (1 + math.exp(-m)) for m in (0.1, 3.0)]
    assert low == (pytest.approx((2 * sigmoid[0] + 0.5) / 3), pytest.approx(0.5), 3)
    assert high == (pytest.approx(sigmoid[1]), pytest.approx(0.75), 4)


def test_margins_in_the_scale_of_the_training(home, capsys):
    """The scores of the exported model are normalized; the scale undoes that."""
    head = load_scalar_head(home.rm)
    (state,) = (home.folder / "rm" / "last").glob("*.safetensors")
    scale = look.trained_scale(state, head)
    assert scale > 0 and scale != 1
    mean = head.config.score_mean  # of the raw scores, over their deviation
    tokenizer = load_tokenizer(home.rm)
    records = train_rm.read_records(home.scored, "user_input", "completion")
    examples = train_rm.encode_records(records, tokenizer, 900, "")
    args = SimpleNamespace(device="cpu", dtype="float32", micro_batch_size=4)
    scores = train_rm.score_texts(head, examples, args, tokenizer.pad_token_id)
    raw = (scores + mean) * scale
    assert raw.std(unbiased=False).item() == pytest.approx(scale, rel=1e-3)


def test_pieces_join_to_the_text(home):
    tokenizer = load_tokenizer(home.sft)
    for text in NASTY[:4]:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        parts = pieces(tokenizer, tokens)
        assert len(parts) == len(tokens)
        own = [part["text"] for part in parts
               if part["text"] != part["raw"] or not re.match("<0x|␣$", part["raw"])]
        assert "".join(own) == tokenizer.decode(tokens)


@pytest.mark.parametrize("what, said", [
    ("nothing", "nothing/last/state.json: missing or damaged"),
    ("moved", "--sft says where it is now"),
    ("samples", "samples.jsonl: record 2"),
])
def test_a_bad_run_is_one_line(home, tmp_path, capsys, what, said):
    run = tmp_path / "runs" / what
    if what != "nothing":
        shutil.copytree(home.ppo, run)
    if what == "moved":
        state = json.loads((run / "last" / "state.json").read_text("utf-8"))
        state["settings"]["sft"] = "gone/sft"
        (run / "last" / "state.json").write_text(json.dumps(state), "utf-8")
    if what == "samples":
        lines = (run / "samples.jsonl").read_text("utf-8").split("\n")
        lines[1] = lines[1][:50]
        (run / "samples.jsonl").write_text("\n".join(lines), "utf-8")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        look.main([str(run), "--number", "1"])
    lines = capsys.readouterr().err.strip().split("\n")
    assert end.value.code == 2 and len(lines) == 1 and said in lines[0]
    assert not (run / "look.html").exists()


def test_a_run_of_a_fork_without_a_critic(home, tmp_path, capsys):
    run = tmp_path / "runs" / "rloo"
    shutil.copytree(home.ppo, run)
    shutil.rmtree(run / "critic")
    state = json.loads((run / "last" / "state.json").read_text("utf-8"))
    for name in ("critic", "critic_lr", "value_clip", "lam"):
        del state["settings"][name]
    (run / "last" / "state.json").write_text(json.dumps(state), "utf-8")
    look.main([str(run)])
    assert "config.json: missing, so no tokens are shown" in capsys.readouterr().out
    assert (run / "look.html").exists()


def test_a_model_of_the_hub_is_looked_for_there(tmp_path, capsys):
    assert look.find("someone/sft", str(tmp_path), "--sft", local=False) == "someone/sft"
    with pytest.raises(SystemExit):
        look.find("someone/sft", str(tmp_path), "--sft")
    assert "--sft says where it is now" in capsys.readouterr().err


def test_which_models_of_a_run_were_the_hubs(home, tmp_path, monkeypatch):
    run, seen = tmp_path / "runs" / "hub", []
    shutil.copytree(home.ppo, run)
    state = json.loads((run / "last" / "state.json").read_text("utf-8"))
    state["settings"]["sft"], local = "someone/sft", state["inputs"].pop("sft")
    assert local and state["inputs"]["rm"]
    (run / "last" / "state.json").write_text(json.dumps(state), "utf-8")
    monkeypatch.setattr(look, "inside", lambda folder, args, progress: seen.append(args))
    look.main([str(run), "--out", str(tmp_path / "page.html")])
    assert seen[0].sft == "someone/sft" and os.path.exists(seen[0].rm)


def test_a_run_with_a_reward_file_that_moved(home, tmp_path, capsys):
    """The file is beside the run, or where --reward says. The critic is the saved one, and no
    notice says otherwise."""
    before, now = tmp_path / "before", tmp_path / "now"
    before.mkdir()
    shutil.copy(home.gold, before / "judge.py")
    run_ppo(home, before / "run", "--reward", str(before / "judge.py"), "--rm", "runs/rm")
    before.rename(now)
    capsys.readouterr()
    look.main([str(now / "run"), "--number", "1"])
    assert "the critic begins" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        (now / "judge.py").rename(tmp_path / "judge.py")
        look.main([str(now / "run"), "--number", "1"])
    assert "--reward says where it is now" in capsys.readouterr().err
    look.main([str(now / "run"), "--number", "1", "--reward", str(tmp_path / "judge.py")])


def test_settings_changed_are_those_that_the_user_changed(pages):
    changed = pages.data["runs"][0]["changed"].split(", ")
    assert {"updates 3", "eval_every 1"} <= set(changed)
    assert not any(name.startswith("no_eos_score") for name in changed)  # ppo.check set it


def test_size_of_the_tool():
    folder = os.path.dirname(look.TEMPLATE)
    assert sum(os.path.getsize(os.path.join(folder, f"look.{end}")) for end in ("py", "html")) <= (
        25 * 1024)


# ------------------------------------------------------------------------------------------------
# The page in a browser

USE = """
const found = {errors: [], violations: [], colours: {}, tokens: []};
addEventListener("error", e => found.errors.push(String(e.message)));
document.addEventListener("securitypolicyviolation", e => found.violations.push(e.blockedURI));
const all = [...document.querySelectorAll("#inside ~ .answer .token")];
for (const b of document.querySelectorAll("#inside button")) {
  b.click();
  found.colours[b.dataset.quantity] = all.map(x => getComputedStyle(x).backgroundColor);
}
for (const x of all) {
  x.dispatchEvent(new PointerEvent("pointerenter"));
  const row = {};
  for (const cell of document.querySelectorAll("#pop [data-name]"))
    row[cell.dataset.name] = cell.textContent;
  found.tokens.push([x.textContent, row, document.getElementById("pop").hidden]);
}
found.rows = [...document.querySelectorAll("#answers tbody tr")].map(r =>
  [...r.children].filter((x, i) => i !== 1).map(x => x.firstChild.data || ""));
const sort = document.querySelector("#answers th button");
sort.click();
found.sorted = [...document.querySelectorAll("#answers tbody tr")].map(
  r => r.firstChild.textContent);
const svg = document.querySelector("#curves svg"), box = svg.getBoundingClientRect();
found.before = svg.nextSibling.textContent;
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + 60, clientY: box.top + 20}));
found.after = svg.nextSibling.textContent;
found.prompts = [...document.querySelectorAll(".prompt")].map(x => x.textContent);
found.judged = [...document.querySelectorAll("#judge ~ .answer .tokens")].map(x => x.textContent);
found.elements = ["script", "img", "b", "iframe"].map(n => document.querySelectorAll(n).length);
found.pwned = window.pwned === undefined ? null : window.pwned;
found.fetched = performance.getEntriesByType("resource").map(e => e.name);
found.wide = document.documentElement.scrollWidth - innerWidth;
found.seconds = performance.now() / 1000;
const out = document.createElement("pre");
out.id = "found";
out.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(found))));
document.body.append(out);
"""


def browse(pages, folder, width=900):
    """What the script above finds in the page, and the browser's console."""
    digest = base64.b64encode(hashlib.sha256(USE.encode()).digest()).decode()
    text = pages.text.replace("script-src ", f"script-src 'sha256-{digest}' ")
    assert text != pages.text
    path = folder / "used.html"
    path.write_text(text.replace("</html>", f"<script>{USE}</script></html>"), encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--window-size={width},1000", f"--user-data-dir={folder / 'profile'}", "--dump-dom",
         path.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.split("\n") if "CONSOLE" in line]
    return json.loads(base64.b64decode(found[1])), console


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_as_a_person_uses_it(pages, tmp_path):
    found, console = browse(pages, tmp_path)
    assert console == [] and found["errors"] == [] and found["violations"] == []
    assert found["fetched"] == [] and found["seconds"] < 5

    # the colours are those of the quantity chosen
    colours = found["colours"]
    assert list(colours) == list(look.COLUMNS)
    assert len({tuple(row) for row in colours.values()}) == len(colours)
    tokens = [t for card in pages.data["inside"]["cards"] for t in card["tokens"]]
    for name in ("advantage", "value"):
        for token, seen in zip(tokens, colours[name]):
            red, _, blue = map(int, re.findall(r"\d+", seen)[:3])
            assert abs(token[name]) < 1e-6 or (red > blue) == (token[name] > 0)

    # a token's pop-up has the numbers of make_experience
    columns = dict(kl="kl", value="old_values", reward="rewards", advantage="advantages")
    mask = pages.experience["mask"].bool()
    assert len(found["tokens"]) == int(mask.sum())
    for name, column in columns.items():
        wanted = pages.experience[column][mask].tolist()
        assert [float(row[name]) for _, row, hidden in found["tokens"]] == pytest.approx(
            wanted, abs=1e-6)
    assert not any(hidden for *_, hidden in found["tokens"])
    assert [text for text, *_ in found["tokens"]] == [t["text"] for t in tokens]

    # sorted by the change at first, by the prompt after a click; curves tell their values
    assert {row[0] for row in found["rows"]} == set(NASTY)
    samples = {(s["update"], s["user_input"]): s for s in samples_of(pages.data["runs"][0]["name"])}
    change = [abs(samples[3, row[0]]["gold"] - samples[0, row[0]]["gold"])
              for row in found["rows"]]
    assert change == sorted(change, reverse=True)
    assert found["sorted"] == sorted(NASTY, key=lambda text: text.encode("utf-16-be"))
    assert found["after"] != found["before"] and "update" in found["after"]


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_text_stays_text(pages, tmp_path):
    found, _ = browse(pages, tmp_path, width=500)
    assert found["pwned"] is None and found["wide"] <= 0
    scripts, images, bold, frames = found["elements"]
    assert (scripts, images, frames) == (3, 0, 0)  # data, page, and this test's
    assert found["prompts"][:5] == NASTY
    samples = {(s["update"], s["user_input"]): s for s in samples_of(pages.data["runs"][0]["name"])}
    for prompt, *completions in found["rows"]:
        assert completions == [samples[update, prompt]["completion"] for update in range(4)]
    assert any(NASTY[0] in text for text in found["judged"])
    assert any("verylongword" * 40 in text for text in found["judged"])


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_two_runs_are_laid_over_each_other(home, pages, tmp_path):
    shutil.copytree(home.ppo, home.folder / "other", dirs_exist_ok=True)
    path = tmp_path / "look.html"
    look.main([home.ppo, str(home.folder / "other"), "--number", "1", "--out", str(path)])
    page = SimpleNamespace(text=path.read_text("utf-8"))
    found, console = browse(page, tmp_path)
    assert console == [] and found["errors"] == []
    assert home.ppo in found["before"] and str(home.folder / "other") in found["before"]
