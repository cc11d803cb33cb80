"""What `data_gen.py import` reads beyond a name per part: compared answers, rows, JSON in strings,
scores on a scale, and the fields that prompts keep. The plain layouts: test_import.py."""

import csv
import io
import json

import pytest

import data_gen
from tools.data.import_ import convert


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def answers(*texts_and_scores, prompt="Q"):
    """Records of [text, score, text, score, ...]."""
    return [{"user_input": prompt, "completion": text, "score": score}
            for text, score in zip(texts_and_scores[::2], texts_and_scores[1::2])]


def write(path, records):
    """JSON; or where it is named so, CSV, in which lists and objects are JSON in a string."""
    if path.suffix == ".csv" and not isinstance(records, str):
        file = io.StringIO()
        table = csv.DictWriter(file, list(records[0]))
        table.writeheader()
        table.writerows([{field: json.dumps(value) if isinstance(value, (list, dict)) else value
                          for field, value in record.items()} for record in records])
        records = file.getvalue()
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return str(path)


def imported(tmp_path, records, name="x.json"):
    return convert([write(tmp_path / name, records)])


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        data_gen.main(["import", *map(str, argv)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# ------------------------------------------------------------------------------------------------
# Sides and a verdict

ARENA = {"question_id": "1", "model_a": "m", "model_b": "n", "judge": "j", "turn": 1,
         "conversation_a": [user("Q"), assistant("x")],
         "conversation_b": [user("Q"), assistant("y")]}
KAGGLE = {"id": 1, "prompt": ["Q"], "response_a": ["x"], "response_b": ["y"]}
FLAGS = {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 0}
FARM = {"instruction": "Q", "input": "", "output_1": "x", "output_2": "y"}
ARGILLA = {"prompt": "Q", "response-1": "x", "response-2": "y"}
FIRST, SECOND, TIE = answers("x", 1, "y", 0), answers("x", 0, "y", 1), answers("x", 0.5, "y", 0.5)


@pytest.mark.parametrize("ending", ["json", "csv"])
@pytest.mark.parametrize("record, ours", [
    (ARENA | {"winner": "model_a"}, FIRST),
    (ARENA | {"winner": "model_b"}, SECOND),
    (ARENA | {"winner": "tie"}, TIE),
    (ARENA | {"winner": "tie (bothbad)"}, TIE),
    (ARENA | {"winner": "both_bad"}, TIE),
    (ARENA | {"winner": "n"}, SECOND),  # the name of its model
    (ARENA | {"winner": "tiefighter", "model_a": "tiefighter"}, FIRST),
    (ARENA | {"winner": "model_a", "conversation_a": [
        {"role": "user", "content": [{"type": "text", "text": "Q", "image": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]}, FIRST),
    (KAGGLE | FLAGS | {"winner_model_a": 1}, FIRST),
    (KAGGLE | FLAGS | {"winner_model_b": 1}, SECOND),
    (KAGGLE | FLAGS | {"winner_tie": 1}, TIE),
    (KAGGLE | FLAGS | {"winner_model_b": 1, "prompt": ["Q", "R"], "response_a": ["w", "x"],
                       "response_b": ["w", "y"]},
     answers("x", 0, "y", 1, prompt=[user("Q"), assistant("w"), user("R")])),
    (KAGGLE | {"prompt": "Q", "response_a": "x", "response_b": "y", "winner": "Response B"},
     SECOND),
    (KAGGLE | {"prompt": "Q", "response_a": "x", "response_b": "y", "verdict": "[[A]]"}, FIRST),
    (FARM | {"preference": 1}, FIRST),
    (FARM | {"preference": 2.0}, SECOND),
    (FARM | {"preference": 1.5}, TIE),
    (FARM | {"preference": 1.25}, answers("x", 0.75, "y", 0.25)),  # AlpacaEval: soft
    (ARGILLA | {"choose-best-response": "response-2"}, SECOND),
    (ARGILLA | {"preference": [{"user_id": "u", "value": "response-1", "status": "submitted"}]},
     FIRST),
    (ARGILLA | {"preference": [{"value": [{"rank": 1, "value": "response-2"},
                                          {"rank": 2, "value": "response-1"}]}]}, SECOND),
    (ARGILLA | {"preference": [{"value": "response-1"}, {"value": "response-2"},
                               {"value": "response-1"}, {"value": "response-1"}]},
     answers("x", 0.75, "y", 0.25)),
    ({"context": [user("Q")], "response1": "x", "response2": "y", "overall_preference": -2},
     answers("x", 2, "y", 0)),  # HelpSteer 3
    ({"prompt": "Q", "response_1": "x", "response_2": "y", "preference_strength": 3},
     answers("x", 0, "y", 3)),  # HelpSteer 2
    ({"prompt": "Q", "response_1": "x", "response_2": "y", "response_3": "z", "rank_1": 2,
      "rank_2": 1, "rank_3": 3}, answers("x", -2, "y", -1, "z", -3)),
    ({"prompt": "Q", "answer_a": "x", "answer_b": "y", "rating_a": "80%", "rating_b": "30%"},
     answers("x", 80, "y", 30)),
    ({"prompt": "Q", "answer1": "x", "answer2": "y", "comparison": {"selected": "right"}}, SECOND),
])
def test_sides_with_a_verdict(tmp_path, record, ours, ending):
    assert imported(tmp_path, [record], f"x.{ending}") == ours


@pytest.mark.parametrize("record, reason", [
    (ARENA | {"winner": "whoever"}, "its verdict 'whoever' names none of the sides a, b"),
    (ARENA | {"winner": None}, "nobody says which side is better"),
    (ARENA | {"winner": 1}, "its verdict '1' names none of the sides a, b"),
    (ARENA | {"winner": "tie", "conversation_b": [user("R"), assistant("y")]},
     "its two sides answer different prompts"),
])
def test_a_verdict_that_says_nothing_is_left_out(tmp_path, capsys, record, reason):
    good = ARENA | {"winner": "model_a"}
    assert imported(tmp_path, [good, record]) == FIRST
    assert f"left out 1: {reason} (records 2)" in capsys.readouterr().out


def test_sides_without_a_prompt(tmp_path, capsys):
    record = {"text1": "x", "text2": "y", "preference": 1}
    assert imported(tmp_path, [record]) == []
    assert "left out 1: there is no prompt (records 1)" in capsys.readouterr().out


def test_zero_and_one_do_not_number_sides_one_and_two(tmp_path, capsys):
    assert imported(tmp_path, [FARM | {"preference": 0}, FARM | {"preference": 1}]) == []
    assert "its preference is 0 in some records" in capsys.readouterr().out


def test_turns_without_a_verdict_are_no_prompts(tmp_path, capsys):
    source = write(tmp_path / "x.csv", [KAGGLE])
    assert refused(capsys, source, "--out", tmp_path / "out").endswith(
        "x.csv: nothing says which of response_a and response_b is better\n")


# ------------------------------------------------------------------------------------------------
# Lists of answers

RATED = [{"text": "x", "pm_score": 3, "selected": True}, {"text": "y", "pm_score": 5}]


@pytest.mark.parametrize("ending", ["json", "csv"])
@pytest.mark.parametrize("record, ours", [
    ({"question": "Q", "answers": RATED, "date": "d"}, answers("x", 3, "y", 5)),  # StackExchange
    ({"question": "Q", "answers": {"text": ["x", "y"], "score": [3, 5]}},
     answers("x", 3, "y", 5)),  # ELI5
    ({"prompt": "Q", "responses": ["x", "y", "z"], "ranks": [2, 1, 3]},
     answers("x", -2, "y", -1, "z", -3)),
    ({"prompt": "Q", "responses": ["x", "y"], "rank": ["2", "1"]}, answers("x", -2, "y", -1)),
    ({"input": "Q", "generations": ["x", "y"], "ratings": [4, 2.5]}, answers("x", 4, "y", 2.5)),
    ({"instruction": "Q", "input": "i", "completions": [
        {"response": [assistant("x")], "rating": "7/10"}, {"response": "y", "rating": "9/10"},
        {"response": "z", "rating": None}]}, answers("x", 7, "y", 9, prompt="Q\n\ni")),
    ({"messages": [user("Q")], "candidates": [{"output": "x", "score": 1},
                                              {"output": "y", "score": 2}]},
     answers("x", 1, "y", 2)),
])
def test_lists_of_answers(tmp_path, record, ours, ending):
    assert imported(tmp_path, [record], f"x.{ending}") == ours


def test_an_answer_without_a_score_is_counted(tmp_path, capsys):
    record = {"question": "Q", "answers": [*RATED, {"text": "z", "pm_score": None}]}
    assert imported(tmp_path, [record]) == answers("x", 3, "y", 5)
    assert "  1 answers without a score are not used\n" in capsys.readouterr().out


def test_passages_with_scores_are_no_answers(tmp_path):
    record = {"question": "Q", "answer": "x", "ctxs": [{"title": "t", "text": "p", "score": 1.5},
                                                       {"title": "u", "text": "q", "score": 1}]}
    assert imported(tmp_path, [record]) == [{"user_input": "Q", "completion": "x"}]


def test_odd_items_of_a_list(tmp_path, capsys):
    good = {"question": "Q", "answers": RATED}
    odd = [{"question": "Q", "answers": value} for value in ([None], {"text": ["x"], "score": []},
                                                             "x", 7, [RATED[0]])]
    assert imported(tmp_path, [*odd, good]) == answers("x", 3, "y", 5)
    said = capsys.readouterr().out
    assert "left out 4: not what question as prompt, answers: text as completion" in said
    assert "left out 1: fewer than two of its completions have a score (records 5)" in said
    record = {"prompt": "Q", "generations": ["x", "y"], "ratings": [4, None]}
    assert imported(tmp_path, [record]) == []
    assert "fewer than two of its completions have a score" in capsys.readouterr().out


def test_cells_beyond_the_header_are_named(tmp_path, capsys):
    assert imported(tmp_path, "question,answer\nQ,x,more\n", "x.csv") == [
        {"user_input": "Q", "completion": "x"}]
    assert "not used: cells beyond the header (in 1 records)" in capsys.readouterr().out


@pytest.mark.parametrize("record", [
    {"question": "Q", "response_j": "x", "response_k": "y"},
    {"prompt": "Q", "pos_resp": "x", "neg_resp": "y"},
    {"system": "", "history": [], "question": "Q", "response_chosen": "x",
     "response_rejected": "y"},  # shibing624
    {"trajectory": [user("Q")], "chosen": "x", "rejected": "y"},
    {"context": [{"role": "human", "text": "Q"}], "chosen": {"role": "assistant", "text": "x"},
     "rejected": {"role": "assistant", "text": "y"}},  # hh_rlhf_cn
])
def test_pairs(tmp_path, record):
    assert imported(tmp_path, [record]) == FIRST


SYSTEM_AND_Q, TALK = [system("S"), user("Q")], [user("P"), assistant("w"), user("Q")]


@pytest.mark.parametrize("before, asked, prompt", [
    ({"system": "S", "prompt": "Q"}, [user("Q")], SYSTEM_AND_Q),
    ({"system": "S"}, [user("Q")], SYSTEM_AND_Q),
    ({"prompt": SYSTEM_AND_Q}, [user("Q ")], SYSTEM_AND_Q),
    ({"system": "S", "prompt": "Q"}, SYSTEM_AND_Q, SYSTEM_AND_Q),
    ({"system": "S", "prompt": "Q"}, TALK, [system("S"), *TALK]),
    ({"history": [["P", "w"]], "instruction": "Q"}, [user("Q")], TALK),
    ({"prompt": "Q"}, TALK, TALK),
    # as a text, this prompt would be a system message and "hi"
    ({"prompt": "Q\n\nHuman: hi"}, [user("Q\n\nHuman: hi")], "Q\n\nHuman: hi"),
])
def test_pairs_of_whole_dialogues_keep_what_stands_before(tmp_path, before, asked, prompt):
    sides = [[*asked, assistant("x")], [*asked, assistant("y")]]
    pair = before | {"chosen": sides[0], "rejected": sides[1]}
    assert imported(tmp_path, [pair]) == answers("x", 1, "y", 0, prompt=prompt)


def form(begin, end, last=None, model="assistant"):
    """What begins a question and an answer, and what ends them."""
    return begin.format("user"), begin.format(model), end, last or end


HUMAN = ["Human: ", "Assistant: ", "\n\n", "\n\n"]
GUANACO = ["### Human: ", "### Assistant: ", "\n", "\n"]
HEADED = [
    form("<|im_start|>{}\n", "<|im_end|>\n"),  # ChatML
    form("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),  # LLaMA 3
    form("<start_of_turn>{}\n", "<end_of_turn>\n", model="model"),  # Gemma
    form("<|{}|>\n", "</s>\n"),  # Zephyr
    form("<|{}|>\n", "<|end|>\n", "<|end|>\n<|endoftext|>"),  # Phi 3
    form("<|im_start|>{}<|im_sep|>", "<|im_end|>"),  # Phi 4
    form("<|{}|>\n", "\n", "</s>\n")]  # Tulu
FORMS = [*HEADED, ("<s>[INST] ", "", " [/INST]", " </s>")]  # LLaMA 2


@pytest.mark.parametrize("first", ["", "<|begin_of_text|>", "<bos>", "<s>"])
@pytest.mark.parametrize("marks", FORMS)
def test_templates(tmp_path, marks, first):
    asks, says, asked, end = marks
    first = first if not asks.startswith("<s>") else ""
    prompt, before = f"{first}{asks}Q{asked}{says}", f"{first}{asks}P{asked}{says}w{end}"
    pair = {"prompt": prompt, "chosen": f"x{end}", "rejected": f"y{end}"}
    assert imported(tmp_path, [pair]) == FIRST
    assert imported(tmp_path, [pair | {"prompt": prompt.strip()}]) == FIRST
    ours = {"user_input": TALK, "completion": "x\n\n1 < 2"}
    text = f"{before}{asks}Q{asked}{says}x\n\n1 < 2{end}"
    assert imported(tmp_path, [{"text": text}, {"text": text.strip()}]) == [ours]


def test_a_template_with_a_system_message(tmp_path):
    for said, ours in ("S", SYSTEM_AND_Q), ("", "Q"):  # Zephyr's writes an empty one
        text = f"<|system|>\n{said}</s>\n<|user|>\nQ</s>\n<|assistant|>\nx</s>"
        assert imported(tmp_path, [{"text": text}]) == [{"user_input": ours, "completion": "x"}]


@pytest.mark.parametrize("ending", ["json", "csv"])
@pytest.mark.parametrize("marks", [*FORMS, HUMAN, GUANACO])
def test_an_answer_that_is_the_whole_dialogue(tmp_path, marks, ending):
    asks, says, asked, end = marks
    short = f"{asks}Q{asked}{says}"
    talk = f"{asks}P{asked}{says}w{end}{short}"
    for prompt, before, ours in [("Q", short, "Q"), (short, short, "Q"), ("Q", talk, TALK),
                                 (talk, talk, TALK), (talk, short, TALK),
                                 *[("Q", says, "Q")] * (marks in HEADED)]:
        x, y = f"{before}x{end}", f"{before}y{end}"
        for record in ({"chosen": x, "rejected": y},
                       {"response_a": x, "response_b": y, "winner": "a"}):
            assert imported(tmp_path, [record | {"prompt": prompt}], f"x.{ending}") == answers(
                "x", 1, "y", 0, prompt=ours)
        assert imported(tmp_path, [{"prompt": prompt, "completion": x}], f"x.{ending}") == [
            {"user_input": ours, "completion": "x"}]


def test_an_answer_about_a_dialogue_is_an_answer(tmp_path):
    """Only one that repeats the question is the dialogue."""
    x = "Human: Hello.\n\nAssistant: Hi."
    pair = {"prompt": "Write a dialogue.", "chosen": x, "rejected": "y"}
    assert imported(tmp_path, [pair]) == answers(x, 1, "y", 0, prompt="Write a dialogue.")
    assert imported(tmp_path, [{"prompt": "Write a dialogue.", "completion": x}]) == [
        {"user_input": "Write a dialogue.", "completion": x}]


def test_an_answer_that_is_a_dialogue_of_another_kind(tmp_path, capsys):
    good = {"prompt": "Q", "completion": "x"}
    open_end = "Human: Q\n\nAssistant: x\n\nHuman: Thanks"
    assert imported(tmp_path, [good, good | {"completion": open_end}]) == [
        {"user_input": "Q", "completion": "x"}]
    talks = [f"Human: Q\n\nAssistant: {said}\n\nHuman: R\n\nAssistant: z" for said in "xy"]
    assert imported(tmp_path, [{"prompt": "Q", "chosen": talks[0], "rejected": talks[1]}]) == []
    said = capsys.readouterr().out
    assert "left out 1: its completion does not end with the assistant (records 2)" in said
    assert "left out 1: its two sides answer different prompts (records 1)" in said


@pytest.mark.parametrize("prompt", [
    "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "<s>[INST] Q [/INST]"])
@pytest.mark.parametrize("end", [
    "<|im_end|>\n", " </s>", "<|eot_id|>", "<|im_end|>\n<|endoftext|>"])
def test_the_end_of_a_turn_is_no_part_of_an_answer(tmp_path, prompt, end):
    pair = {"prompt": prompt, "chosen": f"x</s>y{end}", "rejected": f"y{end}"}
    assert imported(tmp_path, [pair]) == answers("x</s>y", 1, "y", 0)
    assert imported(tmp_path, [{"prompt": prompt, "completion": f"x{end}"}]) == [
        {"user_input": "Q", "completion": "x"}]
    plain = {"prompt": "Q", "completion": f"x{end}"}  # a text may be about it
    assert imported(tmp_path, [plain]) == [{"user_input": "Q", "completion": f"x{end}".strip()}]


def test_several_chosen_and_rejected(tmp_path):
    record = {"prompt": "Q", "chosen": ["x"], "rejected": ["y", "z"]}
    assert imported(tmp_path, [record]) == answers("x", 1, "y", 0, "z", 0)


# ------------------------------------------------------------------------------------------------
# Scores on a scale

@pytest.mark.parametrize("scores, numbers", [
    (["8/10", "6 / 10", "7.5/10"], [8, 6, 7.5]),
    (["4 out of 5", "3/5", "2 of 5"], [4, 3, 2]),
    (["80%", "7 / 100", "55.5 %"], [80, 7, 55.5]),
    (["8", " 6 ", "-1e1"], [8, 6, -10]),
])
def test_scores_on_one_scale(tmp_path, scores, numbers):
    records = [{"prompt": "Q", "response": f"{n}", "score": score}
               for n, score in enumerate(scores)]
    assert [r["score"] for r in imported(tmp_path, records)] == numbers


@pytest.mark.parametrize("odd, reason", [
    ("4/5", "its score is out of 5, where most are out of 10"),
    ("80%", "its score is out of 100, where most are out of 10"),
    (8, "its score is a plain number, where most are out of 10"),
    ("good", "its score is not a number"),
    ("1/2/10", "its score is not a number"),
])
def test_a_score_on_another_scale_is_left_out(tmp_path, capsys, odd, reason):
    records = [{"prompt": "Q", "response": f"{n}", "score": score}
               for n, score in enumerate([odd, "8/10", "6/10"])]
    assert [r["score"] for r in imported(tmp_path, records)] == [8, 6]
    assert f"left out 1: {reason} (records 1)" in capsys.readouterr().out


@pytest.mark.parametrize("label, score", [
    (True, 1), (1, 1), ("1", 1), ("True", 1), (False, 0), (0, 0), ("0", 0), ("false", 0)])
def test_labels(tmp_path, label, score):
    (ours,) = imported(tmp_path, [{"prompt": "Q", "completion": "x", "label": label}])
    assert ours["score"] == score


@pytest.mark.parametrize("label", [{"ability_en": ["x"]}, ["x"]])
def test_a_label_of_topics(tmp_path, capsys, label):
    record = {"prompt": "Q", "completion": "x", "label": label}
    assert imported(tmp_path, [record]) == [{"user_input": "Q", "completion": "x"}]
    assert "not used: label (in 1 records)" in capsys.readouterr().out
    assert len(imported(tmp_path, [record, record | {"label": "1"}])) == 1
    said = capsys.readouterr().out
    assert "left out 1: its label is neither true nor false (records 1)" in said


@pytest.mark.parametrize("label", ["bad", "science", 7])
def test_a_label_that_may_be_a_verdict_makes_no_demonstration(tmp_path, capsys, label):
    good = {"prompt": "Q", "completion": "x"}
    (ours,) = imported(tmp_path, [good | {"label": label}, good | {"label": True}])
    assert ours["score"] == 1.0
    said = capsys.readouterr().out
    assert "left out 1: its label is neither true nor false (records 1)" in said


# ------------------------------------------------------------------------------------------------
# Rows, tasks, strings, texts

def row(name, parent, text, role="assistant", rank=None, **more):
    return {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank,
            "deleted": False, "lang": "en", **more}


OASST = [row("1", None, "Q", "prompter"), row("2", "1", "x", rank=1), row("3", "1", "y", rank=0),
         row("4", "3", "R", "prompter"), row("5", "4", "z"), row("6", "1", "gone", deleted=True)]


@pytest.mark.parametrize("ending", ["json", "csv"])
@pytest.mark.parametrize("order", [1, -1])
def test_oasst_with_a_message_a_row(tmp_path, order, ending):
    ours = imported(tmp_path, OASST[::order], f"x.{ending}")
    demonstration = {"user_input": [user("Q"), assistant("y"), user("R")], "completion": "z"}
    assert sorted(ours[:2], key=lambda r: r["completion"]) == answers("x", 0, "y", 1)
    assert ours[2:] == [demonstration]


def test_messages_that_hang_on_nothing(tmp_path, capsys):
    odd = [row("7", "none", "x"), row("8", "9", "x"), row("9", "8", "x"), row("2", "1", "again")]
    assert len(imported(tmp_path, OASST + odd)) == 3
    said = capsys.readouterr().out
    assert "left out 3: the messages before it are not in the file (records 7, 8, 9)" in said
    assert "left out 1: its message_id is that of another message (records 10)" in said


def test_a_tree_too_deep(tmp_path, capsys):
    rows = [row(str(n), str(n - 1) if n else None, f"{n}", ("prompter", "assistant")[n % 2])
            for n in range(3000)]
    assert imported(tmp_path, rows) == []
    assert "left out 1: not what OASST trees look like (records 1)" in capsys.readouterr().out


def test_replies_that_are_the_same_compare_nothing(tmp_path):
    """The rest of the tree is there, and what both say is a demonstration."""
    same = [row("1", None, "Q", "prompter"), row("2", "1", "x", rank=0), row("3", "1", "y", rank=1),
            row("4", "2", "R", "prompter"), row("5", "4", "z", rank=0), row("6", "4", "z", rank=1)]
    assert imported(tmp_path, same) == [
        *answers("x", 1, "y", 0),
        {"user_input": [user("Q"), assistant("x"), user("R")], "completion": "z"}]


def test_a_message_a_row_by_conversation(tmp_path):
    rows = [{"conversation_id": c, "turn": t, "role": r, "content": text} for c, t, r, text in (
        (1, 10, "user", "R"), (1, 2, "assistant", "x"), (2, 1, "user", "S"), (1, 1, "user", "Q"),
        (1, 11, "assistant", "y"), (2, 2, "assistant", "z"))]
    assert sorted(imported(tmp_path, rows, "x.csv"), key=lambda r: r["completion"]) == [
        {"user_input": [user("Q"), assistant("x"), user("R")], "completion": "y"},
        {"user_input": "S", "completion": "z"}]


def talk(name, turn, role, text, **more):
    return {"conversation_id": name, "turn": turn, "role": role, "content": text, **more}


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_fields_of_later_rows_are_reported(tmp_path, capsys, ending):
    rows = [talk(1, 0, "user", "Q", source="a", rating=None),
            talk(1, 1, "assistant", "x", source="a", rating=5)]
    assert imported(tmp_path, rows, f"x.{ending}") == [{"user_input": "Q", "completion": "x"}]
    said = capsys.readouterr().out
    assert "not used: messages: rating (in 1 records), source (in 1 records)\n" in said


@pytest.mark.parametrize("name", [None, ""])
def test_rows_of_no_dialogue_are_left_out(tmp_path, capsys, name):
    rows = [talk(name, 0, "user", "R"), talk(name, 1, "assistant", "y")]
    good = [talk("c", 0, "user", "Q"), talk("c", 1, "assistant", "x")]
    assert imported(tmp_path, rows + good) == [{"user_input": "Q", "completion": "x"}]
    assert "left out 2: it has no conversation_id (records 1, 2)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        imported(tmp_path, rows)
    assert "no record that can be used: it has no conversation_id\n" in capsys.readouterr().err


@pytest.mark.parametrize("odd", [None, "", "first", "nan"])
def test_turns_are_sorted_by_number(tmp_path, capsys, odd):
    rows = [talk("c", "10.0", "user", "R"), talk("c", "1.0", "assistant", "x"),
            talk("d", "0.0", "user", "S"), talk("c", "0.0", "user", "Q"),
            talk("c", 11, "assistant", "y"), talk("d", odd, "assistant", "z")]
    assert imported(tmp_path, rows) == [
        {"user_input": [user("Q"), assistant("x"), user("R")], "completion": "y"}]
    said = capsys.readouterr().out
    assert "left out 2: a message of its dialogue has no number as its turn (records 3, 6)" in said
    plain = [row | {"turn": odd} for row in (talk("d", 0, "user", "S"), rows[-1])]
    assert imported(tmp_path, plain) == [{"user_input": "S", "completion": "z"}]


def task(*selected, to_name="answer1,answer2", **annotation):
    return {"id": 1, "data": {"prompt": "Q", "answer1": "x", "answer2": "y"}, "predictions": [],
            "annotations": [{"was_cancelled": False, "result": [
                {"from_name": "pw", "to_name": to_name, "type": "pairwise",
                 "value": {"selected": side}}]} | annotation for side in selected]}


@pytest.mark.parametrize("theirs, ours", [
    (task("left"), FIRST),
    (task("right", to_name="txt-1,txt-2"), SECOND),
    (task("left", to_name="answer2,answer1"), SECOND),
    (task("left", "right"), TIE),
])
def test_label_studio(tmp_path, capsys, theirs, ours):
    skipped, empty = task("right", was_cancelled=True), task()
    assert imported(tmp_path, [theirs, skipped, empty]) == ours
    said = capsys.readouterr().out
    assert "Label Studio's tasks: prompt, answer1 and answer2 compared by annotations" in said
    assert "left out 2: nobody says which side is better (records 2, 3)" in said


def test_json_in_a_string_that_is_a_text_stays_a_text(tmp_path):
    records = [{"instruction": "Q", "input": '["b", "a"]', "output": '["a", "b"]'},
               {"instruction": "Q", "input": '{"a": 1}', "output": '{"b": 2}'}]
    assert imported(tmp_path, records) == [
        {"user_input": 'Q\n\n["b", "a"]', "completion": '["a", "b"]'},
        {"user_input": 'Q\n\n{"a": 1}', "completion": '{"b": 2}'}]
    record = {"prompt": "Q", "response_a": '{"a": 1}', "response_b": '["b"]', "winner": "a"}
    assert imported(tmp_path, [record]) == answers('{"a": 1}', 1, '["b"]', 0)


def talks(n):
    return [json.dumps([user(f"Q{i}"), assistant(f"x{i}")]) for i in range(n)]


WITHOUT_COMMAS = "[{'role': 'user', 'content': 'Q'}\n {'role': 'assistant', 'content': 'x'}]"


@pytest.mark.parametrize("cell", [talks(1)[0][:40], talks(1)[0][:1], WITHOUT_COMMAS, "nan"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_damaged_cell_costs_its_own_record(tmp_path, capsys, cell, place):
    cells = talks(3)
    cells.insert(place, cell)
    ours = [{"user_input": f"Q{i}", "completion": f"x{i}"} for i in range(3)]
    assert imported(tmp_path, [{"messages": text} for text in cells], "x.csv") == ours
    said = capsys.readouterr().out
    assert f"left out 1: its messages cannot be read as JSON (records {place + 1})" in said


def test_a_damaged_side(tmp_path, capsys):
    pairs = [{"prompt": f"Q{i}", "chosen": text, "rejected": text.replace("x", "y")}
             for i, text in enumerate(talks(3))]
    pairs[1]["chosen"] = pairs[1]["chosen"][:40]
    ours = [*answers("x0", 1, "y0", 0, prompt="Q0"), *answers("x2", 1, "y2", 0, prompt="Q2")]
    assert imported(tmp_path, pairs, "x.csv") == ours
    turns = [{"prompt": '["Q"]', "response_a": a, "response_b": '["y"]', "winner": "a"}
             for a in ('["x', '["x"]')]
    assert imported(tmp_path, turns, "x.csv") == FIRST
    said = capsys.readouterr().out
    assert "left out 1: its chosen cannot be read as JSON (records 2)" in said
    assert "left out 1: its response_a cannot be read as JSON (records 1)" in said


def test_messages_without_commas_are_no_text(tmp_path, capsys):
    assert imported(tmp_path, [{"messages": WITHOUT_COMMAS}], "x.csv") == []
    assert imported(tmp_path, [{"prompt": WITHOUT_COMMAS, "completion": "y"}], "x.csv") == []
    said = capsys.readouterr().out
    assert "left out 1: its messages cannot be read as JSON (records 1)" in said
    assert "left out 1: its prompt cannot be read as JSON (records 1)" in said


def test_a_damaged_cell_that_plays_no_part_costs_nothing(tmp_path):
    records = [{"prompt": f"Q{i}", "completion": "x", "meta": meta}
               for i, meta in enumerate(['{"a": 1}', '{"a"', "[1]"])]
    assert [r["user_input"] for r in imported(tmp_path, records, "x.csv")] == ["Q0", "Q1", "Q2"]


def test_a_list_is_a_list_where_others_are_texts(tmp_path):
    records = [{"messages": text} for text in talks(3)]
    records[1]["messages"] = json.loads(talks(3)[1])
    assert [r["completion"] for r in imported(tmp_path, records)] == ["x0", "x1", "x2"]


def test_texts_of_which_some_are_json_stay_texts(tmp_path):
    outputs = ['["a"]', '{"b": 1}', '["a', "plain"]
    records = [{"instruction": "Q", "output": text} for text in outputs]
    assert [r["completion"] for r in imported(tmp_path, records, "x.csv")] == outputs


@pytest.mark.parametrize("records", [
    [{"conversations": str([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "it's"}])}],
    [{"conversation": [{"input": "Q", "output": "it's"}]}],
    [{"conversation": [{"human": "Q", "assistant": "it's"}]}],
    [{"prompt": "Q", "messages": [user("Q"), assistant("it's")]}],
    [{"problem": "Q", "output": "it's", "messages": [user("Q"), assistant("it's")]}],
    [{"instruction": "Q", "response": "its", "conversations": [user("Q"), assistant("it's")]}],
    [{"inputs": "Q", "targets": "it's"}],
    [{"Question": "Q", "Answer": "it's"}],
    [{"text": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nit's<|im_end|>\n"}],
    [{"text": "<s>[INST] Q [/INST] it's </s>"}],
    {"rows": [{"row_idx": 0, "row": {"question": "Q", "answer": "it's"}}]},
    {"question": ["Q"], "answer": ["it's"]},
    {"question": {"0": "Q"}, "answer": {"0": "it's"}},
])
def test_the_same_demonstration(tmp_path, records):
    assert imported(tmp_path, records) == [{"user_input": "Q", "completion": "it's"}]


@pytest.mark.parametrize("more, lost", [
    ({"instruction": "You are a poet."}, "instruction"),
    ({"problem": "algebra"}, "problem"),
    ({"instruction": "You are a poet.", "input": "of Rome"}, "input (in 1 records), instruction"),
    ({"prompt": "Q", "input": "of Rome"}, "input (in 1 records), prompt"),
    ({"prompt": "S\n\nHuman: Q"}, "prompt"),
    ({"prompt": " Q\n"}, None),  # what the user says there
    ({"prompt": "Q"}, None),
])
def test_what_stands_beside_a_dialogue_with_an_answer(tmp_path, capsys, more, lost):
    record = more | {"conversations": [user("Q"), assistant("x")]}
    assert imported(tmp_path, [record]) == [{"user_input": "Q", "completion": "x"}]
    said = capsys.readouterr().out
    assert (f"not used: {lost} (in 1 records)\n" if lost else "all fields used") in said


def test_a_prompt_that_goes_on_with_a_dialogue_is_used(tmp_path):
    asked = {"messages": [user("P"), assistant("w")], "prompt": "Q"}
    ours = answers("x", 1, "y", 0, prompt=TALK)
    assert imported(tmp_path, [asked | {"chosen": "x", "rejected": "y"}]) == ours
    record = asked | {"response_a": "x", "response_b": "y", "winner": "a"}
    assert imported(tmp_path, [record]) == ours
    assert imported(tmp_path, [{"messages": [system("S")], "prompt": "Q"}]) == [
        {"user_input": SYSTEM_AND_Q}]


FILLED = "Below is an instruction.\n\n### Instruction:\nQ\n\n### Input:\ni\n\n### Output:\n"


@pytest.mark.parametrize("prompt, output, ours", [
    (FILLED + "x\n", "x", "Q\n\ni"),
    (FILLED, "x", f"{FILLED}\n\ni"),  # it does not end with the answer
    ("Q: x or y?", "x", "Q: x or y?\n\ni"),
])
def test_a_prompt_with_the_answer_in_it_is_none(tmp_path, capsys, prompt, output, ours):
    record = {"instruction": "Q", "input": "i", "output": output, "prompt": prompt}
    assert imported(tmp_path, [record]) == [{"user_input": ours, "completion": "x"}]
    lost = "prompt" if ours.startswith("Q\n") else "instruction"
    assert f"not used: {lost} (in 1 records)" in capsys.readouterr().out


@pytest.mark.parametrize("record", [
    {"prompt": "S\n\nHuman: Q", "completion": "x"},
    {"prompt": "S\n\nHuman: Q", "messages": [system("S"), user("Q"), assistant("x")]},
    {"text": "S\n\nHuman: Q\n\nAssistant: x"},
])
def test_what_stands_before_the_first_turn_is_the_system_message(tmp_path, record):
    assert imported(tmp_path, [record]) == [
        {"user_input": [system("S"), user("Q")], "completion": "x"}]


def test_turns_of_helpsteer_2(tmp_path):
    first = {"prompt": "Q", "response": "x", "helpfulness": 3}
    second = first | {"prompt": "Q<extra_id_1>Assistant\nx\n<extra_id_1>User\nR\n\nR"}
    assert imported(tmp_path, [first, second]) == answers("x", 3) + answers(
        "x", 3, prompt=[user("Q"), assistant("x"), user("R\n\nR")])


@pytest.mark.parametrize("more, reason", [
    ("STRAY\n", "there is text outside its messages"),
    ("<|im_start|>user name=Bob\nR<|im_end|>\n", "a message is of 'user name=Bob'")])
def test_text_between_the_messages_of_chatml(tmp_path, capsys, more, reason):
    text = "<|im_start|>user\nQ<|im_end|>\n{}<|im_start|>assistant\nit's"  # cut: it has no end
    whole = text.format("") + "<|im_end|>\n</s>"  # the end of the text says nothing
    assert imported(tmp_path, [{"text": whole}, {"text": text.format(more)}]) == [
        {"user_input": "Q", "completion": "it's"}]
    assert imported(tmp_path, [{"text": text.format("")}]) == [
        {"user_input": "Q", "completion": "it's"}]
    assert f"left out 1: {reason} (records 2)" in capsys.readouterr().out


def test_llama_2_text_before_the_system_message_stays(tmp_path):
    text = "[INST] Q [/INST] x [INST] <<SYS>>S<</SYS>> R [/INST] y"
    assert imported(tmp_path, [{"text": text}]) == [{"user_input": [
        user("Q"), assistant("x"), user("<<SYS>>S<</SYS>> R")], "completion": "y"}]


def test_llama_2_text_with_a_system_message(tmp_path):
    text = "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] x </s><s>[INST] R [/INST] y </s>"
    assert imported(tmp_path, [{"text": text}]) == [{"user_input": [
        {"role": "system", "content": "S"}, user("Q"), assistant("x"), user("R")],
        "completion": "y"}]


def test_a_question_that_comes_again_in_a_dialogue_is_asked_again(tmp_path):
    record = {"instruction": "Go on.", "history": [["Go on.", "x"]], "output": "y"}
    assert imported(tmp_path, [record]) == [
        {"user_input": [user("Go on."), assistant("x"), user("Go on.")], "completion": "y"}]


@pytest.mark.parametrize("info, prompt", [
    ({"title": "T", "post": "P"}, "T\n\nP"),
    ({"title": None, "post": None, "article": "A"}, "A"),  # CNN/DailyMail
    ({"title": "T", "article": "A"}, "T\n\nA"),
])
def test_summaries(tmp_path, capsys, info, prompt):
    rated = {"info": info, "summary": {"text": "x", "axes": {"overall": 6}}}
    assert imported(tmp_path, [rated]) == answers("x", 6, prompt=prompt)
    compared = {"info": info, "summaries": [{"text": "x"}, {"text": "y"}], "choice": 1}
    assert imported(tmp_path, [compared]) == answers("x", 0, "y", 1, prompt=prompt)
    assert capsys.readouterr().out.count("all fields used") == 2


def test_a_summary_of_nothing_is_left_out(tmp_path, capsys):
    info = {"title": "", "post": None, "article": " "}
    record = {"info": info, "summary": {"text": "x", "axes": {"overall": 6}}}
    assert imported(tmp_path, [record]) == []
    assert "left out 1: there is no prompt (records 1)" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Fields that prompts keep

def kept(tmp_path, records, *argv):
    source = write(tmp_path / "x.json", records)
    data_gen.main(["import", source, "--out", str(tmp_path / "out"), "--eval_share", "0", *argv])
    return {path.name.split("_")[0]: json.loads(path.read_text())
            for path in (tmp_path / "out").iterdir()}


def test_keep(tmp_path, capsys):
    tests = {"inputs": [1, None], "fn": "f"}
    records = [{"question": "Q", "answer": "4", "cases": tests, "n": 0},
               {"question": "R", "answer": "5", "cases": [], "n": 1, "more": "x"},
               {"question": "S", "answer": "5", "n": 1},
               {"question": "Q", "answer": "6", "cases": tests, "n": 0}]
    sets = kept(tmp_path, records, "--keep", "answer,cases,n", "--make", "actor", "rlhf")
    assert sets["rlhf"] == [{"user_input": "Q", "answer": "4", "cases": tests, "n": 0},
                            {"user_input": "R", "answer": "5", "cases": [], "n": 1}]
    assert sets["actor"] == [{"user_input": "Q", "completion": "4"},
                             {"user_input": "R", "completion": "5"},
                             {"user_input": "Q", "completion": "6"}]
    said = capsys.readouterr().out
    assert "left out 1: it has no cases, which --keep names (records 3)" in said
    assert "kept in prompts (--make rlhf): answer (in 3 records), cases (in 3 records)" in said
    assert "not used: more (in 1 records)" in said
    assert "1 prompts come again with other values in the fields that are kept" in said


def test_what_is_kept_stays_as_it_is(tmp_path):
    source = write(tmp_path / "x.csv", [{"prompt": "Q", "tests": [1, 2]}])
    assert convert([source]) == [{"user_input": "Q", "kept": {"tests": "[1, 2]"}}]


def test_what_is_kept_unasked(tmp_path, capsys):
    records = [{"prompt": [user("Q")], "reward_model": {"ground_truth": "4"}, "ability": "math"},
               {"prompt": "R", "ability": "math"}]
    assert kept(tmp_path, records) == {
        "rlhf": [{"user_input": "Q", "reward_model": {"ground_truth": "4"}}, {"user_input": "R"}]}
    said = capsys.readouterr().out
    assert "kept in prompts (--make rlhf): reward_model (in 1 records)" in said
    assert "not used: ability (in 2 records)" in said


def test_demonstrations_that_differ_in_what_is_kept_are_one(tmp_path, capsys):
    records = [{"prompt": "Q", "completion": "x", "answer": answer} for answer in "12"]
    sets = kept(tmp_path, records, "--make", "actor", "rlhf")
    assert sets == {"actor": [{"user_input": "Q", "completion": "x"}],
                    "rlhf": [{"user_input": "Q", "answer": "1"}]}
    said = capsys.readouterr().out
    assert "1 duplicates dropped: they differed only in the fields that prompts keep" in said


def test_an_answer_that_is_the_completion_is_kept_when_asked(tmp_path):
    records = [{"question": "Q", "answer": "4"}]
    assert kept(tmp_path, records, "--make", "rlhf")["rlhf"] == [{"user_input": "Q"}]
    asked = kept(tmp_path, records, "--make", "rlhf", "--keep", "answer", "--overwrite")
    assert asked["rlhf"] == [{"user_input": "Q", "answer": "4"}]


@pytest.mark.parametrize("answer", [4, 0.5, True, ["4", "four"], [1, 2], {"value": 4}, [[1], {}]])
def test_an_answer_that_is_no_text_is_kept_alone(tmp_path, answer):
    records = [{"question": "Q", "answer": answer}]
    assert kept(tmp_path, records, "--keep", "answer") == {
        "rlhf": [{"user_input": "Q", "answer": answer}]}


@pytest.mark.parametrize("keep, said", [
    ("anwser", "--keep anwser: no record of {} has it; they have answer, question"),
    ("answer", "--keep answer: only prompts keep fields, and these records are more than prompts: "
               "add --make rlhf"),
    ("answer,", "--keep answer,: must be fields of the files"),
    ("user_input", "--keep user_input: must be fields of the files"),
])
def test_keep_that_cannot_be(tmp_path, capsys, keep, said):
    source = write(tmp_path / "x.json", [{"question": "Q", "answer": "4"}])
    error = refused(capsys, source, "--keep", keep, "--out", tmp_path / "out")
    assert said.format(source) in error and not (tmp_path / "out").exists()


def test_what_json_cannot_hold_is_not_kept(tmp_path, capsys):
    source = write(tmp_path / "x.jsonl",
                   '{"prompt": "Q", "answers": NaN}\n{"prompt": "R", "answers": 1}\n')
    assert convert([source]) == [{"user_input": "R", "kept": {"answers": 1}}]
    assert "left out 1: its answers cannot be written as JSON" in capsys.readouterr().out


def test_replies_that_nobody_ranked_are_demonstrations(tmp_path):
    tree = [row("1", None, "Q", "prompter"), row("2", "1", "x"), row("3", "1", "y", rank=0)]
    both = [{"user_input": "Q", "completion": text} for text in "xy"]  # one rank compares nothing
    assert imported(tmp_path, tree) == both
    assert imported(tmp_path, [*tree, row("4", "1", "z", rank=1)]) == [
        *answers("y", 1, "z", 0), both[0]]


def test_a_column_that_is_there_twice_is_refused(tmp_path, capsys):
    path = write(tmp_path / "x.csv", "prompt,response,response\nq,a,b\n")
    line = refused(capsys, path, "--out", tmp_path / "out")
    assert "names 'response' more than once" in line and not (tmp_path / "out").exists()
    assert len(imported(tmp_path, "prompt,response,,\nq,a,,\n", "y.csv")) == 1  # as of Excel
