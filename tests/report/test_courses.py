"""The report tells how each training went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import pattern, predictions, write_run

from qatbench.errors import ArtifactError
from qatbench.report.markdown import render
from qatbench.report.model import WarningCode
from qatbench.stages.compare import compare

SPEC = {"method": "grace", "controller": {"low": 0.1, "high": 1.0, "rate": 0.01}}


def trained(folder: Path, betas: list[float], **changes: Any) -> None:
    """A log whose CE is the step number, beside the checkpoint's record."""
    lines = [
        {"step": k, "ce": float(k), "kd": 2.0, "rcka": 0.5, "gate": 0.9, "beta": beta, **changes}
        for k, beta in enumerate(betas, start=1)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoint.json").write_text(json.dumps({"spec": SPEC, "inputs": {}}))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_run(tmp_path / "r" / "sft", predictions(pattern(20, 10)), method="sft")


@pytest.fixture
def grace(tmp_path: Path) -> Path:
    arm = tmp_path / "r" / "grace"
    for seed in (0, 1):
        rows = predictions(pattern(20, 12))
        write_run(arm / f"seed-{seed}", rows, method="grace", bits=3, group_size=128)
    trained(arm / "seed-0", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 0.9, 0.8, 0.7])
    trained(arm / "seed-1", [0.5, 0.4, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3])
    return arm


def test_a_course_holds_means_over_steps_and_seeds(base: Path, grace: Path) -> None:
    (course,) = compare([grace], base).training  # sft has no log: it is not told
    assert (course.arm, course.seeds) == ("grace", (0, 1))
    assert [(s.first, s.last) for s in course.stretches] == [
        (1, 2),
        (3, 4),
        (5, 6),
        (7, 8),
        (9, 10),
    ]
    assert [s.ce for s in course.stretches] == [1.5, 3.5, 5.5, 7.5, 9.5]
    assert course.stretches[0].beta == pytest.approx(0.5)
    assert course.stretches[4].beta == pytest.approx((0.8 + 0.7 + 0.3 + 0.3) / 4)
    assert course.beta_range == (0.3, 1.0)
    assert course.beta_at_bound == pytest.approx(2 / 20)


def test_the_report_shows_it(base: Path, grace: Path) -> None:
    text = render(compare([grace], base))
    assert "## Training" in text
    assert "between 0.3 and 1 and lay at one of its bounds in 10 % of the steps" in text
    assert "## Training" not in render(compare([base], base))


def test_beta_at_a_bound_for_most_of_the_steps_is_warned_of(base: Path, grace: Path) -> None:
    def warned() -> list[tuple[tuple[str, ...], str]]:
        found = compare([grace], base).tasks[0].warnings
        return [(w.arms, w.detail) for w in found if w.code is WarningCode.BETA_AT_BOUND]

    assert warned() == []
    for seed in (0, 1):
        trained(grace / f"seed-{seed}", [0.5, 1.0])
    assert warned() == []  # half is not most
    trained(grace / "seed-1", [0.1, 0.1])
    assert warned() == [(("grace",), "grace: 75% of the steps")]
    assert "the range that the distillation loss travels" in render(compare([grace], base))


def test_the_table_tells_beginning_middle_and_end(base: Path, grace: Path) -> None:
    text = render(compare([grace], base)).split("## Training")[1]
    steps = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| ")]
    assert steps == ["steps", "---:", "1-2", "5-6", "9-10"]
    assert "| arm | steps | CE | KD | RCKA | gate | beta |" in text
    for seed in (0, 1):
        trained(grace / f"seed-{seed}", [0.5, 0.5], rcka=None)
    assert "| arm | steps | CE | KD | gate | beta |" in render(compare([grace], base))


def test_terms_that_were_off_are_not_recorded(base: Path, grace: Path) -> None:
    for seed in (0, 1):
        off = {"kd": None, "rcka": None, "gate": None, "beta": None}
        trained(grace / f"seed-{seed}", [0.5, 0.5], **off)
    (course,) = compare([grace], base).training
    assert [(s.first, s.last) for s in course.stretches] == [(1, 1), (2, 2)]
    assert course.stretches[0].kd is course.beta_range is course.beta_at_bound is None


@pytest.mark.parametrize(
    "text",
    [
        '{"step": 1, "ce": 0.3}\n{"step',
        '{"step": 1, "ce": null}',
        '{"step": 1, "ce": NaN}',
        '{"step": "1", "ce": 0.3}',
        '{"step": 1, "ce": "x"}',
        "[]",
        "",
    ],
)
def test_a_damaged_log_is_one_clear_error(text: str, base: Path, grace: Path) -> None:
    (grace / "seed-1" / "train.jsonl").write_text(text)
    with pytest.raises(ArtifactError, match=r"seed-1/train\.jsonl is damaged"):
        compare([grace], base)


def test_logs_of_all_seeds_or_none(base: Path, grace: Path) -> None:
    trained(grace / "seed-1", [0.5] * 9)
    with pytest.raises(ArtifactError, match="different lengths"):
        compare([grace], base)
    (grace / "seed-1" / "train.jsonl").unlink()
    with pytest.raises(ArtifactError, match="for 1 of its 2 seeds"):
        compare([grace], base)
