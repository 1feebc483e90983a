"""The definition of a comparison in words: what another needs to measure the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qatbench.report.model import Definition, Setting, TaskComparison
from qatbench.report.tables import UNKNOWN
from qatbench.report.verdict import margin_words


def definition_facts(task: TaskComparison, baseline: str) -> dict[str, str]:
    """Name -> value, `code` around names; both report.md and report.html draw this list."""
    definition = task.definition
    searched = [arm.name for arm in task.arms if arm.leakage]
    facts = {
        "recipe": f"`{definition.recipe}`" if definition.recipe else "",
        "model": ", ".join(f"`{name}`" for name in definition.model),
        "baseline": f"`{baseline}`",
        "questions": _questions(definition),
        "images": "" if definition.images == ("shown",) else _setting(definition.images),
        "data, SHA-256": _by_name(definition.data),
        "leakage": f"searched for, see Notes: {named(searched)}" if searched else "",
        "protocol": _setting(definition.protocol),
        "mode": _setting(definition.mode),
        "prompt form": _setting(definition.prompt_form),
        "dtype": _setting(definition.dtype),
        "kernel": _setting(definition.kernel),
        "device": _setting(definition.device),
        "batch": _setting(definition.batch),
        "versions": _by_name(definition.versions),
        "seeds": "; ".join(f"`{a}` {', '.join(map(str, s))}" for a, s in definition.seeds.items()),
        "margin of equivalence": f"{margin_words(definition)} points",
        "intervals": f"{100 * definition.level:g} %; bootstrap of {definition.bootstrap_draws}"
        f" draws, seed {definition.bootstrap_seed}, by {definition.cluster}",
    }
    return {name: value for name, value in facts.items() if value}


def _questions(definition: Definition) -> str:
    """How many, and which were left out."""
    told = f"{definition.n}{' (text only)' if definition.text_only else ''}"
    if definition.intersection:
        dropped = ", ".join(f"{arm} {count}" for arm, count in definition.dropped.items())
        told += f"; the intersection of the arms, left out: {dropped}"
    return told


def notes(task: TaskComparison) -> str:
    """What is to be known of the arms, a line a note, after the arms that it is about."""
    told: dict[str, list[str]] = {}
    for arm in task.arms:
        for note in (*arm.notes, *arm.leakage):
            told.setdefault(note, []).append(arm.name)
    return "\n".join(f"- {named(arms)}: {note}" for note, arms in told.items())


def named(arms: Sequence[str]) -> str:
    """Names as code."""
    return ", ".join(f"`{arm}`" for arm in arms)


def _setting(values: Setting) -> str:
    """The value that all arms share, or those that differ."""
    return " | ".join(values) or UNKNOWN


def _by_name(settings: Mapping[str, Setting]) -> str:
    """Each name with its setting."""
    return ", ".join(f"{k} {_setting(v)}" for k, v in settings.items()) or UNKNOWN
