"""The noise floor: how much answers change though the weights kept their precision."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Literal

from qatbench.report.details import Noise
from qatbench.stages.answers import Lined
from qatbench.stages.arms import Arm, section


def noise(arms: Sequence[Arm], lined: Lined, full: Sequence[str]) -> tuple[Noise, ...]:
    """Evaluations of one model in two arms, then the seeds of each 16-bit arm (`full`) in pairs."""
    made = [_models(arm) for arm in arms]
    twice = [
        (one, other)
        for (i, one), (j, other) in combinations(enumerate(arms), 2)
        if made[i] and made[i] == made[j]
    ]
    seeds = [arm for arm in arms if arm.name in full and len(arm.seeds) > 1]
    told = []
    for one, other in twice:
        pairs = [(i, i) for i in range(len(one.runs))]
        told.append(_between("repeat", one, other, pairs, lined))
    for arm in seeds:
        pairs = list(combinations(range(len(arm.runs)), 2))
        told.append(_between("seeds", arm, arm, pairs, lined))
    return tuple(told)


def _between(
    kind: Literal["repeat", "seeds"],
    one: Arm,
    other: Arm,
    pairs: Sequence[tuple[int, int]],
    lined: Lined,
) -> Noise:
    mine, theirs = lined.by_name[one.name], lined.by_name[other.name]
    a, b = mine.right, theirs.right
    flips = fmean(int((a[i] != b[j]).sum()) for i, j in pairs)
    return Noise(
        kind=kind,
        arm=one.name,
        other=other.name,
        flips=flips,
        share=flips / len(lined.layout.keys),
        difference=fmean(abs(float(a[i].mean() - b[j].mean())) for i, j in pairs),
        same_answer=fmean(float((mine.chosen[i] == theirs.chosen[j]).mean()) for i, j in pairs),
    )


def _models(arm: Arm) -> tuple[str, ...]:
    """Fingerprints of the models that its seeds asked; () where one is not recorded."""
    stated = [section(section(run.provenance, "inputs"), "model") for run in arm.runs]
    known = [str(card["fingerprint"]) for card in stated if card.get("fingerprint")]
    return tuple(known) if len(known) == len(stated) else ()
