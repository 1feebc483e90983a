"""Published claims: each has its row, and the verdict follows from what a comparison states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from test_markdown import arm, definition, pair

from qatbench.report.claims import claim_rows, section
from qatbench.report.details import Claim
from qatbench.report.model import (
    Ablation,
    ArmResult,
    Comparison,
    PairResult,
    ReportWarning,
    TaskComparison,
    WarningCode,
)
from qatbench.report.tables import PARTS
from qatbench.stages.adjusted import settled
from qatbench.stages.claim_rules import AblationTest, PairTest, Published, published
from qatbench.stages.claims import verdicts

RESULTS = Path(__file__).parents[2] / "results"
W4: dict[str, Any] = {"bits": 4, "group_size": 128, "bits_per_weight": 4.16}
BASE = arm("base", (0.80,), bits_per_weight=16.0, checkpoint_bytes=1000)  # no method: untrained
SFT = arm("sft", (0.83,), method="sft", bits_per_weight=16.0, making_seconds=50.5)
KD = arm("kd", (0.82,), method="kd", bits_per_weight=16.0)
RTN = arm("rtn", (0.70,), method="rtn", **W4)
GPTQ = arm("gptq", (0.75,), method="gptq", **W4)
SFT_GPTQ = arm("sft-gptq", (0.81,), method="gptq", source_seconds=50.5, **W4)
GRACE = arm("grace", (0.84,), method="grace", checkpoint_bytes=400, **W4)

KEY = (0, frozenset(("grace", "base")))
UNSURE = {"verdict": "undecided", "p_holm": 0.4, "n_needed": 4200}
EQUAL = {"verdict": "equivalent", "p_holm": 0.9}


def task(*pairs: PairResult, arms: tuple[ArmResult, ...] = (), **changes: Any) -> TaskComparison:
    """Pairs that are not against base are contests."""
    chosen = arms or (BASE, SFT, RTN, GPTQ, GRACE)
    own = {"ablations": changes.pop("ablations", ()), "warnings": changes.pop("warnings", ())}
    facts = {"task": "scienceqa", "text_only": False, "model": ("student",)} | changes
    return TaskComparison(
        definition=definition(**facts),
        arms=chosen,
        pairs=tuple(one for one in pairs if one.reference == "base"),
        contests=tuple(one for one in pairs if one.reference != "base"),
        **own,
    )


def claim(name: str, *tasks: TaskComparison) -> Claim:
    return {one.id: one for one in verdicts(tasks, "base")}[name]


def ablation(part: str = "gate", full: ArmResult = GRACE, **numbers: Any) -> Ablation:
    verdict = numbers.pop("worth")
    lacking = arm(f"no-{part}", (0.99,), method="grace", **W4)
    return Ablation(
        part=part,
        without=None,
        full=full.name,
        grid=full.grid,
        pair=pair(full, lacking, **numbers),
        shared_p=False,
        verdict=verdict,
        variance=0.1,
        n_to_decide=11_700,
        cost=None,
    )


# --- the data -----------------------------------------------------------------------------------


def test_every_published_claim_has_its_row() -> None:
    entries = {one.id: one for one in published()}
    assert len(entries) == len(published())
    assert set(entries) == {
        "ptq-loses",
        "int4-beats-16-bit",
        "llava-7b-scienceqa",
        "qwen2-vl-2b-mmbench",
        "qwen3-vl-2b-bf16",
        "qwen3-vl-2b-w8",
        "qwen3-vl-2b-w4",
        "qwen3-vl-2b-teacher",
        "grace-beats-ptq",
        "gate-helps",
        "decoupled-kl-helps",
        "rcka-helps",
        "controller-helps",
        "throughput",
        "memory",
    }
    for name, figures in {
        "llava-7b-scienceqa": ("70.1", "66.8"),
        "qwen2-vl-2b-mmbench": ("76.9", "72.6"),
        "qwen3-vl-2b-bf16": ("86.2 / 86.4", "81.4 / 78.4"),
        "qwen3-vl-2b-w8": ("85.3 / 85.5", "81.4 / 78.4"),
        "qwen3-vl-2b-w4": ("84.3 / 84.6", "81.4 / 78.4"),
        "qwen3-vl-2b-teacher": ("86.2 / 86.4", "85.0 / 84.5"),
        "throughput": ("3 x",),
        "memory": ("54 %",),
    }.items():
        assert all(figure in entries[name].published for figure in figures)
    parts = {one.test.part for one in entries.values() if isinstance(one.test, AblationTest)}
    assert parts == {"gate", "kl", "rcka", "beta"} <= set(PARTS)
    named = entries["llava-7b-scienceqa"].test
    assert isinstance(named, PairTest)
    assert named.needs.model == "LLaVA-1.5-7B"
    assert named.expect == "better"


@pytest.mark.parametrize(
    "test",
    [
        {"kind": "guess"},
        {"kind": "speed"},
        {"kind": "speed", "expect_at_least": 3, "than": "before"},
        {"kind": "ablation", "part": "luck", "expect": "helps"},
    ],
)
def test_a_rule_that_is_no_rule_is_refused(test: dict[str, Any]) -> None:
    words = dict.fromkeys(("id", "claim", "source", "published"), "x")
    with pytest.raises(ValidationError):
        Published.model_validate({**words, "test": test})


# --- pairs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "verdict", "reason"),
    [
        ({}, "reproduced", "better, p 0.001"),
        (UNSURE, "undecided", "would take about 4200 questions"),
        ({"p_holm": 0.06}, "undecided", "neither"),
        ({"verdict": "worse"}, "contradicted", "worse, p 0.001"),
        (EQUAL, "contradicted", "equivalent within ±1 points"),
        ({**EQUAL, "p_equivalence_holm": 0.2}, "undecided", "neither"),
        ({**EQUAL, "p_equivalence_holm": 0.01}, "contradicted", "equivalent"),
    ],
)
def test_a_pair_is_judged_by_its_adjusted_p(
    numbers: dict[str, Any], verdict: str, reason: str
) -> None:
    stated = pair(GRACE, BASE, **numbers)
    family = {KEY: (stated.p_holm, stated.p_equivalence_holm or 0.0)}
    told = claim("int4-beats-16-bit", task(settled(stated, family, KEY, 0.95)))
    assert told.verdict == verdict
    assert reason in told.reason
    assert "`grace` 84.0 % against `base` 80.0 %: +4.0 [+2.0, +6.0] points" in told.here


@pytest.mark.parametrize("name", ["mini", "mini-written", "mini-ablation", "smol-scienceqa"])
def test_verdicts_that_claims_rest_on_hold_after_the_adjustment(name: str) -> None:
    file = RESULTS / name / "comparison.json"
    if not file.is_file():
        pytest.skip(f"results/{name} is not in this copy")
    shown = 0
    for one in Comparison.model_validate_json(file.read_bytes()).tasks:
        parts = [row.pair for row in one.ablations]
        for stated in (*one.pairs, *one.contests, *one.claimed, *parts):
            equal = stated.verdict == "equivalent"
            p = stated.p_equivalence_holm if equal else stated.p_holm
            assert p is not None
            assert stated.verdict == "undecided" or p < 1 - one.definition.level
            shown += stated.verdict != "undecided"
        worth = [row.pair.p_holm for row in one.ablations if row.verdict in ("helps", "hurts")]
        assert all(p < 1 - one.definition.level for p in worth)
    assert shown


def test_ptq_loses_is_about_the_best_of_them() -> None:
    pairs = pair(RTN, BASE), pair(GPTQ, BASE, verdict="worse")
    told = claim("ptq-loses", task(*pairs))
    assert (told.verdict, "`gptq` (best of 2)" in told.here) == ("reproduced", True)
    assert claim("ptq-loses", task(pairs[0], pair(GPTQ, BASE, **EQUAL))).verdict == "contradicted"
    assert claim("ptq-loses", task(pairs[0], pair(GPTQ, BASE, **UNSURE))).verdict == "undecided"


def test_ptq_of_a_trained_model_is_held_against_that_model() -> None:
    arms = (BASE, SFT, GPTQ, SFT_GPTQ)
    lost = pair(GPTQ, BASE, verdict="worse")
    told = claim("ptq-loses", task(lost, pair(SFT_GPTQ, SFT, **EQUAL), arms=arms))
    assert "`gptq` 75.0 % against `base` 80.0 %" in told.here
    assert "`sft-gptq` 81.0 % against `sft` 83.0 %" in told.here
    assert told.verdict == "undecided"  # one reproduces, the other does not
    only = claim("ptq-loses", task(lost, pair(SFT_GPTQ, BASE), arms=arms))
    assert only.verdict == "reproduced"
    assert "not tested: `sft-gptq` against `sft` is not among the pairs" in only.reason
    lone = claim("ptq-loses", task(pair(SFT_GPTQ, BASE), arms=(BASE, SFT_GPTQ)))
    assert lone.reason == "no 16-bit arm that it was made from here"


def test_a_pair_stated_the_other_way_round_is_turned() -> None:
    turned = pair(BASE, GRACE)  # worse, -4
    told = claim("int4-beats-16-bit", task(turned))
    assert told.verdict == "reproduced"
    assert "+4.0 [+2.0, +6.0] points" in told.here
    low = GRACE.model_copy(update={"accuracy": 0.7})
    assert claim("int4-beats-16-bit", task(pair(BASE, low))).verdict == "contradicted"


def test_a_pair_that_was_not_stated_is_not_worked_out() -> None:
    told = claim("grace-beats-ptq", task(pair(GRACE, BASE), pair(GRACE, RTN)))
    assert told.verdict == "not testable here"
    assert "`grace` against `gptq` is not among the pairs" in told.reason
    assert "baseline `base`" in told.reason
    assert claim("grace-beats-ptq", task(pair(GRACE, GPTQ))).verdict == "reproduced"


def test_arms_are_compared_within_their_grid() -> None:
    other = GPTQ.model_copy(update={"name": "gptq-g64", "group_size": 64, "accuracy": 0.9})
    told = claim("grace-beats-ptq", task(pair(GRACE, GPTQ), arms=(BASE, GPTQ, other, GRACE)))
    assert told.verdict == "reproduced"
    narrow = GRACE.model_copy(update={"name": "grace-w3", "bits": 3, "accuracy": 0.7})
    few = claim("int4-beats-16-bit", task(pair(narrow, BASE), arms=(BASE, narrow)))
    assert few.verdict == "not testable here"
    assert few.reason == "no grace arm at 4 bits here"
    assert few.here.startswith("3 bits g128: `grace-w3` 70.0 % against `base` 80.0 %")


def test_an_arm_that_lacks_a_part_does_not_stand_for_grace() -> None:
    part = ablation(worth="helps")
    lacking = arm("no-gate", (0.99,), method="grace", **W4)
    told = claim(
        "int4-beats-16-bit",
        task(pair(GRACE, BASE), arms=(BASE, lacking, GRACE), ablations=(part,)),
    )
    assert "`grace` 84.0 %" in told.here


def test_the_control_is_told_and_has_no_say() -> None:
    alone = pair(GRACE, BASE)
    untold = claim("int4-beats-16-bit", task(alone))
    assert "Control, trained without quantization: `sft` 83.0 %, not a stated pair" in untold.here
    for numbers, words in (
        ({}, "above it too"),
        (EQUAL, "equivalent to it"),
        (UNSURE, "not shown to be above it"),
        ({"verdict": "worse"}, "below it"),
    ):
        told = claim("int4-beats-16-bit", task(alone, pair(GRACE, SFT, **numbers)))
        assert told.verdict == "reproduced"
        assert told.here.endswith(words)


def test_matching_the_teacher_counts_as_not_worse() -> None:
    teacher = arm("teacher", (0.825,))
    qwen = {"model": ("Qwen/Qwen3-VL-2B-Instruct",), "arms": (BASE, KD, teacher)}
    for numbers, verdict in (
        (EQUAL, "reproduced"),
        ({"verdict": "better"}, "reproduced"),
        ({"verdict": "worse"}, "contradicted"),
        (UNSURE, "undecided"),
    ):
        told = claim("qwen3-vl-2b-teacher", task(pair(KD, teacher, **numbers), **qwen))
        assert told.verdict == verdict
        assert told.reason.endswith("; MMBench was not asked")
    none = claim("qwen3-vl-2b-teacher", task(**qwen | {"arms": (BASE, KD)}))
    assert none.reason == "no arm named `teacher` here"


# --- what a claim needs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "it is about LLaVA-1.5-7B; compared here: `student`"),
        ({"model": ()}, "which model was compared is not recorded"),
        ({"model": ("llava-hf/llava-1.5-13b-hf",)}, "compared here: `llava-hf/llava-1.5-13b-hf`"),
        (
            {"model": ("llava-hf/llava-1.5-7b-hf",), "task": "mmbench:dev"},
            "it is about ScienceQA; asked here: mmbench:dev",
        ),
        ({"model": ("llava-1.5-7b",), "text_only": True}, "no question here has one"),
        ({"model": ("llava-1.5-7b",), "text_only": None}, "is not recorded"),
        (
            {"model": ("llava-1.5-7b",), "text_only": None, "images": ("none",)},
            "left out or swapped",
        ),
    ],
)
def test_what_is_missing_is_the_reason(changes: dict[str, Any], reason: str) -> None:
    told = claim("llava-7b-scienceqa", task(pair(GRACE, BASE), **changes))
    assert told.verdict == "not testable here"
    assert reason in told.reason
    assert "`grace` 84.0 % against `base` 80.0 %: +4.0" in told.here  # the general form


def test_the_model_that_is_meant_gets_a_verdict() -> None:
    named = task(pair(GRACE, BASE), model=("llava-hf/llava-1.5-7b-hf",), task="scienceqa:test")
    assert claim("llava-7b-scienceqa", named).verdict == "reproduced"
    assert claim("qwen2-vl-2b-mmbench", named).verdict == "not testable here"


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ({}, {}, "reproduced"),
        ({}, EQUAL, "undecided"),
        ({}, UNSURE, "undecided"),
        (UNSURE, EQUAL, "contradicted"),
        (UNSURE, UNSURE, "undecided"),
    ],
)
def test_tasks_are_put_together(
    first: dict[str, Any], second: dict[str, Any], verdict: str
) -> None:
    both = task(pair(GRACE, BASE, **first)), task(pair(GRACE, BASE, **second), task="mmbench")
    told = claim("int4-beats-16-bit", *both)
    assert told.verdict == verdict
    assert "scienceqa" in told.here
    assert "mmbench" in told.here


def test_a_task_without_images_has_no_say() -> None:
    text = task(pair(GRACE, BASE, **EQUAL), task="scienceqa:test:text", text_only=True)
    told = claim("int4-beats-16-bit", task(pair(GRACE, BASE), task="mmbench"), text)
    assert told.verdict == "reproduced"
    assert "scienceqa" not in told.here


# --- parts, bytes, speed ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worth", "p_holm", "verdict"),
    [
        ("helps", 0.01, "reproduced"),
        ("hurts", 0.01, "contradicted"),
        ("does not matter", 0.9, "contradicted"),
        ("undecided", 0.9, "undecided"),
    ],
)
def test_a_part_is_judged_by_its_ablation(worth: str, p_holm: float, verdict: str) -> None:
    told = claim("gate-helps", task(ablations=(ablation(worth=worth, p_holm=p_holm),)))
    assert told.verdict == verdict
    assert ("about 11700 questions" in told.reason) == (verdict == "undecided")
    assert told.here.startswith("4 bits g128: `grace` - `no-gate`")


def test_grids_of_an_ablation_are_put_together() -> None:
    narrow = GRACE.model_copy(update={"name": "grace-w3", "bits": 3})
    parts = ablation(worth="helps"), ablation(full=narrow, worth="does not matter")
    told = claim("gate-helps", task(ablations=parts, text_only=True))
    assert told.verdict == "undecided"
    assert "3 bits g128: equivalent within ±1 points (text questions only)" in told.reason


def test_a_part_that_was_not_switched_off_is_not_judged() -> None:
    blind = task(ablations=(ablation(part="rcka", worth="helps"),), text_only=True)
    assert "no question here has one" in claim("rcka-helps", blind).reason
    assert claim("gate-helps", task()).reason == "no two arms here differ by this part alone"


def test_a_controller_that_lay_at_its_bound_was_no_controller() -> None:
    part = ablation(part="beta", worth="does not matter")
    assert claim("controller-helps", task(ablations=(part,))).verdict == "contradicted"
    bound = ReportWarning(code=WarningCode.BETA_AT_BOUND, arms=("grace",), detail="")
    still = claim("controller-helps", task(ablations=(part,), warnings=(bound,)))
    assert still.verdict == "not testable here"
    assert "lay at a bound" in still.reason
    assert "`no-beta`" in still.here


@pytest.mark.parametrize(
    ("small", "verdict", "reason"),
    [
        (400, "reproduced", "memory in use was not measured"),
        (455, "reproduced", "memory in use"),  # 54.5 %
        (466, "contradicted", "memory in use"),  # 53.4 %: the shape would allow 54.1
        (550, "not testable here", "this model's shape allows 46 % at most"),
        (1100, "contradicted", "memory in use"),
        (None, "not testable here", "size of a checkpoint is not recorded"),
    ],
)
def test_memory_is_that_of_the_weights(small: int | None, verdict: str, reason: str) -> None:
    grace = GRACE.model_copy(update={"checkpoint_bytes": small})
    told = claim("memory", task(arms=(BASE, grace)), task(arms=(BASE, grace), task="mmbench"))
    assert told.verdict == verdict
    assert reason in told.reason
    assert told.here.count("MB against") == (small is not None)  # once, though there are two tasks
    assert "mmbench" not in told.here


def test_speed_waits_for_a_measurement() -> None:
    told = claim("throughput", task())
    assert told.verdict == "not testable here"
    assert "decoding" in told.reason


# --- in the report ------------------------------------------------------------------------------


def report(*tasks: TaskComparison) -> Comparison:
    return Comparison(baseline="base", tasks=tasks, claims=verdicts(tasks, "base"))


def test_the_table_holds_what_was_judged_and_the_rest_stands_below_by_reason() -> None:
    text = section(report(task(pair(GRACE, BASE, **EQUAL), pair(GPTQ, BASE, verdict="worse"))))
    table, below = text.split("**Not testable here**:")
    assert "| claim | published | here | verdict |\n| --- | --- | --- | --- |" in table
    assert "**contradicted**: equivalent within ±1 points |" in table
    assert "**reproduced**: worse, p 0.001 |" in table
    assert "Qwen3" not in table
    assert below.count("- it is about Qwen3-VL-2B; compared here: `student`\n") == 1
    assert below.count("Qwen3-VL-2B in BF16") == 3
    llava = next(line for line in below.splitlines() if "INT4 LLaVA" in line)
    assert llava.endswith("(70.1 against 66.8)")  # its general form is in the table


def test_rows_hold_every_claim() -> None:
    rows = claim_rows(report(task(pair(GRACE, BASE))))
    assert [row["id"] for row in rows] == [one.id for one in published()]
    assert all(all(row.values()) for row in rows)
    empty = Comparison(baseline="base", tasks=(task(),))
    assert (claim_rows(empty), section(empty)) == ([], "")


@pytest.mark.parametrize(
    "name", ["mini", "mini-ablation", "mini-written", "smol-scienceqa", "smol-ablation"]
)
def test_committed_comparisons_can_be_judged(name: str) -> None:
    text = (RESULTS / name / "comparison.json").read_text(encoding="utf-8")
    result = Comparison.model_validate_json(text)
    told = verdicts(result.tasks, result.baseline)
    assert len(told) == len(published())
    assert all(one.reason for one in told)
    by_id = {one.id: one for one in told}
    assert by_id["llava-7b-scienceqa"].verdict == "not testable here"
    if name.startswith("smol"):
        assert by_id["ptq-loses"].reason == "it is about images, and no question here has one"
