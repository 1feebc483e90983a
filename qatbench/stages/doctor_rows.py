"""doctor: one check is one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Row:
    """What was looked at, what was found, and the command that fixes it."""

    check: str
    state: State
    found: str
    fix: str = ""


def gb(size: float) -> str:
    """Bytes as GB of 1e9 bytes."""
    return f"{size / 1e9:.1f} GB"
