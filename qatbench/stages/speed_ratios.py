"""Rows of a speed measurement beside each other: ratios of their medians."""

from __future__ import annotations

from collections.abc import Sequence

from qatbench.records_speed import SpeedRow, Spread

PLAIN = "transformers"


def with_ratios(rows: Sequence[SpeedRow], first: str) -> tuple[SpeedRow, ...]:
    """Add what each row is of the model `first` in its engine, and of its model in plain one.

    Both at the same batch and context; nothing where either was not measured.
    """
    known = {(row.model, row.engine, row.batch, row.context): row for row in rows}
    return tuple(
        row.model_copy(
            update=_ratios(row, known.get((first, row.engine, row.batch, row.context)), "first")
            | _ratios(row, known.get((row.model, PLAIN, row.batch, row.context)), "plain")
        )
        for row in rows
    )


def _ratios(row: SpeedRow, reference: SpeedRow | None, name: str) -> dict[str, float | None]:
    if reference is None:
        return {}
    return {
        f"decode_to_{name}": _ratio(
            row.decode_tokens_per_second, reference.decode_tokens_per_second
        ),
        f"prefill_to_{name}": _ratio(
            row.prefill_tokens_per_second, reference.prefill_tokens_per_second
        ),
    }


def _ratio(mine: Spread | None, theirs: Spread | None) -> float | None:
    return None if mine is None or theirs is None else mine.median / theirs.median
