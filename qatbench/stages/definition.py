"""What was measured, in words that let another measure the same: the definition of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qatbench.report.model import Definition, Setting
from qatbench.stages.arms import Arm, Run, section
from qatbench.stages.paired import LEVEL
from qatbench.stages.sheets import Sheet


def definition(
    arms: Sequence[Arm],
    sheet: Sheet,
    *,
    margin: float,
    intersection: bool,
    draws: int,
    seed: int,
    recipe: str | None,
) -> Definition:
    """Everything that the runs state about how they came about; the Holm families are not known."""
    runs = [run for arm in arms for run in arm.runs]
    metrics = [run.metrics[sheet.task] for run in runs]
    data = [section(section(run.provenance, "inputs"), "data") for run in runs]
    mine = [
        {key: digest for key, digest in digests.items() if f"{key}:".startswith(f"{sheet.task}:")}
        for digests in data
    ]
    rows = [row for run in runs for key in sheet.keys for row in run.units[sheet.task][key]]
    pictured = {row.meta.get("has_image") for row in rows}
    images = _distinct(section(run.provenance, "spec").get("images", "shown") for run in runs)
    text_only = False if True in pictured else True if pictured == {False} else None
    recipes = [text(_stated(run, "recipe")) for run in runs]
    return Definition(
        task=sheet.task,
        protocol=_distinct(metric.protocol for metric in metrics),
        mode=_distinct(metric.mode for metric in metrics),
        n=len(sheet.keys),
        dropped=sheet.dropped,
        intersection=intersection,
        text_only=text_only if images == ("shown",) else None,
        images=images,
        data=_distinct_by_key(mine),
        prompt_form=_distinct(_stated(run, "prompt_form") for run in runs),
        dtype=_distinct(_stated(run, "dtype") for run in runs),
        device=_distinct(_stated(run, "device") for run in runs),
        batch=_distinct(_stated(run, "batch_size", "batch") for run in runs),
        versions=_distinct_by_key([section(run.provenance, "versions") for run in runs]),
        seeds={arm.name: arm.seeds for arm in arms},
        margin=margin,
        level=LEVEL,
        bootstrap_draws=draws,
        bootstrap_seed=seed,
        family_size=0,
        recipe=recipe or next(filter(None, recipes), None),
        kernel=_distinct(_stated(run, "kernel") for run in runs),
        model=_models(arms),
        cluster=sheet.clustered_by,
    )


def _stated(run: Run, *names: str) -> object:
    """Find a setting: what was found out (figures) before what was asked for (spec)."""
    parts = [section(run.provenance, part) for part in ("figures", "spec", "machine")]
    return next((part[key] for part in parts for key in names if part.get(key) is not None), None)


def text(value: object) -> str | None:
    """A recorded value as text; None where there is none."""
    return None if value is None else str(value)


def _distinct(values: Iterable[object]) -> Setting:
    return tuple(dict.fromkeys(str(value) for value in values if value is not None))


def _distinct_by_key(mappings: list[dict[str, Any]]) -> dict[str, Setting]:
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    return {key: _distinct(mapping.get(key) for mapping in mappings) for key in keys}


def _models(arms: Sequence[Arm]) -> Setting:
    """Names of the models that nothing was done to."""
    untouched = [run for arm in arms for run in arm.runs if not run.checkpoint]
    stated = [section(section(run.provenance, "inputs"), "model") for run in untouched]
    return _distinct(card.get("name") for card in stated if card.get("method") in (None, "base"))
