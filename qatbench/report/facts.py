"""The definition of a comparison in words: what another needs to measure the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qatbench.report.model import Setting, TaskComparison
from qatbench.report.tables import UNKNOWN
from qatbench.report.verdict import margin_words


def definition_facts(task: TaskComparison, baseline: str) -> dict[str, str]:
    """Name -> value, with `code` around what is a name."""
    definition = task.definition
    searched = [arm.name for arm in task.arms if arm.leakage]
    questions = f"{definition.n}{' (text only)' if definition.text_only else ''}"
    if definition.intersection:
        dropped = ", ".join(f"{arm} {count}" for arm, count in definition.dropped.items())
        questions += f"; the intersection of the arms, left out: {dropped}"
    facts = {
        "recipe": f"`{definition.recipe}`" if definition.recipe else "",
        "model": ", ".join(f"`{name}`" for name in definition.model),
        "baseline": f"`{baseline}`",
        "questions": questions,
        "images": "" if definition.images == ("shown",) else _setting(definition.images),
        "data, SHA-256": _by_name(definition.data),
        "leakage": f"searched for: {_named(searched)}" if searched else "",
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


def _named(arms: Sequence[str]) -> str:
    return ", ".join(f"`{arm}`" for arm in arms)


def _setting(values: Setting) -> str:
    return " | ".join(values) or UNKNOWN


def _by_name(settings: Mapping[str, Setting]) -> str:
    return ", ".join(f"{k} {_setting(v)}" for k, v in settings.items()) or UNKNOWN
