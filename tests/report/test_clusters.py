"""What is resampled together: questions with one picture, and the passes of one question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import TASK, pattern, predictions, write_run

from qatbench import stats
from qatbench.errors import ArtifactError, UsageError
from qatbench.report.model import TaskComparison
from qatbench.stages.compare import compare
from qatbench.stages.paired import Scores, pair_result

N = 100
LOST = [0] * 20 + [1] * 80  # the arm's; the baseline is right everywhere

Meta = list[dict[str, Any]]


def run(folder: Path, right: Sequence[int], metas: Meta) -> Path:
    rows = zip(predictions(right), metas, strict=True)
    return write_run(folder, [row.model_copy(update={"meta": meta}) for row, meta in rows])


def two(folder: Path, metas: Meta, others: Meta | None = None) -> tuple[Path, Path]:
    """Baseline and arm; the arm's meta may differ."""
    base = run(folder / "base", pattern(N, N), metas)
    return base, run(folder / "arm", LOST, metas if others is None else others)


def compared(folder: Path, metas: Meta, others: Meta | None = None, **how: Any) -> TaskComparison:
    base, arm = two(folder, metas, others)
    return compare([arm], base, draws=1000, **how).tasks[0]


def tens(name: str) -> Meta:
    """Ten questions each share a value."""
    return [{name: f"{k // 10}"} for k in range(N)]


def drawn(clusters: Sequence[object] | None) -> tuple[float, float]:
    """The interval of the pair, from the statistic itself; rows are in the order of their ids."""
    order = sorted(range(N), key=str)
    arm = np.array(LOST)[order]
    ids = None if clusters is None else [clusters[k] for k in order]
    found = stats.paired_bootstrap(arm, np.ones(N), ids, draws=1000)
    return found.low, found.high


def test_passes_of_one_question_go_together_by_default(tmp_path: Path) -> None:
    passes = [{"pass_of": f"q{k // 4}", "circular_pass": k % 4} for k in range(N)]
    task = compared(tmp_path, passes)
    (pair,) = task.pairs
    assert task.definition.n == N  # still counted apart
    assert (pair.low, pair.high) == drawn([k // 4 for k in range(N)])
    assert (pair.low, pair.high) != drawn(None)
    assert pair.p == pytest.approx(2 / 2**5)  # five questions, whose four passes were all lost
    assert pair.seed_pairs[0].p == pair.p
    assert (pair.lost, pair.gained) == (20, 0)
    assert task.definition.cluster == "question, its passes together"
    group = compared(tmp_path / "grouped", [m | {"category": "all"} for m in passes])
    (change,) = group.changes[0].groups
    assert (change.low, change.high) == (pair.low, pair.high)  # of the only group: the same draws


def test_without_passes_each_question_is_drawn_alone(tmp_path: Path) -> None:
    task = compared(tmp_path, tens("image"))
    assert (task.pairs[0].low, task.pairs[0].high) == drawn(None)
    assert task.pairs[0].p == pytest.approx(2 / 2**20)
    assert task.definition.cluster == "question"


def test_questions_that_share_an_image_are_resampled_together(tmp_path: Path) -> None:
    task = compared(tmp_path, tens("image"), cluster="image")
    assert (task.pairs[0].low, task.pairs[0].high) == drawn([k // 10 for k in range(N)])
    assert task.pairs[0].p == task.pairs[0].seed_pairs[0].p == pytest.approx(0.5)  # two pictures
    assert task.definition.cluster == "image"


def test_a_question_without_a_picture_stands_alone_and_is_counted(tmp_path: Path) -> None:
    metas = tens("image")[:80] + [{"has_image": False}] * 20
    task = compared(tmp_path, metas, cluster="image")
    ids = [k // 10 if k < 80 else f"alone {k}" for k in range(N)]
    assert (task.pairs[0].low, task.pairs[0].high) == drawn(ids)
    assert task.definition.cluster == "image (20 of 100 questions state none: each alone)"


def test_where_no_question_has_a_picture_each_is_its_own_cluster(tmp_path: Path) -> None:
    task = compared(tmp_path, [{"has_image": False}] * N, cluster="image")
    assert (task.pairs[0].low, task.pairs[0].high) == drawn(None)
    assert task.definition.cluster == "image (100 of 100 questions state none: each alone)"
    passes = [{"has_image": False, "pass_of": f"q{k // 4}"} for k in range(N)]
    task = compared(tmp_path / "passes", passes, cluster="image")
    assert (task.pairs[0].low, task.pairs[0].high) == drawn([k // 4 for k in range(N)])
    assert task.definition.cluster.endswith("state none: each with its passes)")


@pytest.mark.parametrize(
    ("cluster", "meta"),
    [
        ("skill", {"has_image": False}),  # a field that is not the picture
        ("image", {"has_image": True}),  # pictures that an older evaluation did not record
        ("image", {"subject": "maps"}),  # not known whether there is one
    ],
)
def test_a_field_that_no_run_states_is_refused(
    tmp_path: Path, cluster: str, meta: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=f"no prediction states '{cluster}'") as caught:
        compared(tmp_path, [meta] * N, cluster=cluster)
    assert caught.value.hint is not None
    assert f"recorded: {next(iter(meta))}" in caught.value.hint


def test_values_are_taken_from_whichever_run_states_them(tmp_path: Path) -> None:
    together = drawn([k // 10 for k in range(N)])
    blank: Meta = [{}] * N
    late = compared(tmp_path / "late", blank, tens("image"), cluster="image")
    assert (late.pairs[0].low, late.pairs[0].high) == together
    half = tens("image")[:50] + blank[50:]
    rest = blank[:50] + tens("image")[50:]
    parts = compared(tmp_path / "parts", half, rest, cluster="image")
    assert (parts.pairs[0].low, parts.pairs[0].high) == together
    assert parts.definition.cluster == "image"


@pytest.mark.parametrize(("field", "how"), [("image", {"cluster": "image"}), ("pass_of", {})])
def test_runs_that_disagree_are_refused(tmp_path: Path, field: str, how: dict[str, str]) -> None:
    other = tens(field)
    other[7] = {field: "else"}
    with pytest.raises(ArtifactError) as caught:
        compared(tmp_path, tens(field), other, **how)
    told = str(caught.value)
    assert told.startswith(f"{TASK.split(':')[0]}")
    assert f"question 7 has {field} '0' in {tmp_path / 'base'} and 'else'" in told
    assert str(tmp_path / "arm") in told
    assert caught.value.hint is not None


def test_a_control_with_shuffled_pictures_does_not_disagree(tmp_path: Path) -> None:
    base = run(tmp_path / "base", pattern(N, N), tens("image"))
    shuffled = [{"image": f"{(k // 10 + 1) % 10}"} for k in range(N)]
    arm = run(tmp_path / "arm", LOST, shuffled)
    (arm / "provenance.json").write_text(json.dumps({"spec": {"images": "shuffled"}}))
    for runs, baseline in (([arm], base), ([base], arm)):
        pair = compare(runs, baseline, draws=1000, cluster="image").tasks[0].pairs[0]
        ends = (pair.low, pair.high) if baseline == base else (-pair.high, -pair.low)
        assert ends == pytest.approx(drawn([k // 10 for k in range(N)]))
    alone = compare([], arm, draws=1000, cluster="image").tasks[0]  # no other run: its own do
    assert alone.definition.cluster == "image"


def test_clusters_bear_on_the_p_of_single_seeds() -> None:
    clusters = [f"{k // 5}" for k in range(40)]
    base = Scores("base", (0,), np.ones((1, 40), dtype=np.int64))
    right = np.ones((2, 40), dtype=np.int64)
    right[0, :15] = 0  # three clusters whole
    right[1, [0, 5, 10, 15]] = 0  # one question each of four
    arm = Scores("arm", (0, 1), right)
    how: dict[str, Any] = {"margin": 0.05, "draws": 200, "seed": 0}
    pair = pair_result(arm, base, clusters=clusters, **how)
    assert [seed.p for seed in pair.seed_pairs] == pytest.approx([2 / 2**3, 2 / 2**4])
    alone = pair_result(arm, base, **how)
    assert [seed.p for seed in alone.seed_pairs] == pytest.approx([2 / 2**15, 2 / 2**4])


def test_a_loss_that_one_picture_carries_is_too_close_to_0_to_divide_by(tmp_path: Path) -> None:
    metas = [{"image": "one" if k < 20 else f"{k}"} for k in range(400)]
    lost = [0] * 30 + [1] * 370  # 20 of them on one picture
    grid = {"bits": 4, "group_size": 64}
    folders = []
    for name, right in (("base", [1] * 400), ("gptq", lost), ("qat", [1] * 10 + lost[10:])):
        rows = zip(predictions(right), metas, strict=True)
        rows_with = [row.model_copy(update={"meta": meta}) for row, meta in rows]
        facts: dict[str, Any] = {"method": name, **({} if name == "base" else grid)}
        folders.append(write_run(tmp_path / name, rows_with, **facts))
    (row,) = compare(folders, folders[0], draws=2000, cluster="image").tasks[0].recovery
    assert (row.share, row.low, row.high) == (None, None, None)
    assert row.withheld is not None
    assert row.withheld.startswith("PTQ's loss is too close to 0 to divide by: +7.5 [+")
    (alone,) = compare(folders, folders[0], draws=2000).tasks[0].recovery
    assert alone.share == pytest.approx(10 / 30)
