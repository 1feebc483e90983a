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
from dataclasses import replace
from pathlib import Path
from typing import Any

from qatbench import store
from qatbench.errors import UsageError
from qatbench.records import LETTERS, Accuracy, Metrics, Prediction, Question, TaskMetrics
from qatbench.stages import score_data
from qatbench.stages.metrics import Unit, accuracy, summarize, units
from qatbench.stages.score_data import Asked
from qatbench.stages.score_figures import Scored
from qatbench.tasks import answers, protocols, selector
from qatbench.tasks.answers import Answer
from qatbench.tasks.answers_match import Matched, match
from qatbench.tasks.answers_meta import meta_of
from qatbench.tasks.protocols import Protocol
from qatbench.tasks.protocols_prompts import IMAGE_MARK


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
    mode = "generate" if given.has_responses else "choices"
    metrics = _metrics(rows, asked.questions, chosen, mode)
    scored = Scored(chosen, given, asked, matched, rows, metrics)
    groups = _known(scored.metrics.groups, asked)
    if scored.drops:
        groups["modality"] = _by_prompt(rows, matched)
    return replace(scored, metrics=scored.metrics.model_copy(update={"groups": groups}))


def file_of(path: Path) -> Path:
    """The answers of a run folder, those with responses if it has them; else `path` itself."""
    if not path.is_dir():
        return path
    whole = path / "responses.jsonl"
    return whole if whole.is_file() else store.predictions_file(path)


def _known(groups: Mapping[str, dict[str, Accuracy]], asked: Asked) -> dict[str, Any]:
    """Leave out what would need a column that the data lack."""
    without = {"NO"} if not (asked.pictured and asked.hinted) else set()
    without |= set() if asked.pictured else {"IMG"}
    without |= set() if asked.hinted else {"TXT"}
    kept = {kind: some for kind, some in groups.items() if kind != "modality" or asked.pictured}
    if "official" in kept:
        kept["official"] = {k: one for k, one in kept["official"].items() if k not in without}
    return kept


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
        about["raw_sha256"] = hashlib.sha256(
            answer.response.encode("utf-8", "surrogatepass")
        ).hexdigest()
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
    rows: Sequence[Prediction], questions: Sequence[Question], protocol: Protocol, mode: str
) -> TaskMetrics:
    """The task's metrics, with ScienceQA's topics and categories, of which there are many."""
    task = rows[0].task
    (metrics,) = summarize(rows, protocols={task: protocol.name}, mode=mode, seconds=0.0).tasks
    groups = dict(metrics.groups)
    if task == "scienceqa":
        for kind in ("topic", "category"):
            sorts: dict[str, list[Unit]] = defaultdict(list)
            for row, question in zip(rows, questions, strict=True):
                if name := getattr(question, kind):
                    sorts[name].append((row,))
            if sorts:
                groups[kind] = {name: accuracy(some) for name, some in sorted(sorts.items())}
    return metrics.model_copy(update={"groups": groups})


def _by_prompt(rows: Sequence[Prediction], matched: Matched) -> dict[str, Accuracy]:
    """Modality as LLaVA's scorer tells it: «<image>» in the prompt of the row that counts."""
    sorts: dict[str, list[Unit]] = defaultdict(list)
    for row in rows:
        if answer := matched.by_id.get(row.id):
            sorts["image" if IMAGE_MARK in (answer.prompt or "") else "text"].append((row,))
    return {kind: accuracy(some) for kind, some in sorted(sorts.items())}


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
    store.write_text(out / "predictions.jsonl", store.as_lines(scored.rows))
    metrics = Metrics(tasks=(scored.metrics,), seconds=0.0, questions_per_second=0.0)
    store.write_json(out / "metrics.json", metrics.model_dump(mode="json"))
    told = Counter(row.status for row in scored.rows)
    return folder.finish(
        inputs={"answers": path.name, "form": scored.given.form, "data": spec["questions"]},
        seconds=time.monotonic() - started,
        machine={},
        figures={"status": dict(told), "notes": scored.notes()},
    )
