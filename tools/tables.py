"""The table with which tools.chat compares checkpoints, in Markdown or CSV."""

import csv
import io
import re

from lib.errors import write_whole
from tools.data.sets import as_text


def write_table(out, paths, prompts, answers, scores):
    """A row per prompt, written to `out` (.md or .csv) or printed; and always printed, a row per
    checkpoint. `answers`, `scores`: a column for each of `paths`; no `scores`: none."""
    rows = [["prompt"]]
    for path in paths:
        rows[0] += [path] + ([f"score of {path}"] if scores else [])
    for i, prompt in enumerate(prompts):
        rows.append([as_text(prompt)])
        for n, column in enumerate(answers):
            rows[-1] += [column[i][0]] + ([f"{scores[n][i]:.3f}"] if scores else [])
    summary = markdown_table(summary_rows(paths, answers, scores))
    if out and out.endswith(".csv"):
        file = io.StringIO()
        csv.writer(file).writerows(rows)
        write_whole(out, file.getvalue().encode())
    elif out:
        write_whole(out, (summary + "\n" + markdown_table(rows)).encode())
    else:
        print(markdown_table(rows))
    print(summary + (f"saved {out}" if out else ""))


def summary_rows(paths, answers, scores):
    """A row per checkpoint: mean score and win rate."""
    rows = [["checkpoint", "answers", "cut at the limit"]]
    rows[0] += ["mean score", f"win rate against {paths[0]}"] if scores else []
    for n, (path, column) in enumerate(zip(paths, answers)):
        rows.append([path, len(column), sum(not ended for _, ended in column)])
        if scores:
            wins = sum((s > first) + (s == first) / 2 for s, first in zip(scores[n], scores[0]))
            rows[-1] += [f"{sum(scores[n]) / len(column):.3f}",
                         f"{wins / len(column):.3f}" if n else "-"]
    return rows


def markdown_table(rows):
    lines = ["| " + " | ".join(map(markdown_cell, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"


def markdown_cell(value):
    """One cell of a table: what would be read as markup is escaped, a line break is <br>."""
    lines = str(value).strip().splitlines() or ["(empty)"]
    return "<br>".join(re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", line) for line in lines)
