"""Figures of a task: accuracies with their intervals, and what they cost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_markdown import BASE, GPTQ, GRACE, comparison, pair

from qatbench.report import figures, pareto
from qatbench.report.model import ArmResult, Comparison
from qatbench.stages.report_files import write


def case(*arms: ArmResult) -> Comparison:
    return comparison(pair(GRACE, GPTQ), *arms) if arms else comparison(pair(GRACE, GPTQ))


def test_every_task_has_its_figures_and_a_name_for_files() -> None:
    drawn = figures.figures(case())
    assert list(drawn) == [
        "figures/accuracy-scienceqa-test-text.svg",
        "figures/pareto-scienceqa-test-text.svg",
    ]
    for path, svg in drawn.items():
        assert svg.startswith("<?xml")
        assert "#ffffff" not in svg  # no background
        assert figures.alt(case(), path)
    assert figures.figures(case()) == drawn  # the same bytes


def test_the_forest_names_each_arm_with_its_figures() -> None:
    svg = figures.figures(case())["figures/accuracy-scienceqa-test-text.svg"]
    for text in ("base", "gptq", "grace", "70.5 [67.5, 73.5]", "4 bits g64"):
        assert f">{text}</text>" in svg


def test_the_front_holds_what_no_other_beats() -> None:
    there = [arm.model_copy(update={"device": "cpu", "gpu": None}) for arm in (BASE, GPTQ, GRACE)]
    size, cost = pareto.panels(case(*there).tasks[0])
    assert [point.arm.name for point in size.front] == ["grace"]  # of gptq's size, and better
    assert size.points[0].x == pytest.approx((BASE.checkpoint_bytes or 0) / 1e6)
    # of costs among quantized arms: base, taken as it came, would beat whatever costs anything
    assert [point.arm.name for point in cost.front] == ["gptq", "grace"]
    assert [point.x for point in cost.points] == [0, GPTQ.cost_seconds, GRACE.cost_seconds]
    worse = there[2].model_copy(update={"accuracy": 0.5})
    _, cost = pareto.panels(case(*there[:2], worse).tasks[0])
    assert [point.arm.name for point in cost.front] == ["gptq"]


def test_costs_of_unlike_devices_are_not_compared() -> None:
    elsewhere = GRACE.model_copy(update={"device": "cuda", "gpu": "NVIDIA H100"})
    here = GPTQ.model_copy(update={"device": "cpu"})
    _, cost = pareto.panels(case(BASE, here, elsewhere).tasks[0])
    assert cost.front == []
    assert cost.label.endswith("not to be compared")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        ((100.0, 110.0), ["100 s", "110 s"]),  # between two ticks of the usual ones
        ((5.0, 1000.0), ["10 s", "60 s", "10 min"]),
        ((130.0, 140.0, 0.0), ["nothing", "2 min"]),
    ],
)
def test_an_axis_of_costs_always_has_ticks(seconds: tuple[float, ...], told: list[str]) -> None:
    arms = [
        arm.model_copy(update={"making_seconds": time, "device": "cpu"})
        for arm, time in zip((GPTQ, GRACE, BASE), seconds, strict=False)
    ]
    svg = pareto.draw(comparison(None, *arms).tasks[0])
    assert [text for text in told if f">{text}</text>" not in svg] == []


def test_what_a_comparison_no_longer_has_is_removed(tmp_path: Path) -> None:
    write(case(), tmp_path)
    old = tmp_path / "figures" / "pareto-other.svg"
    own = tmp_path / "figures" / "mine.svg"
    for file in (old, own):
        file.write_text("<svg/>")
    write(case(), tmp_path)
    assert not old.exists()
    assert own.exists()
    text = (tmp_path / "report.md").read_text()
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert shown
    assert all((tmp_path / path).is_file() for path in shown)
