"""Which warnings a comparison carries: a pure function of its figures."""

from __future__ import annotations

from collections.abc import Iterable

from qatbench.report.model import (
    CONTROL_METHODS,
    QAT_METHODS,
    ArmResult,
    Course,
    Definition,
    PairResult,
    ReportWarning,
    Setting,
    WarningCode,
)

_MOST_STEPS = 0.5  # share of the steps at a bound above which beta did not adapt


def warnings_of(
    definition: Definition,
    arms: tuple[ArmResult, ...],
    pairs: tuple[PairResult, ...],
    disagree: tuple[str, ...] = (),
    training: tuple[Course, ...] = (),
) -> tuple[ReportWarning, ...]:
    """Collect them, in the order of WarningCode; `disagree`: arms unlike their metrics.json."""
    found = [
        *_of_definition(definition),
        *_of_arms(arms),
        _about(
            WarningCode.UNPAIRED_SEEDS,
            {
                pair.arm: f"{pair.arm} against {pair.reference}"
                for pair in pairs
                if _unpaired(pair, arms)
            },
        ),
        _about(WarningCode.METRICS_DISAGREE, dict.fromkeys(disagree, "")),
        _about(
            WarningCode.BETA_AT_BOUND,
            {
                course.arm: f"{course.arm}: {course.beta_at_bound:.0%} of the steps"
                for course in training
                if course.beta_at_bound is not None and course.beta_at_bound > _MOST_STEPS
            },
        ),
    ]
    order = list(WarningCode)
    return tuple(sorted(filter(None, found), key=lambda warning: order.index(warning.code)))


def _of_definition(definition: Definition) -> Iterable[ReportWarning | None]:
    def differing(code: WarningCode, settings: dict[str, Setting]) -> ReportWarning | None:
        many = {name: values for name, values in settings.items() if len(values) > 1}
        detail = "; ".join(f"{name}: {' | '.join(values)}" for name, values in many.items())
        return ReportWarning(code=code, arms=(), detail=detail) if many else None

    yield differing(
        WarningCode.DIFFERENT_PROTOCOL,
        {
            "protocol": definition.protocol,
            "mode": definition.mode,
            "prompt form": definition.prompt_form,
        },
    )
    settings = {"dtype": definition.dtype, "device": definition.device, "batch": definition.batch}
    yield differing(WarningCode.DIFFERENT_SETTINGS, settings | definition.versions)
    yield differing(WarningCode.DIFFERENT_DATA, definition.data)
    cut = {arm: f"{arm}: {count} left out" for arm, count in definition.dropped.items() if count}
    yield _about(WarningCode.INTERSECTION, cut)
    if definition.images != ("shown",):
        told = f"images: {' | '.join(definition.images)}"
        yield ReportWarning(code=WarningCode.CONTROL_IMAGES, arms=(), detail=told)


def _of_arms(arms: tuple[ArmResult, ...]) -> Iterable[ReportWarning | None]:
    yield _about(
        WarningCode.ONE_SEED,
        {arm.name: arm.name for arm in arms if len(arm.seeds) == 1 and _trained(arm)},
    )
    for code, field in (
        (WarningCode.UNPARSED, "unparsed"),
        (WarningCode.ERRORS, "errors"),
        (WarningCode.TIES, "ties"),
    ):
        counts = {arm.name: (sum(getattr(arm, field)), arm.rows * len(arm.seeds)) for arm in arms}
        yield _about(code, {a: f"{a}: {k} of {n} rows" for a, (k, n) in counts.items() if k})
    guess = [arm for arm in arms if arm.chance is not None and arm.low <= arm.chance]
    yield _about(
        WarningCode.AT_CHANCE, {arm.name: f"{arm.name}: chance {arm.chance:.1%}" for arm in guess}
    )
    grids = {arm.name: arm.grid for arm in arms if _quantized(arm)}
    if len(set(grids.values())) > 1:
        yield _about(WarningCode.DIFFERENT_GRID, {a: f"{a}: {grid}" for a, grid in grids.items()})
    if not any(arm.method in CONTROL_METHODS for arm in arms):
        trained = [arm.name for arm in arms if arm.method in QAT_METHODS]
        yield _about(WarningCode.NO_TRAINED_CONTROL, {name: name for name in trained})


def _about(code: WarningCode, details: dict[str, str]) -> ReportWarning | None:
    """One warning with a detail an arm; None without any."""
    if not details:
        return None
    detail = "; ".join(text for text in details.values() if text)
    return ReportWarning(code=code, arms=tuple(details), detail=detail)


def _trained(arm: ArmResult) -> bool:
    """Whether it, or the compared arm that it was made from, was trained."""
    return arm.method in QAT_METHODS | CONTROL_METHODS or arm.source_seconds is not None


def _quantized(arm: ArmResult) -> bool:
    return arm.family in ("PTQ", "QAT") and arm.bits is not None


def _unpaired(pair: PairResult, arms: tuple[ArmResult, ...]) -> bool:
    seeds = {arm.name: set(arm.seeds) for arm in arms}
    used = {seed.seed for seed in pair.seed_pairs}, {s.reference_seed for s in pair.seed_pairs}
    return used != (seeds[pair.arm], seeds[pair.reference])
