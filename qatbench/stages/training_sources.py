"""Training data as a recipe or a command line names it -> samples, and what was left out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qatbench.errors import UsageError
from qatbench.recipe import SourceSpec
from qatbench.records import Question
from qatbench.tasks import conversations, own, selector
from qatbench.tasks.conversations import Rejected
from qatbench.tasks.sources import Item, Source

TOLD = 3  # rows that are named of those left out


@dataclass(frozen=True)
class TrainingSet:
    """Samples by source, and the rows that cannot be trained on."""

    sources: tuple[Source, ...]
    rejected: tuple[Rejected, ...] = ()

    @property
    def items(self) -> list[Item]:
        """All samples, source by source."""
        return [item for source in self.sources for item in source.items]

    def limited(self, limit: int | None, seed: int) -> TrainingSet:
        """At most `limit` samples of each source, the first of a seeded order; None: all."""
        if limit is None:
            return self
        return TrainingSet(
            tuple(replace(source, items=_first(source.items, limit, seed)) for source in
                  self.sources),
            self.rejected,
        )  # fmt: skip

    def notes(self) -> list[str]:
        """For the report: shares of several sources, and the rows that were left out."""
        lines = []
        if len(self.sources) > 1:
            total = sum(source.weight for source in self.sources)
            told = (f"{s.name} {100 * s.weight / total:.0f} % of {len(s.items)}" for s in
                    self.sources)  # fmt: skip
            lines.append(f"training sources: {', '.join(told)} samples")
        if self.rejected:
            counts = Counter(bad.why for bad in self.rejected)
            reasons = ", ".join(f"{n} x {why}" for why, n in counts.most_common())
            first = ", ".join(f"{bad.file.name} row {bad.row}" for bad in self.rejected[:TOLD])
            lines.append(f"{len(self.rejected)} training rows left out: {reasons}; first: {first}")
        return lines


def _first(items: Sequence[Item], limit: int, seed: int) -> Sequence[Item]:
    questions = [item for item in items if isinstance(item, Question)]
    if len(questions) == len(items):
        return selector.limit(questions, limit, seed)
    return random.Random(seed).sample(items, min(limit, len(items)))


def load(specs: Sequence[SourceSpec], paths: Mapping[str, str]) -> TrainingSet:
    """Load every source.

    Args:
        specs: what to train on.
        paths: where the data of a task lies.

    Raises: what the tasks' loaders and `conversations.load` raise.
    """
    sources: list[Source] = []
    rejected: list[Rejected] = []
    for spec in specs:
        if spec.questions is not None:
            chosen = selector.parse(spec.questions)
            items: Sequence[Item] = selector.load(chosen, paths)
            name = spec.questions if chosen.file is None else str(chosen)  # no path of this machine
            sources.append(Source(name, items, spec.weight))
            continue
        file = Path(str(spec.conversations))
        found = conversations.load(file, Path(spec.images) if spec.images else None)
        sources.append(Source(file.name, found.conversations, spec.weight))
        rejected += found.rejected
    return TrainingSet(tuple(sources), tuple(rejected))


def parse(text: str, images: str | None) -> SourceSpec:
    """Read `TASK:SPLIT[:text|image][@WEIGHT]` or `FILE[:text|image][@WEIGHT]` of a command line.

    A .json or .jsonl holds conversations, unless the first line of a .jsonl is a question.

    Raises: UsageError for a weight that is no number above 0.
    """
    what, _, weight = text.rpartition("@") if "@" in text else (text, "", "1")
    try:
        share = float(weight)
    except ValueError:
        share = 0.0
    if not 0 < share < float("inf"):
        raise UsageError(f"--train {text}: the weight is {weight!r}", hint="SOURCE@2.5, say")
    if what.endswith((".json", ".jsonl")) and not own.holds_questions(Path(what)):
        return SourceSpec(conversations=what, images=images, weight=share)
    return SourceSpec(questions=what, weight=share)
