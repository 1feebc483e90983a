"""The definition block: one list, in report.md and in report.html."""

from __future__ import annotations

import html as entities
import re

from test_markdown import BASE, GPTQ, GRACE, comparison, pair

from qatbench.report import html, markdown
from qatbench.report.facts import definition_facts


def test_both_reports_define_a_comparison_in_the_same_words() -> None:
    searched = GPTQ.model_copy(update={"leakage": ("3 test questions are in its data",)})
    result = comparison(
        pair(GRACE, GPTQ), BASE, searched, GRACE,
        images=("none",), kernel=("Linear",), model=("SmolLM2",), cluster="image",
        intersection=True, dropped={"base": 2, "gptq": 0},
    )  # fmt: skip
    facts = definition_facts(result.tasks[0], result.baseline)
    block = markdown.render(result).split("### Definition\n\n")[1].split("\n\n")[0]
    assert block == "\n".join(f"- {name}: {value}" for name, value in facts.items())
    page = html.render(result).split('<dl class="facts">')[1].split("</dl>")[0]
    shown = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)
    plain = [(name, entities.unescape(re.sub("</?code>", "`", value))) for name, value in shown]
    assert plain == list(facts.items())
    assert facts["leakage"] == "searched for, see Notes: `gptq`"
    assert facts["questions"].endswith("the intersection of the arms, left out: base 2, gptq 0")
    assert facts["intervals"] == "95 %; bootstrap of 10000 draws, seed 0, by image"
    assert {"images", "kernel", "model", "recipe"} <= set(facts)


def test_what_says_nothing_is_left_out() -> None:
    facts = definition_facts(comparison(recipe=None).tasks[0], "base")
    assert {"images", "leakage", "model", "recipe"} & set(facts) == set()
