"""The records that cross a stage boundary: Question, Prediction, TaskMetrics. No torch here.

A letter ("A".."E") names an option everywhere; its text never leaves a machine when the task's
data may not be passed on. Wrong, unparsed and crashed are three different things (`status`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Record(BaseModel):
    """Frozen, and strict about unknown keys: a record read back is the record written."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Question(Record):
    """One question as the data set holds it; `options` maps a letter to its text, in order."""

    id: str
    task: str
    text: str
    options: dict[str, str]
    gold: str | None = None
    hint: str = ""
    image: Path | bytes | None = None  # a file (perhaps missing) or the encoded image itself
    split: str | None = None
    subject: str | None = None
    topic: str | None = None
    category: str | None = None
    l2_category: str | None = None
    skill: str | None = None
    grade: str | None = None
    group: str | None = None  # questions of one CircularEval group share it
    circular_pass: int = 0

    @property
    def has_image(self) -> bool:
        """Whether the question comes with an image, be the file there or not."""
        return self.image is not None

    @property
    def chance(self) -> float:
        """Accuracy of a uniform guess, a fraction."""
        return 1.0 / len(self.options)


class Prediction(Record):
    """One line of predictions.jsonl."""

    id: str
    task: str
    choices: tuple[str, ...]  # the letters shown, in order
    gold: str | None
    chosen: str | None
    status: Literal["ok", "unparsed", "error"]
    scores: dict[str, float] | None = None  # letter -> log-probability (nats), option mode
    tie: bool = False  # the best score was reached by more than one option; the first was chosen
    raw: str | None = None  # the response, generate mode; withheld for data that stays home
    raw_sha256: str | None = None
    raw_length: int | None = None
    error: str | None = None
    meta: dict[str, Any] = Field(default_factory=dict)

    @property
    def right(self) -> bool:
        """Chosen and correct; unparsed and crashed questions count as not right."""
        return self.chosen is not None and self.chosen == self.gold


class Accuracy(Record):
    """A share of right answers: fractions, with its 95 % Wilson interval."""

    n: int
    right: int
    accuracy: float
    low: float
    high: float
    chance: float


class TaskMetrics(Record):
    """One task's figures in metrics.json.

    Accuracies count questions, a circular one once; unparsed, errors and ties count rows.
    """

    task: str
    protocol: str
    mode: str
    overall: Accuracy
    unparsed: int
    errors: int
    ties: int
    groups: dict[str, dict[str, Accuracy]] = Field(default_factory=dict)


class Metrics(Record):
    """metrics.json: written only when every question has its row."""

    schema_version: int = SCHEMA_VERSION
    tasks: tuple[TaskMetrics, ...]
    seconds: float
    questions_per_second: float
