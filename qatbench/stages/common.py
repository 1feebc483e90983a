"""What every stage shares: the progress callback and the timing of resumed work."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total); total 0 means: a step without a length."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
