"""What a comparison works out beside scores: adjusted verdicts, clusters, recovery, noise floor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from run_folders import pattern, predictions, write_run

from qatbench import stats
from qatbench.records import Question
from qatbench.report.model import PairResult
from qatbench.stages.adjusted import holm_of, settled
from qatbench.stages.arms import load_arms
from qatbench.stages.compare import compare
from qatbench.stages.paired import LEVEL, Scores, pair_result
from qatbench.stages.sheets import line_up
from qatbench.tasks.answers_meta import meta_of

RESULTS = Path(__file__).resolve().parents[2] / "results"


def scores(name: str, *right: list[int]) -> Scores:
    return Scores(name, tuple(range(len(right))), np.array(right))


def pair(lost: int, gained: int, n: int, margin: float = 0.02) -> PairResult:
    """Arms of n questions, of which the arm lost some and gained others."""
    base = [1] * (n - gained) + [0] * gained
    arm = [0] * lost + [1] * (n - lost)
    return pair_result(
        scores("arm", arm), scores("base", base), margin=margin, draws=2000, seed=0
    )  # fmt: skip


def adjusted(*pairs: PairResult) -> list[PairResult]:
    keys = [(0, frozenset((f"arm{k}", "base"))) for k in range(len(pairs))]
    family = holm_of(zip(keys, pairs, strict=True))
    return [settled(row, family, key, LEVEL) for key, row in zip(keys, pairs, strict=True)]


def test_a_difference_that_the_adjustment_takes_back_is_undecided() -> None:
    small = pair(24, 9, 400)
    assert small.verdict == "worse"
    assert 0.01 < small.p < 0.02
    (alone,) = adjusted(small)
    assert (alone.verdict, alone.p_holm) == ("worse", small.p)
    among = adjusted(small, *[pair(20, 20, 400)] * 5)[0]
    assert among.p_holm == pytest.approx(6 * small.p)
    assert among.verdict == "undecided"


def test_an_equivalence_that_the_adjustment_takes_back_is_undecided() -> None:
    same = pair(6, 6, 500)
    assert same.verdict == "equivalent"
    assert same.p_equivalence is not None
    assert 0.005 < same.p_equivalence < 0.05
    (alone,) = adjusted(same)
    assert alone.verdict == "equivalent"
    among = adjusted(same, *[pair(30, 10, 500)] * 9)[0]
    assert among.verdict == "undecided"
    assert among.p_equivalence_holm == pytest.approx(10 * same.p_equivalence)


def test_a_pair_that_is_stated_twice_counts_once() -> None:
    row = pair(24, 9, 400)
    key = (0, frozenset(("arm", "base")))
    assert holm_of([(key, row), (key, row)])[key][0] == row.p


def test_clusters_widen_the_interval_and_weaken_the_test() -> None:
    lost, together = [0] * 40 + [1] * 360, [f"with {k // 20}" for k in range(400)]
    how = {"margin": 0.05, "draws": 2000, "seed": 0}
    arm, base = scores("arm", lost), scores("base", [1] * 400)
    alone = pair_result(arm, base, **how)  # type: ignore[arg-type]
    clustered = pair_result(arm, base, clusters=together, **how)  # type: ignore[arg-type]
    assert clustered.difference == alone.difference
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)
    assert alone.p < 1e-9
    assert clustered.p == pytest.approx(0.5)  # two clusters that lost: 2 of 4 signs are as uneven


def test_pictures_are_told_apart_by_a_digest(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"a picture")
    one = Question(id="1", task="t", text="?", options={"A": "x"}, image=file, skill="read a map")
    meta = meta_of(one, circular=False)
    other = one.model_copy(update={"image": b"a picture"})
    assert meta["image"] == meta_of(other, circular=False)["image"]
    assert len(meta["image"]) == 12
    assert meta["skill"] == "read a map"
    gone = one.model_copy(update={"image": tmp_path / "gone.png"})
    assert "image" not in meta_of(gone, circular=False)
    assert meta_of(gone, circular=False)["has_image"] is True


def arms(
    folder: Path, ptq: int, qat: int, full: int = 380, n: int = 400
) -> tuple[Path, list[Path]]:
    grid = {"bits": 4, "group_size": 64}
    base = write_run(folder / "base", predictions(pattern(n, full)), method="base")
    gptq = write_run(folder / "gptq", predictions(pattern(n, ptq)), method="gptq", **grid)
    qat_ = write_run(folder / "qat", predictions(pattern(n, qat)), method="qat", **grid)
    return base, [gptq, qat_]


def test_recovery_is_the_share_of_the_loss(tmp_path: Path) -> None:
    base, others = arms(tmp_path, ptq=300, qat=360)
    (row,) = compare(others, base, draws=2000).tasks[0].recovery
    assert (row.arm, row.ptq, row.full, row.grid) == ("qat", "gptq", "base", "4 bits g64")
    assert row.share == pytest.approx(60 / 80)
    assert row.low is not None
    assert row.high is not None
    # of 80 questions that PTQ lost, 60 came back: the ratio of nested counts is a binomial share
    low, high = stats.wilson(60, 80)
    assert row.low == pytest.approx(low, abs=0.02)
    assert row.high == pytest.approx(high, abs=0.02)


@pytest.mark.parametrize(
    ("name", "arms", "share", "bounds"),
    [  # MMBench at 3 bits, 300 questions: the loss is 7 and 8 questions
        ("mini", ("grace-w3", "gptq-w3", "base"), 1.10, (0.92, 2.05)),
        ("mini-written", ("qat", "gptq", "base"), 0.62, (-3.6, 1.05)),
    ],
)
def test_recovery_of_a_small_loss_has_a_bounded_interval(
    name: str, arms: tuple[str, ...], share: float, bounds: tuple[float, float]
) -> None:
    folder = RESULTS / name
    if not folder.is_dir():
        pytest.skip(f"results/{name} is not in this copy")
    loaded = load_arms([folder / arm for arm in arms])
    (sheet,) = (s for s in line_up(loaded, intersection=False) if s.task == "mmbench")
    qat, ptq, full = (sheet.scores[arm].right.mean(axis=0) for arm in arms)
    found = stats.recovery(qat, ptq, full)
    assert found.share == pytest.approx(share, abs=0.01)
    # other seeds of the bootstrap move the ends by what g, near 0.7 and 0.8, makes of its noise
    others = [stats.recovery(qat, ptq, full, seed=seed) for seed in range(1, 4)]
    for one in (found, *others):
        assert (one.low, one.high) == pytest.approx(bounds, rel=0.15)


def test_recovery_is_withheld_where_nothing_is_shown_to_be_lost(tmp_path: Path) -> None:
    base, others = arms(tmp_path, ptq=379, qat=380)
    (row,) = compare(others, base, draws=2000).tasks[0].recovery
    assert (row.share, row.low, row.high) == (None, None, None)
    assert row.withheld is not None
    assert row.withheld.startswith("PTQ is not shown to lose: +0.2 [")


def test_the_noise_floor_is_that_of_one_model_asked_twice_and_of_seeds(tmp_path: Path) -> None:
    first, again = [1] * 6 + [0] * 4, [0] * 1 + [1] * 6 + [0] * 3  # two questions flip
    one = write_run(tmp_path / "fp32", predictions(first), method="base", fingerprint="f1")
    two = write_run(tmp_path / "bf16", predictions(again), method="base", fingerprint="f1")
    for seed, right in enumerate((first, again, first)):
        write_run(tmp_path / "sft" / f"seed-{seed}", predictions(right), method="sft",
                  fingerprint=f"s{seed}")  # fmt: skip
    task = compare([two, tmp_path / "sft"], one, draws=100).tasks[0]
    repeat, seeds = task.noise
    assert (repeat.kind, repeat.arm, repeat.other) == ("repeat", "fp32", "bf16")
    assert (repeat.flips, repeat.share, repeat.difference) == (2, 0.2, 0)
    assert repeat.same_answer == 0.8
    assert (seeds.kind, seeds.arm) == ("seeds", "sft")
    assert seeds.flips == pytest.approx(4 / 3)  # pairs 0-1, 0-2, 1-2: 2, 0, 2


def test_a_made_on_gpu_checkpoint_has_gpu_hours(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", predictions(pattern(20, 15)), method="base")
    for seed, peak in enumerate((5e9, 7e9)):
        folder = write_run(
            tmp_path / "qat" / f"seed-{seed}", predictions(pattern(20, 12)), method="qat", bits=4,
            group_size=64, making_seconds=1800.0, device="cuda", peak_memory_bytes=int(peak),
        )  # fmt: skip
        machine = {"machine": {"gpu": "NVIDIA H100"}}
        (folder / "checkpoint.json").write_text(json.dumps(machine))
    arm = compare([tmp_path / "qat"], base, draws=100, out=tmp_path / "out").tasks[0].arm("qat")
    assert (arm.gpu, arm.gpu_hours, arm.peak_memory_bytes) == ("NVIDIA H100", 0.5, 7e9)
    assert arm.predictions == (
        "../qat/seed-0/predictions.jsonl",
        "../qat/seed-1/predictions.jsonl",
    )


def test_pairs_that_claims_are_about_are_stated_and_adjusted_with_the_others(
    tmp_path: Path,
) -> None:
    base, others = arms(tmp_path, ptq=300, qat=360)
    sft = write_run(tmp_path / "sft", predictions(pattern(400, 385)), method="sft")
    grace = write_run(
        tmp_path / "grace", predictions(pattern(400, 350)), method="grace", bits=4, group_size=64
    )
    task = compare([*others, sft, grace], base, draws=500).tasks[0]
    assert [(pair.arm, pair.reference) for pair in task.contests] == [("qat", "gptq")]
    assert [(pair.arm, pair.reference) for pair in task.claimed] == [
        ("grace", "gptq"),  # not the best QAT arm, which stands in the contest
        ("grace", "sft"),
    ]
    assert task.definition.family_size == 4 + 1 + 2
    assert all(pair.p_holm >= pair.p for pair in task.claimed)
    alone = compare([*others, sft, grace], sft, draws=500).tasks[0]
    assert [(pair.arm, pair.reference) for pair in alone.claimed] == [("grace", "gptq")]


def test_the_definition_names_kernel_recipe_and_model(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", predictions(pattern(20, 15)), name="student")
    rtn = write_run(tmp_path / "rtn", predictions(pattern(20, 12)), method="rtn", name="rtn")
    provenance = json.loads((rtn / "provenance.json").read_text())
    provenance["figures"] = {"kernel": "TorchLinear"}
    (rtn / "provenance.json").write_text(json.dumps(provenance))
    (rtn / "checkpoint.json").write_text('{"figures": {}}')
    found = compare([rtn], base, draws=100, recipe="mini").tasks[0].definition
    assert (found.kernel, found.recipe, found.model) == (("TorchLinear",), "mini", ("student",))
