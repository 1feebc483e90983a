"""What each part of GRACE is worth: which arms are compared, and the verdict on each part."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import predictions, write_run

from qatbench import stats
from qatbench.report.markdown import render
from qatbench.report.model import Ablation, Comparison, PairResult
from qatbench.report.tables import ablation_rows
from qatbench.stages.ablations import n_to_decide
from qatbench.stages.compare import compare
from qatbench.stages.report_files import write

N = 400
HEADING = "### What each part of GRACE is worth"
FULL: dict[str, Any] = {
    "method": "grace",
    "steps": 60,
    "bits": 3,
    "group_size": 128,
    "lr": 5e-5,
    "distillation": {"kl": "decoupled", "gate": True, "rcka": True, "nontarget_weight": 0.5},
    "controller": {"target": 4.0, "rate": 0.01, "initial": 0.5, "low": 0.05, "high": 1.0},
    "omega": 1.0,
    "student": "s",
    "teacher": "t",
    "data": "d",
}
QAT = {k: v for k, v in FULL.items() if k not in ("distillation", "controller", "omega")} | {
    "method": "qat",
    "teacher": None,
}


def spec(**changes: Any) -> dict[str, Any]:
    """FULL with changes; those of a section are merged into it."""
    merged = dict(FULL)
    for key, value in changes.items():
        merged[key] = FULL[key] | value if isinstance(value, dict) else value
    return merged


def answers(lost: int = 0, gained: int = 0, n: int = N) -> list[int]:
    """Two thirds right, but for the first `lost` of them; `gained` of the others right too."""
    right = 2 * n // 3
    return [0] * lost + [1] * (right - lost) + [1] * gained + [0] * (n - right - gained)


def arm(
    root: Path,
    name: str,
    made: dict[str, Any],
    right: list[int],
    seeds: tuple[int, ...] = (0, 1, 2),
    seconds: float = 100,
    **model: Any,
) -> Path:
    """An arm whose seeds all give these answers; `made` may be a function's result of the seed."""
    card = {"method": made["method"], "bits": made["bits"], "group_size": 128, "device": "cpu"}
    for seed in seeds:
        folder = root / name / f"seed-{seed}"
        write_run(folder, predictions(right), **(card | {"making_seconds": seconds} | model))
        teacher = made.get("teacher")
        told = made | {"seed": seed, "teacher": f"t{seed}" if teacher == "by-seed" else teacher}
        (folder / "checkpoint.json").write_text(json.dumps({"spec": told, "inputs": {}}))
    return root / name


def ablations(*folders: Path, **options: Any) -> tuple[Ablation, ...]:
    base = folders[0].parent / "base"
    if not base.exists():
        write_run(base, predictions(answers(lost=30)), method="base")
    return compare(list(folders), base, draws=400, **options).tasks[0].ablations


# --- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("without", "margin", "verdict", "words"),
    [
        (answers(lost=50, gained=8), 0.01, "helps", "| helps |"),
        (answers(lost=8, gained=50), 0.01, "hurts", "| hurts |"),
        (answers(lost=4, gained=4), 0.03, "does not matter", "| does not matter |"),
        (answers(lost=14, gained=10), 0.01, "undecided", "cannot be told apart with n = 400"),
    ],
)
def test_each_verdict(
    tmp_path: Path, without: list[int], margin: float, verdict: str, words: str
) -> None:
    full = arm(tmp_path, "grace", FULL, answers())
    gateless = arm(tmp_path, "grace-nogate", spec(distillation={"gate": False}), without)
    (row,) = ablations(full, gateless, margin=margin)
    assert (row.part, row.pair.arm, row.pair.reference) == ("gate", "grace", "grace-nogate")
    assert row.verdict == verdict
    difference = (sum(answers()) - sum(without)) / N  # with the part minus without it
    assert row.pair.difference == pytest.approx(difference)
    text = render(compare([full, gateless], tmp_path / "base", margin=margin, draws=400))
    section = text.split(HEADING)[1].split("###")[0]
    assert words in section
    assert "confidence gate" in section
    if verdict == "undecided":
        assert row.n_to_decide > N
        assert f"would need about {row.n_to_decide} questions" in section


def test_what_is_small_but_sure_does_not_matter(tmp_path: Path) -> None:
    full = arm(tmp_path, "grace", FULL, answers())
    other = arm(tmp_path, "nogate", spec(distillation={"gate": False}), answers(lost=8))
    (row,) = ablations(full, other, margin=0.05)
    assert row.pair.low > 0
    assert row.pair.p_holm < 0.05
    assert row.verdict == "does not matter"


def test_holm_over_the_ablations_of_all_tasks_can_take_a_verdict_back(tmp_path: Path) -> None:
    full = arm(tmp_path, "grace", FULL, answers())
    sure = answers(lost=15, gained=4)  # p 0.019 alone
    folders = [arm(tmp_path, "nogate", spec(distillation={"gate": False}), sure)]
    (alone,) = ablations(full, *folders)
    assert alone.pair.p == alone.pair.p_holm < 0.05
    assert alone.verdict == "helps"
    folders.append(arm(tmp_path, "norcka", spec(distillation={"rcka": False}), sure))
    folders.append(arm(tmp_path, "fixed", spec(controller={"rate": 0.0}), sure))
    rows = ablations(full, *folders)
    assert [row.part for row in rows] == ["gate", "rcka", "beta"]
    assert [row.pair.p_holm for row in rows] == stats.holm([row.pair.p for row in rows])
    assert {row.verdict for row in rows} == {"undecided"}
    assert rows[0].n_to_decide > alone.n_to_decide  # the correction costs questions
    whole = compare([full, *folders], tmp_path / "base", draws=400)
    assert whole.tasks[0].definition.ablation_family == 3
    assert whole.tasks[0].definition.family_size == 4  # each against the baseline, as before


def test_a_pair_has_one_adjusted_p_in_a_report(tmp_path: Path) -> None:
    full = arm(tmp_path, "grace", FULL, answers())
    other = arm(tmp_path, "nogate", spec(distillation={"gate": False}), answers(lost=15, gained=4))
    third = arm(tmp_path, "norcka", spec(distillation={"rcka": False}), answers(lost=50))
    task = compare([full, other, third], full, draws=400).tasks[0]
    gate, _ = task.ablations
    stated = task.pair("nogate")
    assert stated is not None
    assert gate.pair.p_holm == stated.p_holm
    assert gate.pair.difference == -stated.difference  # the pair is arm minus baseline, grace here
    assert gate.shared_p
    assert task.definition.ablation_family == 0


def test_questions_to_decide_give_the_power_they_promise() -> None:
    rng, variance, margin, alpha = np.random.default_rng(0), 0.1, 0.01, 0.05
    z = {0.975: 1.959964, 0.95: 1.644854, 0.9: 1.281552}

    def pair(difference: float) -> PairResult:
        needed = int(variance * ((z[0.95] + z[0.9]) / margin) ** 2)
        numbers = {"low": 0, "high": 0, "p": 1, "p_holm": 1, "n_needed": needed}
        names = {"arm": "a", "reference": "b", "verdict": "undecided", "seed_pairs": ()}
        told = {"difference": difference, "lost": None, "gained": None}
        return PairResult.model_validate(numbers | names | told)

    def seen(difference: float, n: int) -> tuple[Any, float]:
        error = (variance / n) ** 0.5
        return rng.normal(difference, error, 40_000), error

    for difference in (0.03, -0.03):
        n = n_to_decide(pair(difference), variance, margin=margin, alpha=alpha, family=1)
        found, error = seen(difference, n)
        assert np.mean(abs(found) > z[0.975] * error) == pytest.approx(0.8, abs=0.01)
    for difference in (0.0, 0.002):
        n = n_to_decide(pair(difference), variance, margin=margin, alpha=alpha, family=1)
        found, error = seen(difference, n)
        equivalent = abs(found) < margin - z[0.95] * error
        assert np.mean(equivalent) == pytest.approx(0.8, abs=0.01)


# --- which arms are compared --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "part", "without"),
    [
        ({"distillation": {"gate": False}}, "gate", None),
        ({"distillation": {"kl": "plain"}}, "kl", None),
        ({"distillation": {"kl": "plain", "gate": False}}, "kl", None),
        ({"distillation": {"kl": "none"}}, "kd", None),
        ({"distillation": {"rcka": False}}, "rcka", None),
        ({"omega": 0.0}, "rcka", None),
        ({"controller": {"rate": 0.0}}, "beta", "beta fixed at 0.5"),
        ({"controller": {"rate": 0.0, "initial": 0.7, "target": 1.0}}, "beta", "beta fixed at 0.7"),
        ({"teacher": "s"}, "teacher", "the student before training teaches"),
        ({"teacher": "u"}, "teacher", "another teacher"),
        ({"distillation": {"tokens": "all"}}, "tokens", "all tokens"),
    ],
)
def test_the_part_is_read_from_the_checkpoints(
    tmp_path: Path, changes: dict[str, Any], part: str, without: str | None
) -> None:
    full = arm(tmp_path, "grace", FULL, answers())
    other = arm(tmp_path, "other", spec(**changes), answers(lost=5), seconds=60)
    (row,) = ablations(full, other)
    assert (row.part, row.without, row.pair.arm) == (part, without, "grace")
    assert (row.full, row.grid, row.cost) == ("grace", "3 bits g128", 0.6)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"distillation": {"kl": "plain"}}, "kl"),
        ({"distillation": {"tokens": "all"}}, "tokens"),
        ({"teacher": "s"}, "teacher"),
    ],
)
def test_beta_may_have_another_budget_where_the_loss_has_another_scale(
    tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    full = arm(tmp_path, "grace", FULL, answers())
    budget = spec(controller={"target": 1.0}, **changes)
    fixed = spec(controller={"rate": 0.0}, **changes)  # beta is no longer adaptive: two parts
    other = arm(tmp_path, "other", budget, answers(lost=5))
    both = arm(tmp_path, "both", fixed, answers(lost=5))
    (row,) = ablations(full, other, both)
    assert (row.part, row.pair.reference) == (part, "other")
    assert row.differing == ("controller.target 4.0 / 1.0",)
    text = render(compare([full, other, both], tmp_path / "base", draws=400))
    assert "the arms also differ in controller.target 4.0 / 1.0." in text
    assert "- `both` differs from no full arm by exactly one part" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"distillation": {"gate": False, "rcka": False}},  # two parts
        {
            "distillation": {"gate": False},
            "controller": {"target": 1.0},
        },  # the gate keeps the scale
        {"distillation": {"gate": False}, "lr": 1e-4},  # a part and a setting
        {"distillation": {"nontarget_weight": 4.0}},  # a setting
        {"controller": {"target": 1.0}},  # still adaptive
        {"bits": 2, "distillation": {"gate": False}},  # another grid
        {},  # the same again
    ],
)
def test_arms_that_differ_otherwise_are_no_ablation(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    full = arm(tmp_path, "grace", FULL, answers())
    other = arm(tmp_path, "other", spec(**changes), answers(lost=5))
    assert ablations(full, other) == ()
    result = compare([full, other], tmp_path / "base", draws=400)
    assert HEADING not in render(result)
    assert not {path.name for path in write(result, tmp_path / "out")} & {"ablations.csv"}


def test_without_a_full_arm_there_is_no_section(tmp_path: Path) -> None:
    one = arm(tmp_path, "one", spec(distillation={"gate": False}), answers())
    two = arm(tmp_path, "two", spec(distillation={"gate": False, "rcka": False}), answers(lost=9))
    three = arm(tmp_path, "three", spec(distillation={"rcka": False}), answers(lost=9))
    qat = arm(tmp_path, "qat", QAT, answers(lost=9))
    assert ablations(one, two, three, qat) == ()


def test_teachers_may_differ_by_seed_and_only_shared_seeds_are_paired(tmp_path: Path) -> None:
    full = arm(tmp_path, "grace", spec(teacher="by-seed"), answers())
    nogate = spec(teacher="by-seed", distillation={"gate": False})
    other = arm(tmp_path, "nogate", nogate, answers(lost=9), seeds=(1, 2, 5))
    far = arm(tmp_path, "far", nogate | {"omega": 1.0}, answers(lost=9), seeds=(7,))
    rows = "".join(row.model_dump_json() + "\n" for row in predictions(answers(gained=90)))
    for alone in (full / "seed-0", other / "seed-5"):  # must not count
        right = 2 * N // 3 + 90
        metrics = (alone / "metrics.json").read_text()
        before = json.loads(metrics)["tasks"][0]["overall"]["right"]
        (alone / "metrics.json").write_text(
            metrics.replace(f'"right":{before}', f'"right":{right}')
        )
        (alone / "predictions.jsonl").write_text(rows)
    base = write_run(tmp_path / "base", predictions(answers()), method="base")
    result = compare([full, other, far], base, draws=400)
    (row,) = result.tasks[0].ablations
    assert row.pair.difference == pytest.approx(9 / N)
    assert [(s.seed, s.reference_seed) for s in row.pair.seed_pairs] == [(1, 1), (2, 2)]
    assert ablation_rows(result)[0]["by seed"] == "1: +2.2, 2: +2.2"
    assert "- `far` differs from no full arm by exactly one part on seeds of both." in render(
        result
    )


def test_a_part_that_never_acted_is_not_judged(tmp_path: Path) -> None:
    full = arm(tmp_path, "grace", FULL, answers(), seeds=(0,))
    other = arm(tmp_path, "norcka", spec(distillation={"rcka": False}), answers(), seeds=(0,))
    third = arm(tmp_path, "nogate", spec(distillation={"gate": False}), answers(), seeds=(0,))
    assert [row.part for row in ablations(full, other, third)] == ["gate", "rcka"]
    log = "".join(json.dumps({"step": k, "ce": 1.0, "kd": 2.0}) + "\n" for k in (1, 2))
    (full / "seed-0" / "train.jsonl").write_text(log)  # no image was ever seen
    result = compare([full, other, third], tmp_path / "base", draws=400)
    assert [row.part for row in result.tasks[0].ablations] == ["gate"]
    assert "- `norcka` says nothing about RCKA" in render(result)


def test_all_of_distillation_and_training_on_the_grid(tmp_path: Path) -> None:
    full = arm(tmp_path, "grace", FULL, answers())
    qat = arm(tmp_path, "qat", QAT, answers(lost=5), seconds=50)
    slow = arm(tmp_path, "qat-slow", QAT | {"lr": 1e-5}, answers(lost=3))  # other settings: not it
    ptq = {"bits": 3, "group_size": 128, "device": "cpu", "making_seconds": 4}
    rtn = write_run(tmp_path / "rtn", predictions(answers(lost=60)), method="rtn", **ptq)
    gptq = write_run(tmp_path / "gptq", predictions(answers(lost=50)), method="gptq", **ptq)
    rows = ablations(full, qat, slow, rtn, gptq)
    assert [(r.part, r.pair.arm, r.pair.reference, r.cost, r.differing) for r in rows] == [
        ("distillation", "grace", "qat", 0.5, ()),
        ("training", "qat", "gptq", 0.04, ()),
    ]
    worse = arm(tmp_path, "qat-worse", QAT | {"lr": 1e-3}, answers(lost=30))
    rows = ablations(full, worse, slow, rtn, gptq)  # none of its settings: the best there is
    assert [row.pair.reference for row in rows] == ["qat-slow", "gptq"]
    assert rows[0].differing == ("lr 5e-05 / 1e-05",)
    text = render(compare([full, slow, gptq], tmp_path / "base", draws=400))
    assert "the arms also differ in lr 5e-05 / 1e-05." in text
    assert ablations(qat, rtn, gptq) == ()  # no grace arm, no section


def test_cost_is_compared_on_one_kind_of_device(tmp_path: Path) -> None:
    full = arm(tmp_path, "grace", FULL, answers())
    other = arm(
        tmp_path, "nogate", spec(distillation={"gate": False}), answers(lost=5), device="cuda"
    )
    (row,) = ablations(full, other)
    assert row.cost is None


# --- files --------------------------------------------------------------------------------------


def test_the_report_is_a_function_of_the_json(tmp_path: Path) -> None:
    full = arm(tmp_path, "grace", FULL, answers())
    other = arm(tmp_path, "nogate", spec(distillation={"gate": False}), answers(lost=9))
    base = write_run(tmp_path / "base", predictions(answers()), method="base")
    result = compare([full, other], base, draws=400)
    out = tmp_path / "out"
    assert out / "tables" / "ablations.csv" in write(result, out)
    read = Comparison.model_validate_json((out / "comparison.json").read_text())
    assert read == result
    assert render(read) == (out / "report.md").read_text()
    with (out / "tables" / "ablations.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == ablation_rows(result)
    write(compare([full], base, draws=400), out)  # nothing to compare: no table is left behind
    assert not (out / "tables" / "ablations.csv").exists()


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results").glob("*/comparison.json")), ids=lambda path: path.parent.name
)
def test_committed_comparisons_still_read(path: Path) -> None:
    result = Comparison.model_validate_json(path.read_text())
    assert render(result).startswith("# Comparison")
