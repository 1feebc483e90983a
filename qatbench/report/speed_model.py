"""What a comparison holds of `qatbench speed`: an arm's rows, and which of them a report shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from qatbench.records import Record
from qatbench.records_speed import SpeedRow

if TYPE_CHECKING:
    from qatbench.report.model import ArmResult


class ArmSpeed(Record):
    """An arm's speed, measured by `qatbench speed` in one run with those of the other arms."""

    seed: int  # whose checkpoint was measured
    device: str
    on: str  # the GPU's name, or the device
    repeats: int
    warm_up: int
    in_turns: bool
    rows: tuple[SpeedRow, ...]

    def row(self, case: SpeedCase) -> SpeedRow | None:
        """The row of a case; None if it was not measured, or has no figures."""
        for row in self.rows:
            if case.is_of(row) and row.decode_tokens_per_second is not None:
                return row
        return None


class SpeedCase(NamedTuple):
    """What is the same for all arms where their speeds stand side by side."""

    engine: str
    batch: int
    context: int
    dtype: str
    on: str

    def is_of(self, row: SpeedRow) -> bool:
        """Whether a row was measured so."""
        return (row.engine, row.batch, row.context) == (self.engine, self.batch, self.context)

    def words(self) -> str:
        """Say it in a line."""
        return (
            f"batch {self.batch}, context {self.context}, engine {self.engine}, {self.dtype},"
            f" {self.on}"
        )


def cases(arms: Sequence[ArmResult]) -> list[SpeedCase]:
    """All cases that any of these arms has figures of; the one to show comes first.

    That is the smallest batch, its shortest context, and there the engine that most arms ran in;
    of engines alike in this the one that decoded fastest.
    """
    found: dict[SpeedCase, list[float]] = {}
    for arm in arms:
        for row in arm.speed.rows if arm.speed else ():
            if arm.speed and row.decode_tokens_per_second is not None:
                case = SpeedCase(row.engine, row.batch, row.context, row.dtype, arm.speed.on)
                found.setdefault(case, []).append(row.decode_tokens_per_second.median)
    return sorted(found, key=lambda c: (c.batch, c.context, -len(found[c]), -max(found[c])))


def memory(row: SpeedRow) -> tuple[int | None, str]:
    """Bytes in use of a row, and how they are known."""
    if row.peak_bytes is not None:
        return row.peak_bytes, "peak"
    if row.weight_bytes is None or row.cache_bytes is None:
        return None, "not measured"
    return row.weight_bytes + row.cache_bytes, "weights and cache, counted"
