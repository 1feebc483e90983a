from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import damage, lost_two_gained_three, pattern, predictions, write_run

from qatbench.errors import ArtifactError, PrerequisiteError, QatbenchError, UsageError
from qatbench.report.model import WarningCode
from qatbench.stages.compare import compare


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return lost_two_gained_three(tmp_path)


def test_different_questions_need_intersection(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", predictions(pattern(10, 6)))
    arm = write_run(tmp_path / "arm", predictions(pattern(7, 3)))
    with pytest.raises(ArtifactError, match="different questions") as caught:
        compare([arm], base)
    assert caught.value.exit_code == 4
    assert "--intersection" in caught.value.hint
    task = compare([arm], base, intersection=True, draws=100).tasks[0]
    assert task.definition.n == task.arm("base").n == 7
    assert task.arm("base").right == (6,)
    assert task.definition.dropped == {"base": 3, "arm": 0}
    assert WarningCode.INTERSECTION in {warning.code for warning in task.warnings}


def test_another_gold_answer_is_another_question(tmp_path: Path) -> None:
    rows = predictions(pattern(10, 6))
    base = write_run(tmp_path / "base", rows)
    other = [rows[0].model_copy(update={"gold": "B"}), *rows[1:]]
    arm = write_run(tmp_path / "arm", other)
    with pytest.raises(ArtifactError, match="another gold answer"):
        compare([arm], base)
    assert compare([arm], base, intersection=True, draws=100).tasks[0].definition.n == 9


LINE = predictions([1])[0].model_dump_json() + "\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("predictions.jsonl", LINE + '{"id": "1", "ta', r"predictions\.jsonl, line 2 is damaged"),
        ("predictions.jsonl", LINE + "7\n", "line 2 is damaged"),
        ("predictions.jsonl", LINE + LINE, "line 2: id 0 .* already on line 1"),
        ("predictions.jsonl", LINE, r"has 1 rows of .*, metrics\.json counts 10"),
        ("predictions.jsonl", "", r"has 0 rows of .*, metrics\.json counts 10"),
        ("predictions.jsonl", LINE.replace('"gold":"A"', '"gold":null'), "no gold answer"),
        ("metrics.json", "{}", r"metrics\.json is damaged"),
        ("provenance.json", "[1]", r"provenance\.json is damaged"),
        ("provenance.json", '{"inputs": {"model": {"bits": "four"}}}', "bits"),
    ],
)
def test_damage_is_exit_4_and_names_the_place(
    pair: tuple[Path, Path], name: str, text: str, message: str
) -> None:
    base, arm = pair
    damage(arm, name, text)
    with pytest.raises(ArtifactError, match=message) as caught:
        compare([arm], base)
    assert caught.value.exit_code == 4
    assert str(arm) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("missing", ["metrics.json", "predictions.jsonl", None])
def test_missing_is_exit_3_and_says_what_to_run(
    pair: tuple[Path, Path], missing: str | None
) -> None:
    base, arm = pair
    if missing is None:
        arm = arm.with_name("awq")
    else:
        (arm / missing).unlink()
    with pytest.raises(PrerequisiteError) as caught:
        compare([arm], base)
    assert caught.value.exit_code == 3
    assert "qatbench eval" in caught.value.hint


def test_both_kinds_of_folder_at_once_are_refused(pair: tuple[Path, Path]) -> None:
    base, arm = pair
    write_run(arm / "seed-0", predictions(pattern(10, 5)))
    with pytest.raises(ArtifactError, match="both"):
        compare([arm], base)


@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_margin_is_a_fraction(pair: tuple[Path, Path], margin: float) -> None:
    with pytest.raises(UsageError):
        compare([pair[1]], pair[0], margin=margin)


def test_every_expected_failure_is_ours(pair: tuple[Path, Path]) -> None:
    damage(pair[1], "predictions.jsonl", "\xff\n")
    (pair[1] / "predictions.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(QatbenchError):
        compare([pair[1]], pair[0])
