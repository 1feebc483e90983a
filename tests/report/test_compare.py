from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qatbench import stats
from qatbench.errors import ArtifactError, PrerequisiteError, QatbenchError, UsageError
from qatbench.records import Accuracy, Metrics, Prediction, TaskMetrics
from qatbench.report.model import Comparison, WarningCode
from qatbench.report.tables import arm_rows, pair_rows
from qatbench.stages.compare import compare, write
from qatbench.stages.paired import sign_flip_test, wilson_of_mean

TASK = "scienceqa:test:text"


def predictions(right: Sequence[int], task: str = TASK, **changes: Any) -> list[Prediction]:
    """One row an entry: 1 chose the gold letter, 0 another."""
    return [
        Prediction(
            id=f"{k}",
            task=task,
            choices=("A", "B"),
            gold="A",
            chosen="A" if good else "B",
            status="ok",
            **changes,
        )
        for k, good in enumerate(right)
    ]


def task_metrics(rows: Sequence[Prediction], protocol: str) -> TaskMetrics:
    right = sum(row.right for row in rows)
    overall = Accuracy(
        n=len(rows), right=right, accuracy=right / len(rows), low=0, high=1, chance=0.5
    )
    return TaskMetrics(
        task=rows[0].task,
        protocol=protocol,
        mode="options",
        overall=overall,
        unparsed=sum(row.status == "unparsed" for row in rows),
        errors=sum(row.status == "error" for row in rows),
        ties=sum(row.tie for row in rows),
    )


def write_run(
    folder: Path, rows: Sequence[Prediction], *, protocol: str = "llava-sqa", **model: Any
) -> Path:
    folder.mkdir(parents=True)
    lines = "".join(row.model_dump_json() + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text(lines)
    tasks = [
        task_metrics(list(mine), protocol) for _, mine in itertools.groupby(rows, lambda r: r.task)
    ]
    metrics = Metrics(tasks=tuple(tasks), seconds=1, questions_per_second=1)
    (folder / "metrics.json").write_text(metrics.model_dump_json())
    if model:
        provenance = {
            "fingerprint": "f00d",
            "spec": {"dtype": "float32", "batch": 8},
            "inputs": {"model": model, "data": {TASK: "d1"}},
            "versions": {"torch": "2.0"},
        }
        (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def pattern(n: int, right: int) -> list[int]:
    return [1] * right + [0] * (n - right)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Base right on 0-5, arm right on 2-8, of ten questions: lost 0, 1; gained 6, 7, 8."""
    base = write_run(tmp_path / "r" / "base", predictions([1] * 6 + [0] * 4), method="base")
    arm = write_run(tmp_path / "r" / "gptq", predictions([0] * 2 + [1] * 7 + [0]), method="gptq")
    return base, arm


def test_flips_and_sign_by_hand(pair: tuple[Path, Path]) -> None:
    base, arm = pair
    result = compare([arm], base, draws=500)
    (task,) = result.tasks
    (found,) = task.pairs
    (seeds,) = found.seed_pairs
    assert (found.arm, found.reference, result.baseline) == ("gptq", "base", "base")
    assert found.difference == pytest.approx(0.1)  # arm minus baseline: 7/10 - 6/10
    assert found.low < 0.1 < found.high
    assert (seeds.lost, seeds.gained) == (2, 3)
    assert (found.lost, found.gained) == (2, 3)
    assert found.p == seeds.p == pytest.approx(1.0)  # 2 against 3 of five tosses
    assert [arm.name for arm in task.arms] == ["base", "gptq"]
    assert task.arm("gptq").right == (7,)
    assert (task.arm("gptq").low, task.arm("gptq").high) == stats.wilson(7, 10)
    assert task.arm("gptq").chance == 0.5
    assert task.arm("gptq").spread is None


def test_swapping_the_arms_turns_the_sign(pair: tuple[Path, Path]) -> None:
    base, arm = pair
    there = compare([arm], base, draws=500).tasks[0].pairs[0]
    back = compare([base, arm], arm, draws=500).tasks[0].pairs[0]
    assert back.difference == -there.difference
    assert (back.lost, back.gained) == (there.gained, there.lost)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))


def test_seeds_are_averaged_and_paired_by_number(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", predictions(pattern(8, 4)), method="base")
    for seed, right in ((0, 5), (1, 6), (10, 7)):
        write_run(
            tmp_path / "qat" / f"seed-{seed}",
            predictions(pattern(8, right)),
            method="qat",
            training_seconds=10.0 * right,
            notes=["loss fell"],
        )
    for seed, right in ((1, 6), (2, 6)):
        write_run(tmp_path / "kd" / f"seed-{seed}", predictions(pattern(8, right)), method="kd")
    task = compare([tmp_path / "qat", tmp_path / "kd"], base, draws=200).tasks[0]
    qat = task.arm("qat")
    assert qat.seeds == (0, 1, 10)  # by number, not by name
    assert qat.accuracies == (5 / 8, 6 / 8, 7 / 8)
    assert qat.accuracy == 6 / 8
    assert qat.spread == pytest.approx(1 / 8)
    assert qat.training_seconds == 60
    assert qat.notes == ("loss fell",)
    found = task.pair("qat")
    assert found is not None
    assert [(s.seed, s.reference_seed, s.gained) for s in found.seed_pairs] == [
        (0, 0, 1),  # the baseline's only seed
        (1, 0, 2),
        (10, 0, 3),
    ]
    assert (found.lost, found.gained) == (0, 2)
    assert found.p == pytest.approx(2 * 0.5**3)  # three questions differ, all one way
    only_shared = compare([tmp_path / "kd"], tmp_path / "qat", draws=200).tasks[0]
    assert [(s.seed, s.reference_seed) for s in only_shared.pairs[0].seed_pairs] == [(1, 1)]
    assert WarningCode.UNPAIRED_SEEDS in {warning.code for warning in only_shared.warnings}


def test_sign_flip_test_is_the_enumeration_and_mcnemar() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        d = rng.integers(-3, 4, size=9)
        sums = [abs(np.dot(s, d)) for s in itertools.product((-1, 1), repeat=len(d))]
        by_hand = np.mean([total >= abs(d.sum()) for total in sums])
        assert sign_flip_test(d) == pytest.approx(by_hand, abs=1e-12)
    d = np.array([1] * 60 + [-1] * 30 + [0] * 500)
    assert sign_flip_test(d) == pytest.approx(stats.mcnemar_exact(60, 30), abs=1e-12)
    assert sign_flip_test(np.zeros(5, dtype=np.int64)) == 1.0
    assert sign_flip_test(np.ones(4000, dtype=np.int64)) == 1e-12


def test_wilson_of_mean_is_wilson_where_the_count_is_whole() -> None:
    assert wilson_of_mean((0.2, 0.4), 50) == pytest.approx(stats.wilson(15, 50))
    low, high = wilson_of_mean((0.0, 0.0), 50)
    assert low == pytest.approx(0)
    assert high == pytest.approx(stats.wilson(0, 50)[1])


def test_holm_covers_all_tasks_and_counts_a_pair_once(tmp_path: Path) -> None:
    def arm(name: str, one: int, two: int, **model: Any) -> Path:
        rows = predictions(pattern(40, one)) + predictions(pattern(40, two), task="mmbench:dev")
        return write_run(tmp_path / name, rows, **model)

    base = arm("base", 20, 20, method="base")
    rtn = arm("rtn", 10, 18, method="rtn")
    qat = arm("qat", 19, 20, method="qat")
    result = compare([rtn, qat], base, draws=200)
    first, second = result.tasks
    assert [first.definition.task, second.definition.task] == [TASK, "mmbench:dev"]
    assert first.definition.family_size == 6  # (two pairs and the contest) x two tasks
    assert first.contest is not None
    assert (first.contest.arm, first.contest.reference) == ("qat", "rtn")
    stated = [p for task in result.tasks for p in (*task.pairs, task.contest) if p]
    assert [p.p_holm for p in stated] == pytest.approx(stats.holm([p.p for p in stated]))
    against_ptq = compare([base, qat], rtn, draws=200)
    assert against_ptq.tasks[0].definition.family_size == 4  # the contest is one of the pairs
    assert len(pair_rows(against_ptq)) == 4


def test_groups_are_right_when_all_rows_are(tmp_path: Path) -> None:
    def circular(right: Sequence[int]) -> list[Prediction]:
        return [
            row.model_copy(update={"meta": {"group": int(row.id) // 2, "has_image": False}})
            for row in predictions(right)
        ]

    base = write_run(tmp_path / "base", circular([1, 1, 1, 1, 1, 0]))
    arm = write_run(tmp_path / "arm", circular([1, 0, 0, 0, 1, 1]))
    task = compare([arm], base, draws=100).tasks[0]
    assert (task.arm("base").n, task.arm("base").rows) == (3, 6)
    assert (task.arm("base").right, task.arm("arm").right) == ((2,), (1,))
    assert task.arm("base").chance == 0.25
    assert (task.pairs[0].lost, task.pairs[0].gained) == (2, 1)
    assert task.definition.text_only is True


def test_unparsed_errors_and_ties_are_counted_apart(tmp_path: Path) -> None:
    rows = predictions(pattern(6, 6))
    rows[0] = rows[0].model_copy(update={"chosen": None, "status": "unparsed"})
    rows[1] = rows[1].model_copy(update={"chosen": None, "status": "error", "error": "no image"})
    rows[2] = rows[2].model_copy(update={"tie": True})
    base = write_run(tmp_path / "base", rows)
    task = compare([], base).tasks[0]
    (arm,) = task.arms
    assert (arm.unparsed, arm.errors, arm.ties, arm.right) == ((1,), (1,), (1,), (4,))
    codes = {warning.code for warning in task.warnings}
    assert {WarningCode.UNPARSED, WarningCode.ERRORS, WarningCode.TIES} <= codes
    assert all(warning.advice for warning in task.warnings)
    assert task.pairs == ()


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


def damage(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


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


def test_arms_are_named_by_as_little_path_as_tells_them_apart(tmp_path: Path) -> None:
    rows = predictions(pattern(10, 6))
    folders = [write_run(tmp_path / p, rows) for p in ("r/base", "r/w3/gptq", "r/w4/gptq")]
    result = compare([*folders, folders[1]], folders[0], draws=100)  # one given twice
    assert [arm.name for arm in result.tasks[0].arms] == ["base", "w3/gptq", "w4/gptq"]


def test_foreign_predictions_need_no_provenance_and_no_choices(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", predictions(pattern(10, 6)))
    arm = write_run(tmp_path / "arm", predictions(pattern(10, 5)))
    keys = ("id", "task", "gold", "chosen", "status")
    lines = [json.loads(line) for line in (arm / "predictions.jsonl").read_text().splitlines()]
    bare = [json.dumps({key: line[key] for key in keys}) for line in lines]
    damage(arm, "predictions.jsonl", "\n".join(bare))  # and no final newline
    result = compare([arm], base, draws=100)
    assert result.tasks[0].arm("arm").chance is None
    row = arm_rows(result)[1]
    assert (row["MB"], row["bits/w"], row["cost"]) == ("-", "-", "-")


def test_settings_that_differ_are_warned_of(tmp_path: Path) -> None:
    rows = predictions(pattern(100, 52))
    base = write_run(tmp_path / "base", rows, method="base")
    gptq = write_run(tmp_path / "gptq", rows, method="gptq", bits=4, group_size=64)
    qat = write_run(tmp_path / "qat", rows, protocol="lmms-sqa", method="qat", bits=3)
    damage(
        qat, "metrics.json", (qat / "metrics.json").read_text().replace('"right":52', '"right":51')
    )
    spec = json.loads((qat / "provenance.json").read_text())
    spec["spec"]["dtype"] = "bfloat16"
    spec["inputs"]["data"][TASK] = "d2"
    damage(qat, "provenance.json", json.dumps(spec))
    task = compare([gptq, qat], base, draws=100).tasks[0]
    assert [warning.code for warning in task.warnings] == [
        WarningCode.ONE_SEED,
        WarningCode.AT_CHANCE,
        WarningCode.DIFFERENT_PROTOCOL,
        WarningCode.DIFFERENT_SETTINGS,
        WarningCode.DIFFERENT_DATA,
        WarningCode.DIFFERENT_GRID,
        WarningCode.NO_TRAINED_CONTROL,
        WarningCode.METRICS_DISAGREE,
    ]
    assert task.definition.protocol == ("llava-sqa", "lmms-sqa")
    assert task.definition.dtype == ("float32", "bfloat16")


def test_written_files_read_back(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = compare([pair[1]], pair[0], draws=100)
    out = tmp_path / "out"
    paths = write(result, out)
    assert [path.relative_to(out).as_posix() for path in paths] == [
        "tables/arms.csv",
        "tables/pairs.csv",
        "comparison.json",
        "report.md",
    ]
    assert {p for p in out.rglob("*") if p.is_file()} == set(paths)  # no temporary file is left
    assert Comparison.model_validate_json((out / "comparison.json").read_text()) == result
    for name, rows in (("arms", arm_rows(result)), ("pairs", pair_rows(result))):
        with (out / "tables" / f"{name}.csv").open(newline="") as file:
            assert list(csv.DictReader(file)) == rows
    first = {path: path.read_bytes() for path in paths}
    write(compare([pair[1]], pair[0], draws=100), out)
    assert {path: path.read_bytes() for path in paths} == first  # same runs, same bytes


def test_every_expected_failure_is_ours(pair: tuple[Path, Path]) -> None:
    damage(pair[1], "predictions.jsonl", "\xff\n")
    (pair[1] / "predictions.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(QatbenchError):
        compare([pair[1]], pair[0])


def test_json_holds_no_nan(pair: tuple[Path, Path]) -> None:
    text = compare([pair[1]], pair[0], draws=100).model_dump_json()

    def refuse(name: str) -> float:
        raise AssertionError(name)

    assert math.isfinite(json.loads(text, parse_constant=refuse)["tasks"][0]["pairs"][0]["p"])
