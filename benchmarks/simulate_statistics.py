"""Do the statistics keep their word? Simulated data sets whose truth is known.

coverage  how often a 95 % interval holds the true value: paired differences of clustered questions
          (1 to 4 a cluster, with rates of their own), and Wilson's of one score
false     the whole procedure with 10 arms (3 at 16 bits, 4 PTQ, 3 QAT; every arm against the
          baseline, the best QAT against the best PTQ, both kinds of p adjusted by Holm): how often
          any pair is called better or worse though no arm differs (2000 questions), and how often
          any arm is called equivalent to the baseline though all are worse by exactly the margin
          (4000: with half of them equivalence could hardly be found at all)

    python benchmarks/simulate_statistics.py [--sets 1000] [--draws 2000] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from kept import show
from numpy.typing import NDArray

from qatbench import stats
from qatbench.report.model import PairResult
from qatbench.stages.adjusted import holm_of, settled
from qatbench.stages.paired import LEVEL, Scores, pair_result

Right = NDArray[np.int64]
FULL, PTQ, QAT = 3, 4, 3  # arms; the first is the baseline
MARGIN = 0.02


def clustered(rng: np.random.Generator, groups: int, lost: float, gained: float) -> Any:
    """(a, b, clusters): rates of a cluster are drawn from Beta distributions of these means."""
    sizes = rng.integers(1, 5, groups)
    cluster = np.repeat(np.arange(groups), sizes)
    worse = rng.beta(lost * 4, (1 - lost) * 4, groups)[cluster]
    better = rng.beta(gained * 4, (1 - gained) * 4, groups)[cluster]
    right = rng.random(len(cluster)) < 0.7
    toss = rng.random(len(cluster))
    after = np.where(right, toss >= worse, toss < better)
    return after.astype(int), right.astype(int), cluster


DESIGNS = {  # clusters, mean rate of right -> wrong, of wrong -> right
    "400 clusters, 6 % differ": (400, 0.06, 0.06),
    "150 clusters, 15 % differ": (150, 0.15, 0.15),
    "400 clusters, 2 % lost, 1 % gained": (400, 0.02, 0.01),
    "1164 clusters, 10 % lost, 3 % gained": (1164, 0.10, 0.03),
}


def coverage(rng: np.random.Generator, sets: int, draws: int, say: Callable[[str], None]) -> Any:
    """Share of intervals that hold the truth, by design."""
    found: dict[str, float] = {}
    for name, (groups, lost, gained) in DESIGNS.items():
        say(name)
        truth = 0.3 * gained - 0.7 * lost
        held = 0
        for at in range(sets):
            a, b, cluster = clustered(rng, groups, lost, gained)
            got = stats.paired_bootstrap(a, b, cluster, draws=draws, level=LEVEL, seed=at)
            held += got.low <= truth <= got.high
        found[name] = held / sets
    say("Wilson")
    for n, share in ((2224, 0.7), (300, 0.95)):
        counts = rng.binomial(n, share, sets)
        held = sum(low <= share <= high for low, high in (stats.wilson(int(k), n) for k in counts))
        found[f"Wilson, {n} questions at {share:.0%}"] = held / sets
    return found


def arms(rng: np.random.Generator, questions: int, drop: float) -> list[Right]:
    """Correctness of each arm: all answer one world, flip at random, and lose `drop` on average.

    The first is the baseline, which loses nothing.
    """
    easy = rng.random(questions) < 0.7
    made = []
    for at in range(FULL + PTQ + QAT):
        lost = 0.05 + (drop / 0.7 if at else 0.0)
        toss = rng.random(questions)
        made.append(np.where(easy, toss >= lost, toss < 0.05 * 0.7 / 0.3).astype(np.int64))
    return made


def procedure(right: list[Right], draws: int, seed: int) -> list[PairResult]:
    """Every pair as a comparison states it: against the baseline, then the contest."""
    scores = [Scores(f"arm{k}", (0,), row[None]) for k, row in enumerate(right)]
    ptq = max(range(FULL, FULL + PTQ), key=lambda k: right[k].sum())
    qat = max(range(FULL + PTQ, len(right)), key=lambda k: right[k].sum())
    names = [(k, 0) for k in range(1, len(right))] + [(qat, ptq)]
    pairs = [pair_result(scores[a], scores[b], margin=MARGIN, draws=draws, seed=seed)
             for a, b in names]  # fmt: skip
    keys = [(0, frozenset((pair.arm, pair.reference))) for pair in pairs]
    families = holm_of(zip(keys, pairs, strict=True))
    return [settled(pair, families, key, LEVEL) for key, pair in zip(keys, pairs, strict=True)]


class Scenario(NamedTuple):
    """Arms of which all but the baseline lose `drop`, and the verdicts that are wrong then."""

    questions: int
    drop: float
    wrong: tuple[str, ...]


FALSE = {
    "any pair called better or worse": Scenario(2000, 0.0, ("better", "worse")),
    "any arm called equivalent to the baseline": Scenario(4000, MARGIN, ("equivalent",)),
}


def false(rng: np.random.Generator, sets: int, draws: int, say: Callable[[str], None]) -> Any:
    """Share of comparisons with any wrong verdict."""
    found: dict[str, Any] = {"margin": MARGIN}
    for kind, (questions, drop, wrong) in FALSE.items():
        say(kind)
        count = 0
        for at in range(sets):
            pairs = procedure(arms(rng, questions, drop), draws, at)
            told = pairs if drop == 0 else [pair for pair in pairs if pair.reference == "arm0"]
            count += any(pair.verdict in wrong for pair in told)
        low, high = stats.wilson(count, sets)
        found[kind] = {
            "questions": questions,
            "share": count / sets,
            "interval": [round(low, 4), round(high, 4)],
        }
    return found


def main() -> None:
    """Simulate and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", type=int, default=1000, help="simulated data sets of each kind")
    parser.add_argument("--draws", type=int, default=2000, help="of each bootstrap")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {what}", file=sys.stderr, flush=True)

    rng = np.random.default_rng(given.seed)
    found = {"sets": given.sets, "draws": given.draws, "seed": given.seed}
    found["coverage"] = coverage(rng, given.sets, given.draws, say)
    found["false"] = false(rng, given.sets, given.draws, say)
    show(found, given.json)


if __name__ == "__main__":
    main()
