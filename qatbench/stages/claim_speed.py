"""Claims about bytes and speed: from checkpoints on disk, and from what `qatbench speed` measured.

Both compare an arm with its 16-bit arm in one engine, at the smallest batch and context measured;
the engine is the one in which the arm decodes fastest. What was not measured is not testable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qatbench.records_speed import SpeedRow
from qatbench.report import tables
from qatbench.report.details import ClaimVerdict
from qatbench.report.model import ArmResult, TaskComparison
from qatbench.report.speed_model import SpeedCase, cases, memory
from qatbench.stages.claim_findings import NOT_TESTABLE, Finding, best_of, fitting, source_of
from qatbench.stages.claim_rules import MemoryTest, SpeedTest

_SIXTEEN = ("bfloat16", "float16")


class _Meeting(NamedTuple):
    """An arm and its 16-bit arm, in one case."""

    arm: ArmResult
    reference: ArmResult
    case: SpeedCase
    mine: SpeedRow
    theirs: SpeedRow

    @property
    def ratio(self) -> float:
        """Decoding, of medians."""
        assert self.mine.decode_tokens_per_second
        assert self.theirs.decode_tokens_per_second
        return self.mine.decode_tokens_per_second.median / (
            self.theirs.decode_tokens_per_second.median
        )


def speed_finding(task: TaskComparison, test: SpeedTest) -> Finding:
    """Decoding at batch 1: the arm over its 16-bit arm."""
    if not any(arm.speed for arm in task.arms):
        unknown = "it is about decoding, and no speed was measured (compare --speed)"
        return Finding(NOT_TESTABLE, "", unknown)
    arms, references = fitting(task, test.arm), fitting(task, test.reference)
    for wanted, some in ((test.arm, arms), (test.reference, references)):
        if not any(arm.speed for arm in some):
            return Finding(NOT_TESTABLE, "", f"no {wanted.words()} whose speed was measured")
    found = _meetings(task, arms, references)
    if not found or found[0].case.batch != 1:
        return Finding(NOT_TESTABLE, "", "the two were not measured in one engine at batch 1")
    first, *others = found
    here = _told(first) + "".join(f"; engine {m.case.engine}: {m.ratio:.2f} x" for m in others)
    if (why := _not_sixteen(first)) is not None:
        return Finding(NOT_TESTABLE, here, why)
    most = _most(first)
    if most is not None and most < test.expect_at_least:
        reason = f"by the bytes that a step must move, this model's shape allows {most:.1f} x"
        return Finding(NOT_TESTABLE, here, f"{reason} at most")
    low, high = _ends(first)
    verdict = faster(low, high, test.expect_at_least)
    limits = f"between {low:.2f} and {high:.2f} over the repeats"
    return Finding(verdict, here, f"{first.ratio:.2f} x, {limits}, on {first.case.on}")


def memory_finding(task: TaskComparison, test: MemoryTest) -> Finding:
    """Bytes: in use where they were measured, else of the checkpoints."""
    arms, references = fitting(task, test.arm), fitting(task, test.reference)
    for wanted, some in ((test.arm, arms), (test.reference, references)):
        if not some:
            return Finding(NOT_TESTABLE, "", f"no {wanted.words()} here")
    arm, reference = best_of(arms), references[0]
    small, large = arm.checkpoint_bytes, reference.checkpoint_bytes
    if small is None or not large:
        return Finding(NOT_TESTABLE, "", "the size of a checkpoint is not recorded")
    saved = 1 - small / large
    here = (
        f"`{arm.name}` {tables.megabytes(small)} MB against `{reference.name}`"
        f" {tables.megabytes(large)} MB: {-100 * saved:.0f} %, checkpoints on disk"
    )
    most = _most_saved(arm, reference, saved)
    reason = "by the weights; memory in use was not measured"
    if used := _in_use(task, arms, references):
        saved, told, reason = used
        here += f"; {told}"
    if most is not None and most < test.expect_at_least:
        reason = (
            f"this model's shape allows {100 * most:.0f} % at most, at {arm.bits} bits with free"
            " scales: the rest of its bytes is not quantized"
        )
        return Finding(NOT_TESTABLE, here, reason)
    return Finding(smaller(saved, test.expect_at_least), here, reason)


def faster(low: float, high: float, asked: float) -> ClaimVerdict:
    """Whether a ratio that its repeats leave between two ends is the one that was published."""
    if round(low, 1) >= asked:
        return "reproduced"
    return "contradicted" if round(high, 1) < asked else "undecided"


def smaller(saved: float, asked: float) -> ClaimVerdict:
    """Whether a share of memory saved is the published one, which is rounded, too."""
    return "reproduced" if round(saved, 2) >= asked else "contradicted"


def _in_use(
    task: TaskComparison, arms: Sequence[ArmResult], references: Sequence[ArmResult]
) -> tuple[float, str, str] | None:
    """Share saved of the memory in use, the figures in words, and how they are known."""
    for meeting in _meetings(task, arms, references)[:1]:
        (mine, how), (theirs, other) = memory(meeting.mine), memory(meeting.theirs)
        if mine is None or not theirs or how != other or _not_sixteen(meeting) is not None:
            return None
        saved = 1 - mine / theirs
        told = (
            f"`{meeting.arm.name}` {mine / 1e9:.3g} GB against `{meeting.reference.name}`"
            f" {theirs / 1e9:.3g} GB: {-100 * saved:.0f} % in use ({meeting.case.words()})"
        )
        return saved, told, f"by the memory in use: {how}, on {meeting.case.on}"
    return None


def _most_saved(arm: ArmResult, reference: ArmResult, saved: float) -> float | None:
    """What a grid without scales would save: the quantized share follows from what was saved."""
    mine, theirs = arm.bits_per_weight, reference.bits_per_weight
    if not (arm.bits and mine and theirs) or mine >= theirs or saved <= 0:
        return None
    return saved / (1 - mine / theirs) * (1 - arm.bits / theirs)


# --- who meets whom -----------------------------------------------------------------------------


def _meetings(
    task: TaskComparison, arms: Sequence[ArmResult], references: Sequence[ArmResult]
) -> list[_Meeting]:
    """The best measured arm and its 16-bit arm, an engine each; where it decodes fastest first."""
    measured = [arm for arm in arms if arm.speed]
    others = [arm for arm in references if arm.speed]
    if not measured or not others:
        return []
    arm = best_of(measured)
    made_from = source_of(task, arm)
    reference = next((other for other in others if other.name == made_from), best_of(others))
    found = []
    for case in cases([arm, reference]):
        mine = arm.speed.row(case) if arm.speed else None
        theirs = reference.speed.row(case) if reference.speed else None
        if mine is not None and theirs is not None:
            found.append(_Meeting(arm, reference, case, mine, theirs))
    if not found:
        return []
    least = min((meeting.case.batch, meeting.case.context) for meeting in found)
    same = [m for m in found if (m.case.batch, m.case.context) == least]
    return sorted(same, key=lambda m: -_rate(m.mine))


def _rate(row: SpeedRow) -> float:
    return row.decode_tokens_per_second.median if row.decode_tokens_per_second else 0.0


def _told(meeting: _Meeting) -> str:
    mine, theirs = _rate(meeting.mine), _rate(meeting.theirs)
    return (
        f"`{meeting.arm.name}` {tables.figure(mine)} tokens/s against `{meeting.reference.name}`"
        f" {tables.figure(theirs)}: {meeting.ratio:.2f} x ({meeting.case.words()})"
    )


def _ends(meeting: _Meeting) -> tuple[float, float]:
    """Least and most that the repeats allow the ratio to be."""
    mine, theirs = meeting.mine.decode_tokens_per_second, meeting.theirs.decode_tokens_per_second
    assert mine
    assert theirs
    return mine.low / theirs.high, mine.high / theirs.low


def _not_sixteen(meeting: _Meeting) -> str | None:
    """Why the reference was no 16-bit model when it was measured; None if it was."""
    if meeting.theirs.dtype in _SIXTEEN:
        return None
    return f"the 16-bit arm was measured in {meeting.theirs.dtype}: measure with --dtype bfloat16"


def _most(meeting: _Meeting) -> float | None:
    """The ratio that the bytes of a step allow."""
    mine, theirs = meeting.mine.moved_bytes, meeting.theirs.moved_bytes
    return theirs / mine if mine and theirs else None
