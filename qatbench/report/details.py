"""Parts of comparison.json beside the scores: what changed, recovery, noise floor, claims.

As in `model`: fractions, nats, bytes; nothing a report has to work out again. What may not be
passed on stays out: a question is its id, an answer its letter.
"""

from __future__ import annotations

from typing import Literal

from qatbench.records import Record

ClaimVerdict = Literal["reproduced", "contradicted", "undecided", "not testable here"]


class GroupChange(Record):
    """Arm minus reference on the questions of one group."""

    kind: str  # subject, category, l2_category, context
    name: str
    n: int  # questions
    accuracy: float  # of the arm, mean over seeds
    reference_accuracy: float
    difference: float
    low: float | None  # 95 % percentile bootstrap, as of the pair; None below two questions
    high: float | None
    lost: float  # mean over pairs of seeds
    gained: float


class Divergence(Record):
    """KL(reference || arm) of the distributions over options, nats, rows of all seed pairs.

    Scores are mean log-probabilities of a token; a distribution is their softmax.
    """

    mean: float
    median: float
    p95: float
    p99: float
    largest: float


class Flip(Record):
    """A question that one of two arms got right; of several seeds the first pair."""

    id: str  # of the row that flipped: of a circular question the first
    question: str  # what is counted: the group's name, or the id
    gold: str
    chosen: str | None  # by the arm
    reference_chosen: str | None
    margin: float | None  # nats: the gold option's score minus the best other's, of the arm
    reference_margin: float | None
    has_image: bool | None
    groups: dict[str, str]  # kind -> name, as in GroupChange


class Changes(Record):
    """What changed from a reference to an arm, question by question; means over seed pairs."""

    arm: str
    reference: str
    both_right: float  # questions
    both_wrong: float
    lost: float  # right before, wrong after
    gained: float
    rows: int  # of one pair of seeds
    same_answer: float  # share of rows that chose the same letter (or neither did)
    wrong_changed: float  # rows wrong in both, answered differently
    divergence: Divergence | None  # None where no option scores were kept
    lost_margin: float | None  # median margin of the lost questions before: how near they were
    gained_margin: float | None  # median margin of the gained questions after
    groups: tuple[GroupChange, ...]
    flips: tuple[Flip, ...] = ()  # of the pairs that the verdict is about; the widest first
    flips_left_out: int = 0


class Agreement(Record):
    """Share of rows on which two arms chose the same letter, mean over seed pairs."""

    arms: tuple[str, ...]
    share: tuple[tuple[float, ...], ...]  # (arms, arms); between seeds on the diagonal, 1 with one


class Recovery(Record):
    """How much of what PTQ lost came back: (QAT - PTQ) / (full - PTQ), one grid."""

    arm: str  # QAT
    ptq: str
    full: str  # the 16-bit arm
    grid: str
    share: float | None  # None where it is withheld
    low: float | None
    high: float | None
    withheld: str | None  # why: the interval of full - PTQ holds 0


class Noise(Record):
    """How much answers change although nothing was done to the weights' precision.

    `repeat`: two arms of one and the same model, evaluated in two ways. `seeds`: the seeds of one
    16-bit arm, in pairs. Differences of the size of its flips say nothing about quantization.
    """

    kind: Literal["repeat", "seeds"]
    arm: str
    other: str  # the second arm, or the arm itself
    flips: float  # questions right in one and wrong in the other, mean over pairs
    share: float  # of the questions
    difference: float  # points between them, mean absolute, a fraction
    same_answer: float  # share of rows


class Claim(Record):
    """A published claim and what this comparison says of it."""

    id: str
    claim: str
    source: str
    published: str  # its figures
    verdict: ClaimVerdict
    here: str  # our figures, or the nearest thing that was measured; "" without any
    reason: str  # why this verdict
