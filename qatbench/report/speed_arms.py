"""Speeds of the arms of a comparison, in a table and a line."""

from __future__ import annotations

from qatbench.report.model import TaskComparison
from qatbench.report.speed_model import cases, memory
from qatbench.report.tables import UNKNOWN, Row, megabytes, rate, spread


def arm_speed_rows(task: TaskComparison) -> list[Row]:
    """One row an arm, engine and batch, all at the context that is shown; none without speeds."""
    known = cases(task.arms)
    rows = []
    for case in [case for case in known if case.context == known[0].context]:
        for arm in task.arms:
            row = arm.speed.row(case) if arm.speed else None
            if row is None:
                continue
            held, how = memory(row)
            first = row.first_token_seconds
            rows.append(
                {
                    "arm": arm.name,
                    "engine": row.engine,
                    "kernel": row.kernel,
                    "batch": str(row.batch),
                    "decode tok/s": spread(row.decode_tokens_per_second),
                    "prefill tok/s": rate(row.prefill_tokens_per_second),
                    "first ms": UNKNOWN if first is None else f"{1000 * first.median:.3g}",
                    "memory MB": megabytes(held),
                    "memory is": how,
                }
            )
    return rows


def about(task: TaskComparison) -> str:
    """How the speeds were measured, and whose were not; "" without any."""
    known = cases(task.arms)
    if not known:
        return ""
    case = known[0]
    measured = next(arm.speed for arm in task.arms if arm.speed)
    turns = "in turns" if measured.in_turns else "one after the other"
    missing = [f"`{arm.name}`" for arm in task.arms if arm.speed is None]
    told = (
        f"`qatbench speed` on {case.on}, {case.dtype}: prompts of {case.context} tokens, median of"
        f" {measured.repeats} repeats {turns} [least, most]."
    )
    return told + (f" Not measured: {', '.join(missing)}." if missing else "")
