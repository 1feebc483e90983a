"""score: answers made elsewhere -> what a named evaluator makes of them, as one of its own runs.

A question of the data without an answer counts as not right, under every protocol; what the
evaluator itself would state of the answered rows alone is `answered_only`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatbench import store
from qatbench.errors import UsageError
from qatbench.records import LETTERS, Accuracy, Metrics, Prediction, Question, TaskMetrics
from qatbench.stages import score_data
from qatbench.stages.metrics import OFFICIAL, Unit, accuracy, summarize, units
from qatbench.stages.score_data import Asked
from qatbench.tasks import answers, protocols, selector
from qatbench.tasks.answers import Answer, Answers
from qatbench.tasks.answers_match import Matched, match
from qatbench.tasks.answers_meta import meta_of
from qatbench.tasks.protocols import Protocol
from qatbench.tasks.protocols_prompts import IMAGE_MARK

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
        groups = self.metrics.groups
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
        if self.asked.pictured:
            both = groups.get("modality", {})
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


def score(path: Path, task: str, protocol: str, data: str | None, split: str | None) -> Scored:
    """Read, match, extract and count; `split` may also stand behind the task, after a colon.

    Raises: UsageError for an unknown protocol, task or split; what reading answers and data raises.
    """
    chosen = protocols.get(protocol)
    task, _, behind = task.partition(":")
    selector.parse(task)
    split = split or behind or None
    given = answers.read(path)
    asked = score_data.load(task, data, split, given)
    matched = match(given.rows, asked.questions)
    rows = [
        prediction(question, matched.by_id.get(question.id), chosen) for question in asked.questions
    ]
    if not units(rows):
        raise UsageError(
            f"no question of {asked.part} has its first pass (an index below 1000000)",
            hint="give data that hold every pass, or a protocol that counts rows",
        )
    scored = Scored(chosen, given, asked, matched, rows, _metrics(rows, asked.questions, chosen))
    modality = {k: v for k, v in scored.metrics.groups.items() if k != "modality"}
    if scored.drops:
        modality["modality"] = _by_prompt(rows, matched)
    elif asked.pictured:
        modality["modality"] = scored.metrics.groups["modality"]
    metrics = scored.metrics.model_copy(update={"groups": modality})
    return Scored(chosen, given, asked, matched, rows, metrics)


def prediction(question: Question, answer: Answer | None, protocol: Protocol) -> Prediction:
    """The row of one question; None: there is no answer to it, which is no unparsed answer.

    Whose data may not be passed on is not asked: the response is kept by length and hash.
    """
    chosen: str | None = None
    about: dict[str, Any] = {}
    if answer is None:
        about["error"] = "no answer in the file"
    elif answer.response is not None:
        chosen = protocol.extract(answer.response, question.options)
        about["raw_sha256"] = hashlib.sha256(answer.response.encode()).hexdigest()
        about["raw_length"] = len(answer.response)
    elif answer.choice is not None and 0 <= answer.choice < len(LETTERS):
        letter = LETTERS[answer.choice]
        chosen = letter if letter in question.options else None
    return Prediction(
        id=question.id,
        task=question.task,
        choices=tuple(question.options),
        gold=question.gold,
        chosen=chosen,
        status="error" if answer is None else "ok" if chosen else "unparsed",
        meta=meta_of(question, circular=protocol.circular),
        **about,
    )


# --- figures ------------------------------------------------------------------------------------


def _metrics(
    rows: Sequence[Prediction], questions: Sequence[Question], protocol: Protocol
) -> TaskMetrics:
    """The task's metrics, with ScienceQA's topics and categories, of which there are many."""
    task = rows[0].task
    (metrics,) = summarize(
        rows, protocols={task: protocol.name}, mode="generate", seconds=0.0
    ).tasks
    groups = dict(metrics.groups)
    if task == "scienceqa":
        for kind in ("topic", "category"):
            sorts: dict[str, list[Unit]] = defaultdict(list)
            for row, question in zip(rows, questions, strict=True):
                if name := getattr(question, kind):
                    sorts[name].append((row,))
            if sorts:
                groups[kind] = {name: accuracy(some) for name, some in sorted(sorts.items())}
    if protocol.name.startswith(_BY_SPLIT) and "l2_category" in groups:
        named = groups["l2_category"]
        groups["l2_category"] = {L2_SHORT.get(name, name): one for name, one in named.items()}
    return metrics.model_copy(update={"groups": groups})


def _by_prompt(rows: Sequence[Prediction], matched: Matched) -> dict[str, Accuracy]:
    """Modality as LLaVA's scorer tells it: «<image>» in the prompt of the row that counts."""
    sorts: dict[str, list[Unit]] = defaultdict(list)
    for row in rows:
        if answer := matched.by_id.get(row.id):
            sorts["image" if IMAGE_MARK in (answer.prompt or "") else "text"].append((row,))
    return {kind: accuracy(some) for kind, some in sorted(sorts.items())}


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


# --- a run folder -------------------------------------------------------------------------------


def write(scored: Scored, path: Path, out: Path) -> dict[str, Any]:
    """Write predictions.jsonl, metrics.json and, last, provenance.json, as `compare` reads them.

    Raises: ArtifactError if `out` holds another scoring; UsageError if it holds something else.
    """
    started = time.monotonic()
    asked = [
        [question.id, list(question.options), question.gold] for question in scored.asked.questions
    ]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    part = scored.asked.part
    spec = {
        "answers": store.file_digest(path),
        "protocol": {scored.metrics.task: scored.protocol.name},
        "questions": {f"{part}:letters": digest},  # of ids, letters and golds alone
    }
    folder = store.RunFolder(out, "score", spec)
    folder.begin(resume=True)
    lines = "".join(row.model_dump_json() + "\n" for row in scored.rows)
    store.write_text(out / "predictions.jsonl", lines)
    metrics = Metrics(tasks=(scored.metrics,), seconds=0.0, questions_per_second=0.0)
    store.write_json(out / "metrics.json", metrics.model_dump(mode="json"))
    told = Counter(row.status for row in scored.rows)
    return folder.finish(
        inputs={"answers": path.name, "form": scored.given.form, "data": spec["questions"]},
        seconds=time.monotonic() - started,
        machine={},
        figures={"status": dict(told), "notes": scored.notes()},
    )


def shown(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """The single figures of `as_json`, in its order: overall, modality, groups."""
    names = ("overall", "answered_only", "circular", "vanilla_pass_0", "all_rows", "image", "text")
    return {name: figures[name] for name in (*names, *OFFICIAL) if name in figures}
