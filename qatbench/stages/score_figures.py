"""All figures of one scoring, as one JSON object, and what a reader of them has to know."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qatbench.records import Accuracy, Prediction, Question, TaskMetrics
from qatbench.stages.metrics import OFFICIAL, Unit, accuracy, units
from qatbench.stages.score_data import Asked
from qatbench.tasks.answers import Answers
from qatbench.tasks.answers_match import Matched
from qatbench.tasks.protocols import Protocol

_BY_PROMPT = "llava-sqa"  # its IMG accuracy goes by the prompts that the answers file saves
_BY_SPLIT = ("vlmevalkit-exact", "llava-mmbench")  # their report has a line a split
L2_SHORT = {  # VLMEvalKit's names
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


@dataclass(frozen=True)
class Scored:
    """Every figure of one file of answers under one protocol."""

    protocol: Protocol
    given: Answers
    asked: Asked
    matched: Matched
    rows: list[Prediction]  # one a question of the data
    metrics: TaskMetrics

    @property
    def missing(self) -> int:
        """Rows of the data that have no answer."""
        return len(self.asked.questions) - len(self.matched.by_id)

    @property
    def drops(self) -> bool:
        """Whether modality goes by saved prompts, so that a missing answer is in neither part."""
        return self.protocol.name == _BY_PROMPT and self.given.has_prompts

    @property
    def l2_short(self) -> bool:
        """Whether the evaluator abbreviates l2-categories and reports by split."""
        return self.protocol.name.startswith(_BY_SPLIT)

    def as_json(self) -> dict[str, Any]:
        """All figures by name: fractions; None where a group is empty."""
        groups = dict(self.metrics.groups)
        if self.l2_short and "l2_category" in groups:
            named = groups["l2_category"]
            groups["l2_category"] = {L2_SHORT.get(name, name): one for name, one in named.items()}
        value: dict[str, Any] = {
            "task": self.metrics.task,
            "protocol": self.protocol.name,
            "part": self.asked.part,
            "format": self.given.form,
            "overall": self.metrics.overall.accuracy,
            "interval": [self.metrics.overall.low, self.metrics.overall.high],
            "n": self.metrics.overall.n,
            "right": self.metrics.overall.right,
            "unit": self._unit(),
            "rows": len(self.rows),
            "unparsed": self.metrics.unparsed,
            "missing": self.missing,
            "unknown": len(self.matched.unknown),
            "repeated": self.matched.repeated,
            "other_options": self.matched.other_options,
            "no_gold": self.asked.no_gold,
        }
        if both := groups.get("modality", {}):
            value |= {kind: _share(both.get(kind)) for kind in ("image", "text")}
        if self.metrics.task == "scienceqa":
            value |= {name: _share(groups.get("official", {}).get(name)) for name in OFFICIAL}
            value["without_metadata"] = self._without_metadata()
        value |= {name: _share(one) for name, one in groups.get("counted_as", {}).items()}
        for kind in ("subject", "topic", "category", "l2_category"):
            if kind in groups:
                value[kind] = {name: one.accuracy for name, one in groups[kind].items()}
        if self.l2_short:
            value["by_split"] = by_split(self.rows, self.asked.questions)
        if self.missing:
            answered = units([row for row in self.rows if row.status != "error"])
            value["answered_only"] = _share(accuracy(answered) if answered else None)
        counted = {"overall": {"all": self.metrics.overall}} | groups
        value["counts"] = {
            kind: {name: {"n": one.n, "right": one.right} for name, one in some.items()}
            for kind, some in counted.items()
        }
        return value

    def _unit(self) -> str:
        if not any("circular_pass" in row.meta for row in self.rows):
            return "question"
        return "circular question" if self.protocol.circular else "row"

    def _without_metadata(self) -> dict[str, int]:
        return {key: sum(key not in row.meta for row in self.rows) for key in ("subject", "grade")}

    def notes(self) -> list[str]:
        """What a reader of the figure has to know, in sentences."""
        found = []
        if not self.given.has_responses:
            found.append(
                "the file holds choices, not responses: nothing is extracted, only counted as by "
                f"{self.protocol.name}"
            )
        if self.missing:
            found.append(
                f"{self.missing} of {len(self.rows)} rows of the data have no answer: they count "
                "as not right"
                + (", and in neither image nor text, as their prompt is unknown"
                   if self.drops else "")
            )  # fmt: skip
        if self.matched.unknown:
            first = self.matched.unknown[0].where
            found.append(
                f"{len(self.matched.unknown)} answers are to no question of {self.asked.part} and "
                f"are left out (the first: {first})"
            )
        if self.matched.repeated:
            found.append(f"{self.matched.repeated} answers are repeated: the last one counts")
        if self.matched.other_options:
            found.append(
                f"{self.matched.other_options} rows of the answers show other options than the "
                "data: another version or language? Letters are read against the data's"
            )
        if self.asked.no_gold:
            found.append(f"{self.asked.no_gold} rows of the data have no gold answer: left out")
        lacking = self._without_metadata() if self.metrics.task == "scienceqa" else {}
        found += [
            f"{n} of {len(self.rows)} questions have no {key}: they are in no group by it"
            for key, n in lacking.items()
            if n
        ]
        return found


def by_split(
    rows: Sequence[Prediction], questions: Sequence[Question]
) -> dict[str, dict[str, float]]:
    """VLMEvalKit's report: for each split (`none` if there is none) Overall, l2 and category."""
    splits = {question.id: question.split or "none" for question in questions}
    parts: dict[str, dict[str, list[Unit]]] = defaultdict(lambda: defaultdict(list))
    for unit in units(rows):
        part, meta = parts[splits[unit[0].id]], unit[0].meta
        part["Overall"].append(unit)
        l2 = meta.get("l2_category", "")
        for name in filter(None, (L2_SHORT.get(l2, l2), meta.get("category"))):
            part[name].append(unit)
    return {
        split: {name: accuracy(some).accuracy for name, some in part.items()}
        for split, part in parts.items()
    }


def _share(one: Accuracy | None) -> float | None:
    return None if one is None else one.accuracy


def shown(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """The single figures of `as_json`, in its order: overall, modality, groups."""
    names = ("overall", "answered_only", "circular", "vanilla_pass_0", "all_rows", "image", "text")
    return {name: figures[name] for name in (*names, *OFFICIAL) if name in figures}
