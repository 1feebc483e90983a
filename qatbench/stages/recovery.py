"""What share of PTQ's loss training on the grid won back, a grid each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qatbench import stats
from qatbench.report.details import Recovery
from qatbench.report.model import ArmResult, TaskComparison
from qatbench.stages.paired import LEVEL, Scores


def recoveries(
    task: TaskComparison,
    scores: Mapping[str, Scores],
    baseline: str,
    *,
    clusters: Sequence[str] | None,
    draws: int,
    seed: int,
) -> tuple[Recovery, ...]:
    """(QAT - PTQ) / (16 bit - PTQ) of every contest; none without a 16-bit arm.

    The 16-bit arm is the baseline if it is one, else the most accurate. Correctness is averaged
    over seeds first.
    """
    full = _full(task, baseline)
    if full is None:
        return ()
    told = []
    for contest in task.contests:
        arms = (contest.arm, contest.reference, full.name)
        qat, ptq, top = (scores[name].right.mean(axis=0) for name in arms)
        found = stats.recovery(qat, ptq, top, clusters, draws=draws, level=LEVEL, seed=seed)
        withheld = None
        if found.share is None:
            withheld = _reason(found)
        told.append(
            Recovery(
                arm=contest.arm,
                ptq=contest.reference,
                full=full.name,
                grid=task.arm(contest.arm).grid,
                share=found.share,
                low=found.low,
                high=found.high,
                withheld=withheld,
            )
        )
    return tuple(told)


def _reason(found: stats.RecoveredShare) -> str:
    """Why there is no share: nothing is shown to be lost, or too little to divide by."""
    loss, low, high = (100 * part for part in (found.loss, found.loss_low, found.loss_high))
    what = "PTQ's loss is too close to 0 to divide by" if low > 0 else "PTQ is not shown to lose"
    return f"{what}: {loss:+.1f} [{low:+.1f}, {high:+.1f}] points"


def _full(task: TaskComparison, baseline: str) -> ArmResult | None:
    first = task.arm(baseline)
    return first if first.family == "16-bit" else task.best("16-bit")
