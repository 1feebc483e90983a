"""LLaVA-style conversations as training data."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from qatbench.records import Record


class Turn(Record):
    """What is asked and what is answered; the answer is supervised."""

    asked: str
    answered: str


class Conversation(Record):
    """One training sample of several turns; images come before the first question."""

    id: str
    turns: tuple[Turn, ...] = Field(min_length=1)
    images: tuple[Path, ...] = ()
