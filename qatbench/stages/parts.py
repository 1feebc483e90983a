"""Which compared arms differ by one part of GRACE, read from what made their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from qatbench.report.model import Course, Part
from qatbench.stages.arms import Arm, Run, section

# The settings that belong to a part: with the part off they mean nothing, so they may differ.
OWNED: dict[Part, tuple[str, ...]] = {
    "gate": ("distillation.gate",),
    "kl": (
        "distillation.kl",
        "distillation.gate",  # plain KL is not gated, whatever this says
        "distillation.target_weight",
        "distillation.nontarget_weight",
    ),
    "kd": ("distillation.", "controller."),  # but what RCKA needs
    "rcka": ("distillation.rcka", "omega", "omega_warmup"),
    "beta": ("controller.",),
    "teacher": ("teacher",),
    "tokens": ("distillation.tokens",),
    "distillation": ("method", "teacher", "distillation.", "controller.", "omega", "omega_warmup"),
}
# These change the scale of the distillation loss, so beta's budget may be set anew; that is told.
RESCALING: tuple[Part, ...] = ("kl", "teacher", "tokens")
_METHOD_PARTS: tuple[Part, ...] = ("gate", "kl", "kd", "rcka", "beta", "teacher", "tokens")
OTHER_TEACHER = "another teacher"

Flat = dict[str, object]


class Pairing(NamedTuple):
    """An arm with a part, and one without it."""

    part: Part
    without: str | None  # how it was left out, where that needs saying
    arm: Arm
    reference: Arm
    seeds: tuple[int, ...]  # that both have
    differing: tuple[str, ...] = ()  # other settings that differ, as in `Ablation`


class Found(NamedTuple):
    """What the compared arms allow to say about parts."""

    full: tuple[Arm, ...]  # with nothing switched off, and not themselves without a part of another
    pairings: tuple[Pairing, ...]  # parts of the method
    left_out: tuple[str, ...]  # sentences


def find(arms: Sequence[Arm], training: Sequence[Course]) -> Found:
    """Pair every grace arm with the full ones that differ from it by exactly one part."""
    graces = [arm for arm in arms if _method(arm) == "grace"]
    unswitched = [arm for arm in graces if all(_is_full(spec_of(run)) for run in arm.runs)]
    full = [arm for arm in unswitched if not _pairings(unswitched, arm, graces)]
    courses = {course.arm: course for course in training}
    kept: list[Pairing] = []
    left_out: list[str] = []
    for arm in graces:
        found = [] if arm in full else _pairings(full, arm, graces)
        idle = [pairing for pairing in found if _idle(pairing, courses)]
        kept += [pairing for pairing in found if pairing not in idle]
        left_out += [_idle_words(pairing) for pairing in idle]
        if full and not found and arm not in full:
            left_out.append(
                f"`{arm.name}` differs from no full arm by exactly one part on seeds of both"
            )
    return Found(tuple(full), tuple(kept), tuple(left_out))


def against_qat(full: Arm, arms: Sequence[Arm]) -> tuple[Pairing, ...]:
    """All of distillation: the full arm with each qat arm of its grid on seeds that both have.

    Those that share all other settings, if there are any; else all, with what differs.
    """
    grid = ("bits", "group_size")
    pairings = []
    for arm in arms:
        seeds = _shared(full, arm)
        if _method(arm) != "qat" or not seeds:
            continue
        differing = _differing(full, arm, seeds)
        if not any(key in differing for key in grid):
            other = tuple(key for key in differing if not _owned(key, "distillation"))
            told = _values(full, arm, seeds[0], other)
            pairings.append(Pairing("distillation", None, full, arm, seeds, told))
    return tuple([p for p in pairings if not p.differing] or pairings)


def spec_of(run: Run) -> Flat:
    """The settings that made a run's checkpoint, nested names joined by dots; {} if unknown."""
    return _flat(section(run.checkpoint, "spec"))


def _flat(value: dict[str, Any], prefix: str = "") -> Flat:
    flat: Flat = {}
    for key, inner in value.items():
        flat |= (
            _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {prefix + key: inner}
        )
    return flat


def _method(arm: Arm) -> object:
    return spec_of(arm.runs[0]).get("method")


def _is_full(spec: Flat) -> bool:
    """Whether no switch of GRACE was thrown; omega 0 is a setting, not a switch."""
    on: tuple[Part, ...] = ("gate", "kl", "beta")
    return all(_on(spec, part) for part in on) and spec.get("distillation.rcka") is True


def _on(spec: Flat, part: Part) -> bool:
    decoupled = spec.get("distillation.kl") == "decoupled"
    if part == "gate":
        return decoupled and spec.get("distillation.gate") is True
    if part == "kl":
        return decoupled
    if part == "kd":
        return spec.get("distillation.kl") != "none"
    if part == "rcka":
        return spec.get("distillation.rcka") is True and bool(spec.get("omega"))
    if part == "beta":
        return bool(spec.get("controller.rate"))
    return spec.get("teacher") != spec.get("student")


def _pairings(full: Sequence[Arm], arm: Arm, order: Sequence[Arm]) -> list[Pairing]:
    """`arm` with each of `full` that has the one part that it lacks.

    Between two choices, of other teachers or of tokens, the earlier arm is the full one.
    """
    found = [pairing for one in full if one is not arm and (pairing := _pairing(one, arm))]
    return [
        pairing
        for pairing in found
        if not (pairing.part == "tokens" or pairing.without == OTHER_TEACHER)
        or order.index(pairing.arm) < order.index(arm)
    ]


def _pairing(full: Arm, arm: Arm) -> Pairing | None:
    """The one part that `full` has and `arm` lacks on every seed they share; None otherwise."""
    seeds = _shared(full, arm)
    differing = _differing(full, arm, seeds)
    if not differing:
        return None
    specs = [(spec_of(_run(full, seed)), spec_of(_run(arm, seed))) for seed in seeds]
    for part in _METHOD_PARTS:
        other = [key for key in differing if not _owned(key, part)]
        budget = part in RESCALING and all(_on(lacking, "beta") for _, lacking in specs)
        if other and not (budget and all(key.startswith("controller.") for key in other)):
            continue
        if all(_lacks(part, *two) for two in specs):
            told = _values(full, arm, seeds[0], other)
            return Pairing(part, _without(part, specs[0][1]), full, arm, seeds, told)
    return None


def _lacks(part: Part, full: Flat, arm: Flat) -> bool:
    """Whether the part was left out of `arm`; one that was off in `full` too is told as idle."""
    if part == "teacher":
        return _on(full, part) and full.get(part) != arm.get(part)
    if part == "tokens":
        return _tokens(full) != _tokens(arm)
    if part == "kl" and not _on(arm, "kd"):
        return False  # that is more than plain KL: "kd"
    return not _on(arm, part)


def _without(part: Part, spec: Flat) -> str | None:
    if part == "beta":
        return f"beta fixed at {spec.get('controller.initial')}"
    if part == "teacher":
        return OTHER_TEACHER if _on(spec, part) else "the student before training teaches"
    if part == "tokens":
        return f"{_tokens(spec)} tokens"
    return None


def _tokens(spec: Flat) -> object:
    """Which tokens are distilled; a spec leaves the default out."""
    return spec.get("distillation.tokens", "supervised")


def _idle(pairing: Pairing, courses: dict[str, Course]) -> bool:
    """Whether the part never acted in the full arm, so that leaving it out changed nothing."""
    if pairing.part != "rcka":
        return False
    course = courses.get(pairing.arm.name)
    seen = course is None or any(stretch.rcka is not None for stretch in course.stretches)
    return not (seen and _on(spec_of(_run(pairing.arm, pairing.seeds[0])), "rcka"))


def _idle_words(pairing: Pairing) -> str:
    return (
        f"`{pairing.reference.name}` says nothing about RCKA: it never acted in"
        f" `{pairing.arm.name}` either (no images in its training data, or omega 0)"
    )


def _owned(key: str, part: Part) -> bool:
    if part == "kd" and key == "distillation.rcka":
        return False
    return any(key == own or (own[-1] == "." and key.startswith(own)) for own in OWNED[part])


def _shared(one: Arm, other: Arm) -> tuple[int, ...]:
    return tuple(seed for seed in one.seeds if seed in other.seeds)


def _run(arm: Arm, seed: int) -> Run:
    return arm.runs[arm.seeds.index(seed)]


def _differing(one: Arm, other: Arm, seeds: Sequence[int]) -> tuple[str, ...]:
    """Settings that differ on any of these seeds; seeds that do not pair are among them."""
    keys: dict[str, None] = {}
    for seed in seeds:
        a, b = spec_of(_run(one, seed)), spec_of(_run(other, seed))
        names = [*a, *(key for key in b if key not in a)]
        keys |= {key: None for key in names if a.get(key) != b.get(key)}
    return tuple(keys)


def _values(one: Arm, other: Arm, seed: int, keys: Sequence[str]) -> tuple[str, ...]:
    a, b = spec_of(_run(one, seed)), spec_of(_run(other, seed))
    return tuple(f"{key} {a.get(key)} / {b.get(key)}" for key in keys)
