"""Recovery and the noise floor in words."""

from __future__ import annotations

from test_markdown import GPTQ, GRACE, comparison, pair

from qatbench.report.details import Noise, Recovery
from qatbench.report.recovery import section

ROW = Recovery(
    arm="grace", ptq="gptq", full="base", grid="4 bits g64",
    share=0.634, low=0.31, high=1.02, withheld=None,
)  # fmt: skip
FLOOR = Noise(
    kind="seeds", arm="sft", other="sft",
    flips=12.5, share=0.0125, difference=0.0031, same_answer=0.98,
)  # fmt: skip


def told(recovery: tuple[Recovery, ...] = (), noise: tuple[Noise, ...] = ()) -> str:
    (task,) = comparison(pair(GRACE, GPTQ)).tasks
    return section(task.model_copy(update={"recovery": recovery, "noise": noise}))


def test_a_share_has_its_interval() -> None:
    assert told((ROW,)) == (
        "- won back: 63 % [31, 102] of what PTQ lost (`grace` over `gptq`, against `base` at 16"
        " bits)."
    )


def test_what_is_withheld_says_why_and_where() -> None:
    none = {"share": None, "low": None, "high": None}
    other = ROW.model_copy(update=none | {"grid": "2 bits g64", "withheld": "PTQ lost nothing"})
    first, second = told((ROW, other)).splitlines()
    assert first.startswith("- 4 bits g64: won back: 63 %")
    assert second.startswith("- 2 bits g64: won back: withheld, PTQ lost nothing (`grace` over")


def test_the_noise_floor_is_of_seeds_or_of_two_evaluations() -> None:
    assert told(noise=(FLOOR,)) == (
        "- noise floor, seeds of `sft`: 12.5 questions (1.2 %) are right in one and wrong in the"
        " other; scores 0.3 points apart."
    )
    again = FLOOR.model_copy(update={"kind": "repeat", "arm": "a", "other": "b"})
    assert told(noise=(again,)).startswith("- noise floor, `a` and `b`, evaluations of one model:")


def test_nothing_known_is_nothing_said() -> None:
    assert told() == ""
