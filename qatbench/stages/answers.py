"""The rows of one task as arrays: what each arm chose and how it scored the options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qatbench.records import Prediction
from qatbench.stages.arms import Arm, Run
from qatbench.stages.sheets import Sheet

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NO_LETTER = -1  # nothing was chosen: unparsed, or crashed


class Layout(NamedTuple):
    """The rows of a sheet in one order for every run: question by question, first pass first."""

    task: str
    keys: tuple[str, ...]  # the questions
    rows: tuple[Prediction, ...]  # of the first run, for what all runs share: ids, golds, meta
    question: Ints  # (rows,) place of each row's question in `keys`, rising
    gold: Ints  # (rows,) letters by place in `letters`
    letters: tuple[str, ...]

    @property
    def first(self) -> list[Prediction]:
        """The first row of each question."""
        return [self.rows[k] for k in np.searchsorted(self.question, np.arange(len(self.keys)))]


class Answers(NamedTuple):
    """What one arm answered, seed by seed."""

    seeds: tuple[int, ...]
    right: Ints  # (seeds, questions), 0 or 1
    chosen: Ints  # (seeds, rows) by place in `letters`, or NO_LETTER
    scores: Floats  # (seeds, rows, letters) nats; NaN where an option was not shown or not scored


class Lined(NamedTuple):
    """The answers of all arms to one task, row by row in one order."""

    layout: Layout
    by_name: dict[str, Answers]  # of each arm, in the order given


def lined(arms: Sequence[Arm], sheet: Sheet) -> Lined:
    """Line up what every arm of a sheet answered."""
    layout = lay_out(arms, sheet)
    return Lined(layout, {arm.name: answers(arm, sheet, layout) for arm in arms})


def lay_out(arms: Sequence[Arm], sheet: Sheet) -> Layout:
    """Fix the order of a sheet's rows; the sheet has made sure that all runs have the same."""
    runs = [run.units[sheet.task] for arm in arms for run in arm.runs]
    letters: set[str] = set()
    for units in runs:
        for key in sheet.keys:
            for row in units[key]:
                letters.update(row.scores or (), *filter(None, (row.gold, row.chosen)))
    codes = {letter: code for code, letter in enumerate(sorted(letters))}
    rows = tuple(row for key in sheet.keys for row in runs[0][key])
    sizes = [len(runs[0][key]) for key in sheet.keys]
    return Layout(
        task=sheet.task,
        keys=sheet.keys,
        rows=rows,
        question=np.repeat(np.arange(len(sizes)), sizes),
        gold=np.array([codes[str(row.gold)] for row in rows]),
        letters=tuple(codes),
    )


def answers(arm: Arm, sheet: Sheet, layout: Layout) -> Answers:
    """Line up what an arm answered with the layout's rows."""
    codes = {letter: code for code, letter in enumerate(layout.letters)}
    shape = (len(arm.runs), len(layout.rows))
    chosen = np.full(shape, NO_LETTER)
    scores = np.full((*shape, len(codes)), np.nan)
    for seed, run in enumerate(arm.runs):
        rows = _in_order(run, layout)
        chosen[seed] = [NO_LETTER if row.chosen is None else codes[row.chosen] for row in rows]
        scored = [(k, row.scores) for k, row in enumerate(rows) if row.scores]
        row_of = [k for k, options in scored for _ in options]
        letter_of = [codes[letter] for _, options in scored for letter in options]
        values = [value for _, options in scored for value in options.values()]
        scores[seed, row_of, letter_of] = values
    scores[~np.isfinite(scores)] = np.nan  # a score that overflowed says nothing
    return Answers(arm.seeds, sheet.scores[arm.name].right, chosen, scores)


def margins(scores: Floats, gold: Ints) -> Floats:
    """Score of the gold option minus the best other's, nats; NaN where either is missing.

    Shapes: scores (rows, letters); gold (rows,). Returns: (rows,).
    """
    place = np.arange(len(gold))
    others = np.where(np.isnan(scores), -np.inf, scores)
    others[place, gold] = -np.inf
    best = others.max(axis=1)
    return np.asarray(scores[place, gold] - np.where(np.isinf(best), np.nan, best))


def divergences(reference: Floats, arm: Floats) -> Floats:
    """KL(reference || arm) of the softmax over options, nats, of the rows scored in both.

    A row counts where both scored the same options. Shapes: (rows, letters) each.
    Returns: (rows that count,), at least 0.
    """
    shown = ~np.isnan(reference)
    counts = (np.isnan(arm) != shown).all(axis=1) & shown.any(axis=1)
    mine, theirs = _log_softmax(reference[counts]), _log_softmax(arm[counts])
    terms = np.where(shown[counts], np.exp(mine) * (mine - theirs), 0.0)
    return np.asarray(terms.sum(axis=1).clip(min=0.0))  # rounding alone goes below 0


def _log_softmax(scores: Floats) -> Floats:
    """Of the scores in each row, of which there is at least one; NaN stays NaN."""
    shifted = scores - np.nanmax(scores, axis=1, keepdims=True, initial=-np.inf)
    return np.asarray(shifted - np.log(np.nansum(np.exp(shifted), axis=1, keepdims=True)))


def _in_order(run: Run, layout: Layout) -> list[Prediction]:
    """Rows of a run in the layout's order."""
    units = run.units[layout.task]
    rows = [row for key in layout.keys for row in units[key]]
    wanted = [row.id for row in layout.rows]
    if [row.id for row in rows] != wanted:
        by_id = {row.id: row for row in rows}
        rows = [by_id[name] for name in wanted]
    return rows
