"""The built-in data of data_gen.py: the files, the world and its labeller."""

import itertools
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
import sentencepiece

import data_gen
from lib.data import read_records
from makers import DATA_FILES, ROOT, error_line, options


def test_same_seed_same_bytes(world, tmp_path):
    """In another process as well, in which sets are iterated in another order."""
    subprocess.run(
        [sys.executable, ROOT / "data_gen.py", "--seed", "0"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONHASHSEED": "1234"},
    )
    files = sorted(
        path.relative_to(world.folder) for path in world.folder.rglob("*") if path.is_file()
    )
    assert (
        sorted(
            path.relative_to(tmp_path / "data") for path in tmp_path.rglob("*") if path.is_file()
        )
        == files
    )
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "data" / file).read_bytes() == (world.folder / file).read_bytes(), file


def test_other_seed_other_bytes(world, tmp_path):
    data_gen.main(options(out=tmp_path, seed=1))
    for file in [
        path.relative_to(world.folder) for path in world.folder.rglob("*") if path.is_file()
    ]:
        assert (tmp_path / file).read_bytes() != (world.folder / file).read_bytes(), file


def test_files_of_other_data_are_not_replaced(world, tmp_path, capsys):
    """What is there already as it would be written is no obstacle: a broken-off run is continued."""
    name = "actor_training_data.json"
    shutil.copy(world.folder / "rlhf_training_data_eval.json", tmp_path)
    (tmp_path / name).write_text("mine")
    line = error_line(capsys, lambda: data_gen.main(options(out=tmp_path, seed=0)))
    assert f"{tmp_path}/{name}: already exists" in line and "--overwrite" in line
    assert (tmp_path / name).read_text() == "mine" and len(os.listdir(tmp_path)) == 2
    data_gen.main(options(out=tmp_path, seed=0, overwrite=True))
    assert (tmp_path / name).read_bytes() == (world.folder / name).read_bytes()


def test_keys_of_the_records(world):
    fields = {
        "actor_training_data": ["user_input", "completion"],
        "rlhf_training_data": ["user_input"],
        "reward_training_data": ["user_input", "completion", "score"],
    }
    for name, records in world.data.items():
        wanted = fields[name.removesuffix("_eval")]
        assert read_records(str(world.folder / f"{name}.json"), *wanted) == records
        assert all(list(record) == wanted for record in records) and len(records) >= 100, name


def test_held_out_prompts_are_in_no_training_file(world):
    prompts = {
        name: {record["user_input"] for record in records} for name, records in world.data.items()
    }
    held_out = set().union(*(prompts[f"{name}_eval"] for name in DATA_FILES))
    assert len(held_out) >= 100
    for name in DATA_FILES:
        assert prompts[name].isdisjoint(held_out), name


def test_every_family_and_language_is_in_every_file(world):
    both = {(family, lang) for family in data_gen.PHRASINGS for lang in ("en", "zh")}
    for name, records in world.data.items():
        counts = Counter(data_gen.parse(record["user_input"])[:2] for record in records)
        assert set(counts) == both, name


def test_scored_completions(world):
    """At least 4 different completions a prompt, with the labeller's score, in [0, 5], and
    something to rank."""
    for name in ("reward_training_data", "reward_training_data_eval"):
        groups = defaultdict(dict)
        for record in world.data[name]:
            assert record["score"] == data_gen.score(record["user_input"], record["completion"])
            assert 0 <= record["score"] <= 5
            groups[record["user_input"]][record["completion"]] = record["score"]
        assert min(map(len, groups.values())) >= 4
        assert sum(len(set(scores.values())) > 1 for scores in groups.values()) > 0.95 * len(groups)
        spread = Counter(record["score"] for record in world.data[name])
        assert sum(n for value, n in spread.items() if value <= 1) > 0.1 * spread.total()
        assert sum(n for value, n in spread.items() if value >= 4) > 0.1 * spread.total()


def test_demonstrations_are_a_mixture(world):
    """Most are right, not all; some are as good as can be, most are not: RLHF has something to
    gain."""
    scores = [data_gen.score(**record) for record in world.data["actor_training_data"]]
    share = {value: n / len(scores) for value, n in Counter(scores).items()}
    assert 0.02 < sum(part for value, part in share.items() if value <= 1) < 0.2
    assert 0.1 < share[5.0] < 0.5


def test_tokenizer(world):
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(world.folder / "tokenizer" / "tokenizer.model")
    )
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= set(pieces)
    strange = "naïve 𝄞\n\t ☃  鑫"  # nothing of this is in the built-in texts
    assert [p for p in processor.encode_as_pieces("𝄞")][-4:] == [
        "<0xF0>",
        "<0x9D>",
        "<0x84>",
        "<0x9E>",
    ]
    assert processor.unk_id() not in processor.encode(strange)
    assert processor.decode(processor.encode(strange)) == strange
    assert not [
        piece
        for piece in pieces
        if len(re.findall(r"\d", piece)) > 1 and not piece.startswith("<0x")
    ]
    digits = [piece for piece in processor.encode_as_pieces("12 and 345.") if piece.isdigit()]
    assert digits == ["1", "2", "3", "4", "5"]


# ------------------------------------------------------------------------------------------------
# The world and its labeller


def every_prompt(draws=6):
    """(family, language, slots, prompt) of every phrasing, with a few fillings each."""
    rng = random.Random(5)
    for family, by_lang in data_gen.PHRASINGS.items():
        for lang, phrasings in by_lang.items():
            for phrasing in phrasings:
                for _ in range(draws):
                    slots = data_gen.fill(rng, family, lang)
                    yield family, lang, slots, phrasing.format(**slots)


def test_families_languages_and_phrasings():
    assert len(data_gen.PHRASINGS) >= 8
    for family, by_lang in data_gen.PHRASINGS.items():
        assert set(by_lang) == {"en", "zh"}
        for lang, phrasings in by_lang.items():
            assert len(set(phrasings)) >= 2, family
            chinese = [bool(re.search("[\u4e00-\u9fff]", phrasing)) for phrasing in phrasings]
            assert all(chinese) if lang == "zh" else not any(chinese), family


def test_parse_recovers_family_language_and_slots():
    for family, lang, slots, prompt in every_prompt():
        assert data_gen.parse(prompt) == (family, lang, slots)


@pytest.mark.parametrize(
    "foreign",
    [
        "",
        "What is 3 times 4?",
        "What is 3 plus 4",
        "What is 3 plus 4? ",
        "what is 3 plus 4?",
        "What is 13 plus 4?",
        "Please: What is 3 plus 4?",
        "你好",
        "Hello, I am Tom. What is 3 plus 4?",
    ],
)
def test_score_refuses_foreign_prompts(foreign):
    with pytest.raises(ValueError, match="not a prompt of the built-in world"):
        data_gen.score(foreign, "7.")


EN, ZH = "What is 3 plus 4?", "3加4等于几？"
LONG = "one two three four five six seven eight nine ten eleven twelve a b c d"  # 16 words, no answer among them


@pytest.mark.parametrize(
    "user_input, completion, expected",
    [
        # right and brief: 2 + 1
        (EN, "7.", 3),
        (EN, "3 + 4 = 7.", 3),
        ("Tell me the sum of 9 and 8.", "It is 17.", 3),
        ("Which is larger, 3 or 7?", "7!", 3),
        ("Which is larger, 3 or 7?", "Of 3 and 7 it is 7.", 3),
        ("Sort these numbers: 5 2 9.", "2 5 9.", 3),
        ("Put 5 2 9 in ascending order.", "5 2 9 becomes 2, 5, 9.", 3),
        ("What is the opposite of hot?", "cold.", 3),
        ("How do you say cat in Chinese?", "猫。", 3),
        ("How do you say cat in Chinese?", "cat is 猫.", 3),
        ("Translate 猫 into English.", "The answer is cat.", 3),
        ("What kind of thing does dog name?", "A dog is an animal.", 3),
        ("How many letters are in hammer?", "6.", 3),
        (
            "Does dog name an animal, a fruit, a color, a vehicle or a tool?",
            "Not a tool but an animal.",
            3,
        ),
        ("Hello, I am Tom.", "Nice to meet you, Tom.", 3),
        (ZH, "7。", 3),
        ("比较3与7，谁大？", "3小，7大。", 3),
        ("给这些数排序：5 2 9。", "2 5 9。", 3),
        ("炎热 的反义词是什么？", "寒冷！", 3),
        ("cat 的中文是什么？", "答案是 猫。", 3),
        ("请把 猫 翻译成英文。", "应该是 cat。", 3),
        ("猫 属于什么类别？", "猫是动物。", 3),
        ("dog 有几个字母？", "3。", 3),
        ("你好，我是 小明。", "见到你真好，小明。", 3),
        # and friendly: 2 more
        (EN, "Sure! The answer is 7.", 5),
        (EN, "It is 7. Glad to help!", 5),
        ("Hello, I am Tom.", "Good question! Hello, Tom.", 5),
        (ZH, "好的！ 答案是 7。", 5),
        ("你好，我是 小明。", "你好，小明。 很乐意帮忙！", 5),
        # not brief: 1 less. 16 words are brief, 17 are not; a number and a Chinese character are a word
        # each
        (EN, f"{LONG[:-2]} 7.", 3),
        (EN, f"{LONG} 7.", 2),
        (EN, f"Of course! {LONG} 7.", 4),
        (ZH, "嗯" * 15 + "7。", 3),
        (ZH, "嗯" * 16 + "7。", 2),
        (ZH, "问得好！" + "嗯" * 16 + "7。", 4),
        # cut off: 1 less
        (EN, "7", 2),
        (EN, "7,", 2),
        (EN, "Sure! The answer is 7", 4),
        (EN, f"{LONG} 7", 1),
        (EN, "7.  ", 3),
        (ZH, "7", 2),
        (ZH, "当然可以！答案是 7", 4),
        (ZH, "嗯" * 16 + "7", 1),
        # wrong: nothing, or half a point for being friendly
        (EN, "8.", 0),
        (EN, "17.", 0),
        (EN, "seven.", 0),
        (EN, "I do not know.", 0),
        (EN, "Sure! The answer is 8.", 0.5),
        (EN, "7 or 8.", 0),
        (EN, "8 or 7.", 0),
        (EN, "7 is 3 plus 4.", 0),
        ("Hello, I am Tom.", "Hello, Ben.", 0),
        ("Sort these numbers: 5 2 9.", "2 5.", 0),
        ("Sort these numbers: 5 2 9.", "2 9 5.", 0),
        ("What kind of thing does dog name?", "An animal, not a fruit.", 0),
        ("What is the opposite of hot?", "Sure! hot.", 0.5),
        (ZH, "8。", 0),
        (ZH, "好的！答案是 8。", 0.5),
        ("给这些数排序：5 2 9。", "9 5 2。", 0),
        ("猫 属于什么类别？", "好的！水果。", 0.5),
        # in the other language, right or wrong: the same
        (EN, "答案是 7。", 0),
        (EN, "好的！ 答案是 7。", 0.5),
        (EN, "好的！ 答案是 8。", 0.5),
        (EN, "答案是 8。", 0),
        (ZH, "The answer is 7.", 0),
        (ZH, "Sure! The answer is 7.", 0.5),
        ("猫 用英文怎么说？", "It is cat.", 0),
        # rude: nothing, though it be right and friendly
        (EN, "Are you stupid? 7.", 0),
        (EN, "Leave me alone. 8.", 0),
        (EN, "Sure! What a dumb question. It is 7.", 0),
        (EN, "Sure! Are you stupid? It is 8.", 0),
        (ZH, "你真笨。 7。", 0),
        (ZH, "好的！别烦我。8。", 0),
        # nothing at all
        (EN, "", 0),
        (ZH, "", 0),
        (EN, " \n", 0),
        ("Hello, I am Tom.", "", 0),
    ],
)
def test_score_by_hand(user_input, completion, expected):
    assert data_gen.score(user_input, completion) == expected


def test_what_each_style_scores():
    rng = random.Random(6)
    for _, _, _, prompt in every_prompt(draws=20):
        assert data_gen.score(prompt, "") == 0
        scores = {}
        for style, right in itertools.product(data_gen.STYLES, [True, False]):
            text = data_gen.write(rng, prompt, style, right)
            scores[style, right] = data_gen.score(prompt, text)
            if (
                style != "cut off" and not right
            ):  # what is cut off a wrong one may leave a right one
                assert scores[style, right] in (0, 0.5), (prompt, text)
            if style == "cut off":
                assert scores[style, right] <= 4 and text[-1] not in " .!?。！？", (prompt, text)
        exact = {style: scores[style, True] for style in ("friendly", "curt", "rambling")}
        assert exact == {"friendly": 5, "curt": 3, "rambling": 2}, prompt
        assert scores["rude", True] == 0 and scores["other language", True] in (0, 0.5), prompt


def test_wherever_it_is_cut_off_it_scores_less():
    rng = random.Random(7)
    for _, _, _, prompt in every_prompt(draws=2):
        for style in ("friendly", "rambling"):
            whole = data_gen.write(rng, prompt, style)
            best = max(
                data_gen.score(prompt, whole[:n].rstrip(" .!?。！？")) for n in range(1, len(whole))
            )
            assert best < data_gen.score(prompt, whole), whole


def test_fixed_phrases_hold_no_answer():
    """Otherwise a friendly phrase or a filler would itself be read as an answer."""
    answers = {
        *data_gen.WORDS,
        *data_gen.CHINESE,
        *data_gen.OPPOSITE,
        *data_gen.NAMES["en"],
        *data_gen.NAMES["zh"],
        *itertools.chain(*data_gen.NOUNS),
    }
    tables = (
        data_gen.FRIENDLY,
        data_gen.RUDE,
        data_gen.FILLER,
        data_gen.SENTENCES,
        data_gen.GREETINGS,
    )
    phrases = [
        phrase.replace("{x}", " ")
        for table in tables
        for lang in ("en", "zh")
        for phrase in table[lang]
    ]
    assert len(phrases) > 20 and len(answers) > 80
    for phrase in phrases:
        words = set(re.findall("[a-z]+", phrase.lower()))
        found = [
            a for a in answers if (a.lower() in words if a.isascii() else a in phrase)
        ] + re.findall(r"\d", phrase)
        assert not found, (phrase, found)
