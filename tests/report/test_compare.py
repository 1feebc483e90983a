from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import TASK, damage, lost_two_gained_three, pattern, predictions, write_run

from qatbench import stats
from qatbench.errors import ArtifactError
from qatbench.records import Prediction
from qatbench.report.markdown import render
from qatbench.report.model import Comparison, WarningCode
from qatbench.report.tables import arm_rows, pair_rows
from qatbench.stages.compare import compare
from qatbench.stages.metrics import summarize
from qatbench.stages.paired import sign_flip_test, wilson_of_mean
from qatbench.stages.report_files import write


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return lost_two_gained_three(tmp_path)


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
    (contest,) = first.contests
    assert (contest.arm, contest.reference) == ("qat", "rtn")
    stated = [p for task in result.tasks for p in (*task.pairs, *task.contests)]
    assert [p.p_holm for p in stated] == pytest.approx(stats.holm([p.p for p in stated]))
    for reference in (rtn, qat):  # the contest is one of the pairs, one way round or the other
        again = compare([base, rtn, qat], reference, draws=200)
        assert again.tasks[0].definition.family_size == 4
        assert len(pair_rows(again)) == 4


def test_every_grid_has_its_own_contest(tmp_path: Path) -> None:
    grids = {"w4": {"bits": 4, "group_size": 64}, "w3": {"bits": 3, "group_size": 64}}
    scores = {"gptq-w4": 15, "awq-w4": 17, "qat-w4": 16, "gptq-w3": 12, "grace-w3": 14, "rtn-w2": 5}
    folders = [
        write_run(
            tmp_path / name, predictions(pattern(20, right)),
            method=name.split("-")[0], **grids.get(name[-2:], {"bits": 2}),
        )
        for name, right in scores.items()
    ]  # fmt: skip
    (task,) = compare(folders, folders[0], draws=100).tasks
    assert [(p.arm, p.reference) for p in task.contests] == [
        ("qat-w4", "awq-w4"), ("grace-w3", "gptq-w3"),
    ]  # fmt: skip


def test_cost_counts_what_a_checkpoint_was_made_from(tmp_path: Path) -> None:
    def arm(name: str, seconds: float, inputs: dict[str, Any]) -> Path:
        model = {"method": name, "making_seconds": seconds, "fingerprint": f"of-{name}"}
        folder = write_run(tmp_path / name, predictions(pattern(10, 6)), **model)
        damage(folder, "checkpoint.json", json.dumps({"inputs": inputs}))
        return folder

    student = {"student": {"fingerprint": "hub"}}
    runs = [
        arm("sft", 100, student | {"teacher": None}),
        arm("grace", 30, student | {"teacher": "of-sft"}),
        arm("gptq", 7, {"model": {"fingerprint": "of-grace"}}),
        arm("rtn", 1, {"model": {"fingerprint": "hub"}}),
        arm("awq", 3, {"model": {"fingerprint": "of-awq"}}),  # a damaged record: not its own source
    ]
    (task,) = compare(runs, runs[0], draws=100).tasks
    costs = {name: task.arm(name).cost_seconds for name in ("sft", "grace", "gptq", "rtn", "awq")}
    assert costs == {"sft": 100, "grace": 130, "gptq": 137, "rtn": 1, "awq": 3}


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


def test_a_group_without_its_first_pass_is_no_question(tmp_path: Path) -> None:
    def cut(right: Sequence[int]) -> list[Prediction]:
        metas = [{"group": i // 2, "circular_pass": i % 2} for i in range(len(right))]
        rows = [
            row.model_copy(update={"meta": meta})
            for row, meta in zip(predictions(right), metas, strict=True)
        ]
        return rows[:-2] + rows[-1:]

    def run(name: str, rows: list[Prediction]) -> Path:
        told = summarize(rows, protocols={TASK: "qatbench"}, mode="options", seconds=1)
        folder = write_run(tmp_path / name, rows)
        damage(folder, "metrics.json", told.model_dump_json())
        return folder

    base = run("base", cut([1, 1, 1, 1, 1, 1]))
    arm = run("arm", cut([1, 1, 1, 0, 1, 1]))
    task = compare([arm], base, draws=100).tasks[0]
    assert (task.arm("base").n, task.arm("base").right, task.arm("arm").right) == (2, (2,), (1,))


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
    names = [path.relative_to(out).as_posix() for path in paths]
    assert names[-3:] == ["comparison.json", "report.html", "report.md"]  # what they tell of first
    assert {"tables/arms.csv", "tables/pairs.csv", "tables/changes.csv", "tables/arms.tex"} < {
        *names
    }
    assert "tables/ablations.csv" not in names  # no such arms
    assert {p for p in out.rglob("*") if p.is_file()} == set(paths)  # no temporary file is left
    assert Comparison.model_validate_json((out / "comparison.json").read_text()) == result
    for name, rows in (("arms", arm_rows(result)), ("pairs", pair_rows(result))):
        with (out / "tables" / f"{name}.csv").open(newline="") as file:
            assert list(csv.DictReader(file)) == rows
    first = {path: path.read_bytes() for path in paths}
    write(compare([pair[1]], pair[0], draws=100), out)
    assert {path: path.read_bytes() for path in paths} == first  # same runs, same bytes


def test_what_was_found_of_leakage_is_told(pair: tuple[Path, Path]) -> None:
    base, arm = pair
    told = ["2 of 10 test questions are in scienceqa:train", "none by image"]
    damage(arm, "checkpoint.json", json.dumps({"figures": {"leakage": told}}))
    result = compare([arm], base, draws=100)
    assert result.tasks[0].arm("gptq").leakage == tuple(told)
    text = render(result)
    assert f"- `gptq`: {told[0]}\n- `gptq`: {told[1]}\n" in text
    assert "- leakage: searched for, see Notes: `gptq`\n" in text.split("### Definition")[1]
    damage(arm, "checkpoint.json", json.dumps({"figures": {"leakage": 2}}))
    with pytest.raises(ArtifactError, match=r"checkpoint\.json is damaged: leakage"):
        compare([arm], base, draws=100)


def test_json_holds_no_nan(pair: tuple[Path, Path]) -> None:
    text = compare([pair[1]], pair[0], draws=100).model_dump_json()

    def refuse(name: str) -> float:
        raise AssertionError(name)

    assert math.isfinite(json.loads(text, parse_constant=refuse)["tasks"][0]["pairs"][0]["p"])


def test_gzipped_predictions_give_the_same_comparison(tmp_path: Path) -> None:
    base, arm = lost_two_gained_three(tmp_path)
    before = compare([arm], base)
    for run in (base, arm):
        plain = run / "predictions.jsonl"
        (run / "predictions.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    assert compare([arm], base) == before
