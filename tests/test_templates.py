"""tools/data/templates.py: the questions that the LLM gets, and a reader's own in their place.

    pytest tests/test_templates.py
"""

import json

from data_commands import EN, USER, asking, refused, run, write


def test_templates(tmp_path, llm, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server, source = llm(lambda question, n: "5"), write(
        tmp_path / "x.json", [{"user_input": [USER], "completion": "{user_input} <1>"}]
    )

    def question(out, *argv):
        run("score", source, *argv, out=tmp_path / out, **asking(server))
        return server.requests[-1][2]["messages"][0]["content"]

    assert "A bird: {user_input}" not in question("a.json")
    write(tmp_path / "templates.json", json.dumps({"reward": "Q {user_input} A {completion} {x}"}))
    # filled in once, other braces stay
    assert (
        question("b.json") == f"Q User: {EN} A {{user_input}} <1> {{x}}"
    )
    plain = write(tmp_path / "plain.txt", "{completion}|{user_input}")
    assert question("c.json", "--reward_template", plain) == f"{{user_input}} <1>|User: {EN}"
    for name, template, slot in (
        ("reward", "{completion}", "{user_input}"),
        ("actor", "none", "{examples}"),
        ("rlhf", "none", "{examples}"),
    ):
        bad = write(tmp_path / "bad.json", json.dumps({name: template}))
        command = {"reward": "score", "actor": "self-instruct", "rlhf": "prompts"}[name]
        line = refused(
            capsys,
            lambda: run(command, source, out=tmp_path / "bad", templates=bad, **asking(server)),
        )
        assert f"template '{name}' lacks its placeholder {slot}" in line
