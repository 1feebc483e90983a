"""What changed from one arm to another: flips, other answers, distributions, margins, by group."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qatbench.report.details import Agreement, Changes, Divergence, Flip, GroupChange
from qatbench.stages.answers import (
    NO_LETTER,
    Answers,
    Floats,
    Ints,
    Layout,
    Lined,
    divergences,
    margins,
)
from qatbench.stages.groups import Group, Interval, groups_of, intervals
from qatbench.stages.paired import LEVEL, partners

_FLIPS_SHOWN = 24  # each way


class _Flips(NamedTuple):
    """Questions that went wrong, or came right, between two seeds."""

    questions: Ints  # places, rising
    rows: Ints  # of each question the first row that flipped
    before: Floats  # margins of those rows, nats
    after: Floats


class _SeedPair(NamedTuple):
    """One seed of an arm against one of its reference."""

    both_right: int  # questions, as the next
    both_wrong: int
    flipped: Ints  # (questions,) -1 lost, 1 gained, 0 neither
    lost: _Flips
    gained: _Flips
    same_answer: float
    wrong_changed: int
    divergences: Floats  # (rows scored in both,)
    chosen: Ints  # (rows,)
    reference_chosen: Ints


def changes(
    lined: Lined,
    pairs: Sequence[tuple[str, str]],
    *,
    shown: Collection[tuple[str, str]] = (),
    draws: int,
    seed: int,
    level: float = LEVEL,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[Changes, ...]:
    """Say what changed from the reference to the arm of every pair (arm, reference).

    Seeds are paired as in `paired`; a pair of arms without a pair of seeds is left out. Groups are
    read from the first row of each question; their intervals are percentiles of the bootstrap over
    questions, as those of pairs.

    Args:
        lined: what the arms answered to one task.
        pairs: names; a pair that is named twice is told once.
        shown: pairs whose flipped questions are listed, at most 24 each way, the widest first.
        draws: of the bootstrap where questions share clusters; else its distribution is exact.
        seed: of those draws.
        level: of the intervals.
        clusters: of each question what it is drawn with; None: each alone.

    """
    layout, by_name = lined
    groups = groups_of(layout.first)
    interval = intervals(draws, seed, level, clusters)
    found = []
    for pair in dict.fromkeys(pairs):
        arm, reference = by_name[pair[0]], by_name[pair[1]]
        seeds = [
            _seed_pair(layout, arm, reference, i, j)
            for i, j in partners(arm.seeds, reference.seeds)
        ]
        if not seeds:
            continue
        told = tuple(_group(g, arm, reference, seeds, interval) for g in groups)
        change = _changes(pair, layout, seeds).model_copy(update={"groups": told})
        if pair in shown:
            flips, left_out = _flips(layout, seeds[0], groups)
            change = change.model_copy(update={"flips": flips, "flips_left_out": left_out})
        found.append(change)
    return tuple(found)


def agreement(lined: Lined) -> Agreement:
    """Share of rows on which two arms chose the same letter; no letter agrees with no letter.

    A mean over pairs of seeds, equal ones where there are any, else each with each; on the
    diagonal over the pairs of an arm's own seeds, 1.0 with one.
    """
    arms = list(lined.by_name.values())

    def share(a: int, b: int) -> float:
        mine, other = arms[a], arms[b]
        if a == b:
            places = [(i, j) for j in range(len(mine.seeds)) for i in range(j)]
        else:
            places = partners(mine.seeds, other.seeds) or [
                (i, j) for i in range(len(mine.seeds)) for j in range(len(other.seeds))
            ]
        if not places:
            return 1.0
        return float(np.mean([np.mean(mine.chosen[i] == other.chosen[j]) for i, j in places]))

    size = range(len(arms))
    return Agreement(
        arms=tuple(lined.by_name),
        share=tuple(tuple(share(min(a, b), max(a, b)) for b in size) for a in size),
    )


def _seed_pair(layout: Layout, arm: Answers, reference: Answers, i: int, j: int) -> _SeedPair:
    chosen, reference_chosen = arm.chosen[i], reference.chosen[j]
    good, reference_good = chosen == layout.gold, reference_chosen == layout.gold
    right, reference_right = arm.right[i], reference.right[j]
    flipped = right - reference_right
    before, after = margins(reference.scores[j], layout.gold), margins(arm.scores[i], layout.gold)

    def flips(questions: NDArray[np.bool_], rows: NDArray[np.bool_]) -> _Flips:
        flipped = np.flatnonzero(questions[layout.question] & rows)
        places, first = np.unique(layout.question[flipped], return_index=True)
        picked = flipped[first]
        return _Flips(places, picked, before[picked], after[picked])

    return _SeedPair(
        both_right=int(np.sum(right & reference_right)),
        both_wrong=int(np.sum(1 - (right | reference_right))),
        flipped=flipped,
        lost=flips(flipped < 0, ~good),
        gained=flips(flipped > 0, ~reference_good),
        same_answer=float(np.mean(chosen == reference_chosen)),
        wrong_changed=int(np.sum(~good & ~reference_good & (chosen != reference_chosen))),
        divergences=divergences(reference.scores[j], arm.scores[i]),
        chosen=chosen,
        reference_chosen=reference_chosen,
    )


def _changes(pair: tuple[str, str], layout: Layout, seeds: list[_SeedPair]) -> Changes:
    """Everything but groups and flips."""
    arm, reference = pair
    return Changes(
        arm=arm,
        reference=reference,
        both_right=float(np.mean([seed.both_right for seed in seeds])),
        both_wrong=float(np.mean([seed.both_wrong for seed in seeds])),
        lost=float(np.mean([len(seed.lost.questions) for seed in seeds])),
        gained=float(np.mean([len(seed.gained.questions) for seed in seeds])),
        rows=len(layout.rows),
        same_answer=float(np.mean([seed.same_answer for seed in seeds])),
        wrong_changed=float(np.mean([seed.wrong_changed for seed in seeds])),
        divergence=_divergence(np.concatenate([seed.divergences for seed in seeds])),
        lost_margin=_median(np.concatenate([seed.lost.before for seed in seeds])),
        gained_margin=_median(np.concatenate([seed.gained.after for seed in seeds])),
        groups=(),
    )


def _divergence(values: Floats) -> Divergence | None:
    if len(values) == 0:
        return None
    median, p95, p99 = np.quantile(values, (0.5, 0.95, 0.99)).tolist()
    largest = float(values.max())
    return Divergence(mean=float(values.mean()), median=median, p95=p95, p99=p99, largest=largest)


def _median(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else None


def _group(
    group: Group,
    arm: Answers,
    reference: Answers,
    seeds: list[_SeedPair],
    interval: Interval,
) -> GroupChange:
    places = group.places
    a, b = arm.right[:, places], reference.right[:, places]
    denominator = len(a) * len(b)  # one for both means, so that equal differences are equal
    numerators = a.sum(axis=0) * len(b) - b.sum(axis=0) * len(a)
    low, high = interval(numerators, places, denominator)
    return GroupChange(
        kind=group.kind,
        name=group.name,
        n=len(places),
        accuracy=float(a.mean()),
        reference_accuracy=float(b.mean()),
        difference=float(numerators.mean()) / denominator,
        low=low,
        high=high,
        lost=float(np.mean([np.sum(seed.flipped[places] < 0) for seed in seeds])),
        gained=float(np.mean([np.sum(seed.flipped[places] > 0) for seed in seeds])),
    )


def _flips(
    layout: Layout, seeds: _SeedPair, groups: Sequence[Group]
) -> tuple[tuple[Flip, ...], int]:
    """The questions lost by the widest fall of the margin, then those gained by the widest rise.

    Those whose margin is not known come last, by id. Returns: the flips, and how many more exist.
    """
    named: dict[int, dict[str, str]] = {}
    for group in groups:
        for place in group.places.tolist():
            named.setdefault(place, {})[group.kind] = group.name
    listed: list[Flip] = []
    for flips in (seeds.lost, seeds.gained):
        width = np.abs(flips.after - flips.before)
        order = np.argsort(-width, kind="stable")  # NaN last; questions are in the order of ids
        listed += [
            _flip(layout, seeds, flips, k, named.get(int(flips.questions[k]), {}))
            for k in order[:_FLIPS_SHOWN].tolist()
        ]
    everything = len(seeds.lost.questions) + len(seeds.gained.questions)
    return tuple(listed), everything - len(listed)


def _flip(layout: Layout, seeds: _SeedPair, flips: _Flips, k: int, groups: dict[str, str]) -> Flip:
    row, question = int(flips.rows[k]), int(flips.questions[k])
    prediction = layout.rows[row]
    image = prediction.meta.get("has_image")

    def letter(code: int) -> str | None:
        return None if code == NO_LETTER else layout.letters[code]

    def known(margin: float) -> float | None:
        return None if np.isnan(margin) else float(margin)

    return Flip(
        id=prediction.id,
        question=layout.keys[question],
        gold=layout.letters[int(layout.gold[row])],
        chosen=letter(int(seeds.chosen[row])),
        reference_chosen=letter(int(seeds.reference_chosen[row])),
        margin=known(flips.after[k]),
        reference_margin=known(flips.before[k]),
        has_image=None if image is None else bool(image),
        groups=groups,
    )
