"""LaTeX tables: what booktabs needs, whatever the names; set by pdflatex where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_case import MINI
from test_markdown import BASE, GPTQ, GRACE, comparison, pair, with_parts

from qatbench.report.latex import figures, name, tables
from qatbench.report.model import Comparison
from qatbench.stages.report_files import read

ODD = "[a]_50%&$#{x}~^\\<y>|--- −±"
CASES = ["odd", "mini", "mini-ablation"]
PAGE = r"""\documentclass[10pt,twocolumn]{article}
\usepackage[textwidth=6.75in,columnsep=.25in]{geometry}
\usepackage{booktabs}
\begin{document}
%s
\end{document}
"""


def made_of(case: str) -> dict[str, str]:
    """The tables of a committed comparison, or of one whose names hold every special sign."""
    if case != "odd":
        return tables(read(MINI.with_name(case)))
    strange = GRACE.model_copy(update={"name": ODD})
    result = comparison(pair(strange, GPTQ), BASE, GPTQ, strange, task=f"own{ODD}")
    return tables(with_parts(result))


def test_the_main_table_has_five_columns_with_mathematical_signs() -> None:
    made = tables(comparison(pair(GRACE, GPTQ, p_holm=0.0002, difference=-0.02)))
    assert set(made) == {"tables/arms.tex", "tables/pairs.tex"}
    arms = made["tables/arms.tex"]
    assert arms.startswith("% Needs \\usepackage{booktabs}")
    assert "\\label{tab:arms-scienceqa-test-text}" in arms
    assert "on scienceqa:test:text ($n = 1000$), and paired difference to base (points)" in arms
    assert "Arm & Accuracy & Difference & $p$ & Bits \\\\" in arms
    assert "base & 55.5 {\\scriptsize [52.5, 58.5]} & baseline & -- & 16.00 \\\\" in arms
    assert (
        "gptq & 64.1 {\\scriptsize [61.1, 67.1]} & $+$8.6 {\\scriptsize [$+$6.6, $+$10.6]} & 0.001"
        " & 4.25 \\\\" in arms
    )
    lost = r"$-$2.0 {\scriptsize [$+$4.4, $+$8.4]} & $<$0.001 & better \\"
    assert f"grace $-$ gptq & {lost}" in made["tables/pairs.tex"]
    assert r"within $\pm$1 points" in made["tables/pairs.tex"]


def test_ablations_are_told_in_the_words_of_the_caption() -> None:
    made = tables(with_parts(comparison()))["tables/ablations.tex"]
    rows = [line for line in made.splitlines() if line.endswith(r"\\")]
    assert [row.rsplit(" & ")[-1][:-3] for row in rows] == [
        "Verdict", "undecided", "equivalent", "helps",
    ]  # fmt: skip
    assert r"adaptive beta (beta fixed at 0.5) & 4 g64 & $+$0.8" in made


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rtn-w4", "rtn-w4"),
        ("a_b", r"a\_\allowbreak{}b"),
        ("50%&$#{}", r"50\%\&\$\#\{\}"),
        ("~^\\", r"\textasciitilde{}\textasciicircum{}\textbackslash{}"),
        ("<|>", r"\textless{}\textbar{}\textgreater{}"),
        ("a--b---", r"a-{}-b-{}-{}-"),
        ("[x]", "{}[x]"),
    ],
)
def test_a_name_is_no_command(text: str, told: str) -> None:
    assert name(text) == told


def test_figures_have_signs_of_mathematics() -> None:
    assert figures("-0.3 [-1.0, +0.4]") == "$-$0.3 [$-$1.0, $+$0.4]"
    assert figures("<0.001") == "$<$0.001"
    assert figures("-") == "--"


@pytest.mark.parametrize("case", CASES)
def test_each_table_is_whole(case: str) -> None:
    """Braces and dollars close, no sign is bare, all rows have a cell for each column."""
    made = made_of(case)
    assert set(made) == {f"tables/{kind}.tex" for kind in ("arms", "pairs", "ablations")}
    for text in made.values():
        plain = re.sub(r"\\[%&$#_{}\\]", "", text.split("\n", 1)[1])
        plain = re.sub(r"\\label\{[A-Za-z0-9:._-]+\}", "", plain)
        assert re.search(r"[%#_~^]", plain) is None
        depth = 0
        for sign in plain:
            depth += (sign == "{") - (sign == "}")
            assert depth >= 0
        assert depth == 0
        outside, inside = plain.split("$")[::2], plain.split("$")[1::2]
        assert len(outside) == len(inside) + 1
        assert re.search(r"[<>|−±]", "".join(outside)) is None
        assert set(inside) <= {"-", "+", "<", "p", r"\pm"} | {
            found for found in inside if re.fullmatch(r"n = \d+", found)
        }
        for begun in re.findall(r"\\begin\{(\w+)\}", text):
            assert text.count(f"\\end{{{begun}}}") == text.count(f"\\begin{{{begun}}}")
        for table in text.split("\\begin{tabular}")[1:]:
            (columns,) = re.findall(r"^\{@\{\}(?:p\{[\d.]+cm\}|l)([lr]+)@\{\}\}$", table, re.M)
            rows = re.findall(r"^(.*) \\\\$", table, re.M)
            assert len(rows) > 1
            assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns)}


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on the PATH")
@pytest.mark.parametrize("case", CASES)
def test_pdflatex_sets_them_in_a_column(case: str, tmp_path: Path) -> None:
    made = made_of(case)
    (tmp_path / "page.tex").write_text(PAGE % "\n".join(made.values()), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Warning: Reference" not in done.stdout
    if case != "odd":  # a name without a place to break may be too long for any column
        assert "Overfull \\hbox" not in done.stdout


def test_two_tasks_have_two_labels() -> None:
    one = comparison().tasks[0]
    named = [one.model_copy(update={"definition": one.definition.model_copy(update={"task": task})})
             for task in ("a:b", "a-b")]  # fmt: skip
    made = tables(Comparison(baseline="base", tasks=tuple(named)))["tables/arms.tex"]
    assert re.findall(r"\\label\{(.*)\}", made) == ["tab:arms-a-b", "tab:arms-a-b-2"]
