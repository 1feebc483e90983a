from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from qatbench.report.markdown import render
from qatbench.report.model import (
    ADVICE,
    Ablation,
    ArmResult,
    Comparison,
    Course,
    Curve,
    Definition,
    PairResult,
    ReportWarning,
    SeedPair,
    Stretch,
    TaskComparison,
    WarningCode,
)
from qatbench.report.tables import arm_rows, duration, p_value, points
from qatbench.report.verdict import decisions, verdict

GOLDEN = Path(__file__).parent / "golden" / "report.md"


def arm(name: str, accuracies: tuple[float, ...], **facts: Any) -> ArmResult:
    mean = sum(accuracies) / len(accuracies)
    zeros = (0,) * len(accuracies)
    given = {
        "name": name,
        "seeds": tuple(range(len(accuracies))),
        "fingerprints": (None,) * len(accuracies),
        "n": 1000,
        "rows": 1000,
        "right": tuple(round(1000 * accuracy) for accuracy in accuracies),
        "accuracies": accuracies,
        "accuracy": mean,
        "low": mean - 0.03,
        "high": mean + 0.03,
        "spread": 0.0123 if len(accuracies) > 1 else None,
        "chance": 0.44,
        "unparsed": zeros,
        "errors": zeros,
        "ties": zeros,
    }
    return ArmResult.model_validate(given | facts)


def pair(one: ArmResult, other: ArmResult, **numbers: Any) -> PairResult:
    difference = one.accuracy - other.accuracy
    seeds = [SeedPair(seed=k, reference_seed=0, lost=20, gained=31 + k, p=0.161) for k in one.seeds]
    given = {
        "arm": one.name,
        "reference": other.name,
        "difference": difference,
        "low": difference - 0.02,
        "high": difference + 0.02,
        "p": 0.0004,
        "p_holm": 0.0012,
        "verdict": "better" if difference > 0 else "worse",
        "n_needed": 4200,
        "seed_pairs": tuple(seeds),
        "lost": 20,
        "gained": 31 + (len(seeds) - 1) / 2,
    }
    return PairResult.model_validate(given | numbers)


def definition(**changes: Any) -> Definition:
    given = {
        "task": "scienceqa:test:text",
        "protocol": ("llava-sqa",),
        "mode": ("options",),
        "n": 1000,
        "dropped": {},
        "intersection": False,
        "text_only": True,
        "data": {"scienceqa:test:text": ("d1g357",)},
        "prompt_form": (),
        "dtype": ("float32",),
        "device": ("cpu",),
        "batch": ("8",),
        "versions": {"torch": ("2.11.0",)},
        "seeds": {"base": (0,), "gptq": (0,), "grace": (0, 1)},
        "margin": 0.01,
        "level": 0.95,
        "bootstrap_draws": 10_000,
        "bootstrap_seed": 0,
        "family_size": 3,
        "recipe": "smol-scienceqa",
    }
    return Definition.model_validate(given | changes)


BASE = arm("base", (0.555,), method="base", bits_per_weight=16.0, checkpoint_bytes=269_060_552,
           label="weights dequantized from Q4_1")  # fmt: skip
GPTQ = arm("gptq", (0.641,), method="gptq", bits=4, group_size=64, bits_per_weight=4.25,
           checkpoint_bytes=112_000_000, making_seconds=61, calibration_seconds=30,
           ties=(3,))  # fmt: skip
GRACE = arm("grace", (0.70, 0.71), method="grace", bits=4, group_size=64, bits_per_weight=4.25,
            checkpoint_bytes=112_000_000, making_seconds=500, training_seconds=480,
            samples_seen=12_800, device="one GPU", notes=["RCKA inactive: no images"])  # fmt: skip


def comparison(contest: PairResult | None = None, *arms: ArmResult, **changes: Any) -> Comparison:
    chosen = arms or (BASE, GPTQ, GRACE)
    ties = ReportWarning(code=WarningCode.TIES, arms=("gptq",), detail="gptq: 3 of 1000 rows")
    task = TaskComparison(
        definition=definition(**changes),
        arms=chosen,
        pairs=tuple(pair(one, BASE) for one in chosen if one is not BASE),
        contests=(contest,) if contest else (),
        warnings=(ties,),
    )
    return Comparison(baseline="base", tasks=(task,))


def with_parts(result: Comparison) -> Comparison:
    """Add what a report holds of ablations and of training."""
    unsure = {"low": -0.002, "high": 0.017, "p": 0.12, "p_holm": 0.24, "verdict": "undecided"}
    gate, beta = (
        pair(GRACE, arm(name, (0.697,)), difference=0.0075, **unsure)
        for name in ("grace-nogate", "grace-fixed")
    )
    facts = {"full": "grace", "grid": GRACE.grid, "variance": 0.08, "n_to_decide": 11_700}
    told = [
        {"part": "gate", "without": None, "pair": gate, "verdict": "undecided", "cost": 0.97},
        {"part": "beta", "without": "beta fixed at 0.5", "pair": beta, "verdict": "does not matter",
         "cost": None},
        {"part": "training", "without": None, "pair": pair(GRACE, GPTQ), "verdict": "helps",
         "cost": 0.122, "shared_p": True, "differing": ("lr 0.0001 / 0.0002",)},
    ]  # fmt: skip
    rows = [Ablation.model_validate({"shared_p": False, **facts, **row}) for row in told]
    (task,) = result.tasks
    added = {"ablations": tuple(rows), "not_ablated": ("`grace-odd` differs in two parts",)}
    counted = task.definition.model_copy(update={"ablation_family": 2})
    task = task.model_copy(update={"definition": counted, **added})
    stretches = [
        Stretch(first=40 * k + 1, last=40 * k + 40, ce=1.5 - k / 5, kd=4 - k / 2, rcka=None,
                gate=0.9, beta=0.5 + k / 8) for k in range(5)
    ]  # fmt: skip
    course = Course(
        arm="grace", seeds=(0, 1), stretches=tuple(stretches), beta_range=(0.5, 1.0),
        beta_at_bound=0.2, points=(1, 2), curves={"ce": Curve(mean=(1.5, 0.7))},
    )  # fmt: skip
    return result.model_copy(update={"tasks": (task,), "training": (course,)})


def words(result: Comparison) -> str:
    return verdict(result.tasks[0], result.baseline)


def test_report_is_the_golden_one() -> None:
    """QATBENCH_GOLDEN=write makes it anew; say why in the commit."""
    text = render(with_parts(comparison(pair(GRACE, GPTQ))))
    if os.environ.get("QATBENCH_GOLDEN") == "write":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_one_row_an_arm_with_its_interval() -> None:
    text = render(comparison(pair(GRACE, GPTQ)))
    rows = re.findall(r"^\| (\S+) \| (\d+\.\d) \| (\[\d+\.\d, \d+\.\d\]) \|", text, re.MULTILINE)
    assert rows == [
        ("base", "55.5", "[52.5, 58.5]"),
        ("gptq", "64.1", "[61.1, 67.1]"),
        ("grace", "70.5", "[67.5, 73.5]"),
    ]
    assert "(1) `base`: weights dequantized from Q4_1." in text
    assert "- `grace`: RCKA inactive: no images" in text
    assert "1000 (text only)" in text


def test_a_clear_lead_of_qat_ships_qat() -> None:
    text = words(comparison(pair(GRACE, GPTQ)))
    assert text.startswith("**Ship `grace`**: the best QAT arm is above the best PTQ arm.")
    assert "QAT minus PTQ: +6.4 [+4.4, +8.4] points (p 0.001)" in text
    assert "`grace` 8 min to make, 112.0 MB, 4.25 bits/weight; `gptq` 61 s to make" in text


def test_a_lead_that_holm_or_the_interval_denies_ships_the_cheaper() -> None:
    for numbers in ({"p_holm": 0.06}, {"low": -0.01}):
        contest = pair(GRACE, GPTQ, verdict="undecided", **numbers)
        text = words(comparison(contest))
        assert text.startswith("**Ship `gptq`**: no difference is shown")
        assert "about 4200 questions" in text


def test_equivalent_arms_ship_the_cheaper_even_when_the_difference_is_sure() -> None:
    contest = pair(GRACE, GPTQ, verdict="equivalent", difference=0.004, low=0.001, high=0.007)
    text = words(comparison(contest))
    assert text.startswith("**Ship `gptq`**: the best QAT and the best PTQ arm are equivalent")
    assert "within ±1 points, and it cost no more" in text
    dear = GPTQ.model_copy(update={"source_seconds": 900.0})
    assert dear.cost_seconds == 961  # PTQ of a trained checkpoint: its training counts
    assert words(comparison(contest, BASE, dear, GRACE)).startswith("**Ship `grace`**")


def test_qat_below_ptq_ships_ptq() -> None:
    low = GRACE.model_copy(update={"accuracy": 0.6})
    text = words(comparison(pair(low, GPTQ), BASE, GPTQ, low))
    assert text.startswith("**Ship `gptq`**: the best QAT arm is below the best PTQ arm.")


def in_short(result: Comparison) -> str:
    (decision,) = decisions(result.tasks[0], result.baseline)
    return decision.short


def test_the_first_screen_says_what_to_ship_and_what_the_other_would_cost() -> None:
    assert in_short(comparison(pair(GRACE, GPTQ))) == (
        "**Ship `grace`.** It scores +6.4 [+4.4, +8.4] points against the best PTQ arm, `gptq`"
        " (p 0.001), and costs 8 min instead of 61 s. It answers 70.5 % right, the best at 16 bits,"
        " `base`, 55.5 %."
    )
    unsure = in_short(comparison(pair(GRACE, GPTQ, verdict="undecided", p_holm=0.06)))
    assert unsure.startswith(
        "**Ship `gptq`.** `grace` scores +6.4 [+4.4, +8.4] points beside it, no difference that is"
        " shown (p 0.060), and costs 8 min instead of 61 s."
    )
    same = pair(GRACE, GPTQ, verdict="equivalent", difference=0.004, low=0.001, high=0.007)
    assert "`grace` is equivalent within ±1 points: +0.4 [+0.1, +0.7], and costs" in in_short(
        comparison(same)
    )


def test_a_difference_is_told_from_the_arm_that_is_shipped() -> None:
    worse = pair(GRACE, GPTQ, verdict="worse", difference=-0.03, low=-0.05, high=-0.01)
    text = in_short(comparison(worse))
    assert text.startswith("**Ship `gptq`.** It scores +3.0 [+1.0, +5.0] points against the best")
    assert "QAT arm, `grace`" in text


def test_gpu_hours_are_the_price_where_it_was_made_on_a_gpu() -> None:
    dear = GRACE.model_copy(update={"device": "cuda", "making_seconds": 5400.0})
    text = in_short(comparison(pair(GRACE, GPTQ), BASE, GPTQ, dear))
    assert "costs 1.5 GPU-hours instead of 61 s" in text


def test_arms_are_ranked_within_their_grid() -> None:
    narrow = {"bits": 3, "accuracy": 0.5}
    few = [a.model_copy(update=narrow | {"name": f"{a.name}-w3"}) for a in (GPTQ, GRACE)]
    result = comparison(pair(GRACE, GPTQ), BASE, GPTQ, GRACE, *few)
    second = pair(few[1], few[0], difference=-0.02, low=-0.03, high=-0.01)
    task = result.tasks[0]
    task = task.model_copy(update={"contests": (*task.contests, second)})
    wide, thin = verdict(task, "base").split("\n\n")
    assert wide.startswith("4 bits g64: **Ship `grace`**")
    assert thin.startswith("3 bits g64: **Ship `gptq-w3`**: the best QAT arm is below")


def test_arms_with_one_label_share_a_mark() -> None:
    other = GPTQ.model_copy(update={"label": BASE.label, "notes": GRACE.notes})
    text = render(comparison(None, BASE, other, GRACE))
    assert "(1) `base`, `gptq`: weights dequantized from Q4_1." in text
    assert text.count("(1)") == 3
    assert "- `gptq`, `grace`: RCKA inactive: no images" in text


def test_without_a_contest_the_best_quantized_arm_leads() -> None:
    text = words(comparison(None, BASE, GPTQ))
    assert text.startswith("**Best quantized arm: `gptq`**, the only PTQ arm, with 64.1 %")
    assert "it is +8.6 [+6.6, +10.6] points (p 0.001): better." in text
    unknown = words(comparison(None, BASE))
    assert "No arm states a quantization method" in unknown
    assert "`base` is the baseline" in unknown


def test_one_training_seed_is_said_in_the_verdict() -> None:
    once = arm("grace", (0.705,), method="grace")
    contest = pair(once, GPTQ)
    assert "trained with one seed" in words(comparison(contest, BASE, GPTQ, once))
    assert "trained with one seed" not in words(comparison(pair(GRACE, GPTQ)))


def test_intersection_is_in_the_definition() -> None:
    text = render(comparison(None, BASE, GPTQ, intersection=True, dropped={"base": 7, "gptq": 0}))
    assert "the intersection of the arms, left out: base 7, gptq 0" in text


def test_a_bar_in_a_name_does_not_break_the_table() -> None:
    odd = arm("w4|g64", (0.6,), method="rtn")
    assert r"| w4\|g64 | 60.0 |" in render(comparison(None, BASE, odd))


def test_rows_fit_a_terminal_of_100_columns() -> None:
    wide = arm("mini-grace-norcka", (0.5,), checkpoint_bytes=4_520_000_000, making_seconds=5900,
               bits_per_weight=4.25)  # fmt: skip
    rows = arm_rows(comparison(None, BASE, wide))
    table = Table(box=None, padding=(0, 1, 0, 0))
    for key in list(rows[0])[1:]:
        table.add_column(key, no_wrap=True)
    for row in rows:
        table.add_row(*list(row.values())[1:])
    assert Console().measure(table).maximum <= 100


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (points(-0.0004), "0.0"),
        (points(0.0206), "+2.1"),
        (p_value(0.00099), "<0.001"),
        (p_value(1.0), "1.000"),
        (duration(0.0), "0 s"),
        (duration(99.6), "2 min"),
        (duration(7200), "2.0 h"),
        (duration(None), "-"),
    ],
)
def test_formats(got: str, wanted: str) -> None:
    assert got == wanted


def test_every_warning_has_advice() -> None:
    assert set(ADVICE) == set(WarningCode)
