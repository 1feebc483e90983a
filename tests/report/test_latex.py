"""LaTeX tables: what booktabs needs, whatever the names."""

from __future__ import annotations

import re

from test_markdown import BASE, GPTQ, GRACE, comparison, pair

from qatbench.report.latex import tables


def test_a_table_a_task_with_the_rows_of_the_csv() -> None:
    made = tables(comparison(pair(GRACE, GPTQ)))
    assert set(made) == {"tables/arms.tex", "tables/pairs.tex"}
    arms = made["tables/arms.tex"]
    assert arms.startswith("% Needs \\usepackage{booktabs}\n\\begin{table}")
    for begun in re.findall(r"\\begin\{(\w+)\}", arms):
        assert arms.count(f"\\end{{{begun}}}") == arms.count(f"\\begin{{{begun}}}")
    (columns,) = re.findall(r"\\begin\{tabular\}\{(\w+)\}", arms)
    body = arms.split("\\midrule\n")[1].split("\\bottomrule")[0]
    rows = [line for line in body.splitlines() if line]
    assert len(rows) == 3
    assert all(line.count("&") == len(columns) - 1 for line in rows)
    assert rows[1].startswith("gptq & 64.1 & [61.1, 67.1] & 1000 & +8.6 [+6.6, +10.6]")


def test_special_characters_do_not_reach_latex() -> None:
    odd = GRACE.model_copy(update={"name": "grace_50%&$#{x}~^"})
    arms = tables(comparison(pair(odd, GPTQ), BASE, GPTQ, odd))["tables/arms.tex"]
    (row,) = (line for line in arms.splitlines() if line.startswith("grace"))
    cell = row.split(" & ")[0]
    assert re.search(r"(?<!\\)[%$#_]", cell) is None
    assert r"\_50\%\&\$\#\{x\}" in cell
    assert "acc \\%" in arms
    caption = tables(comparison(pair(GRACE, GPTQ)))["tables/arms.tex"]
    assert r"95\,\% intervals" in caption
