"""Which questions to ask -> questions; limits and folds.

`TASK:SPLIT[:SUBSET]` is a part of a known data set, `FILE.jsonl[:SUBSET]` a user's own questions.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast, get_args

from qatbench.errors import UsageError
from qatbench.records import Question
from qatbench.tasks import mmbench, own, scienceqa
from qatbench.tasks.scienceqa import Subset

BUILT_IN = ("mini", "mini-text")  # data paths that are drawn by qatbench.mini


@dataclass(frozen=True)
class Task:
    """What a data set's module offers: `load(source, split, subset=...)` and some facts."""

    load: Callable[..., list[Question]]
    default_source: str | None
    shareable: bool
    default_split: str = "test"


TASKS: dict[str, Task] = {
    "scienceqa": Task(scienceqa.load, "derek-thomas/ScienceQA", scienceqa.SHAREABLE),
    "mmbench": Task(mmbench.load, "lmms-lab/MMBench", mmbench.SHAREABLE, "dev"),  # test: no answers
}


@dataclass(frozen=True)
class Selector:
    """One task's questions: a split, and whether those with or without an image.

    `file` holds a user's own; records name them by task, split and subset, as all others.
    """

    task: str
    split: str = "test"
    subset: Subset = "all"
    file: Path | None = None

    def __str__(self) -> str:
        tail = "" if self.subset == "all" else f":{self.subset}"
        return f"{self.task}:{self.split}{tail}"


def parse(text: str) -> Selector:
    """Read `TASK[:SPLIT[:all|text|image]]` or `FILE[:all|text|image]`.

    The split not given is the one the task is scored on. A file ends in .jsonl, .tsv or .csv, or is
    there; the task it makes is called by its stem.

    Raises: UsageError on another form, an unknown task or an unknown subset.
    """
    if (own_file := _own(text)) is not None:
        return own_file
    task, *rest = text.split(":")
    if task not in TASKS:
        raise UsageError(
            f"unknown task {task!r} in {text!r}",
            hint=f"tasks: {', '.join(TASKS)}, or a file of your own: FILE.jsonl, .tsv or .csv",
        )
    if len(rest) > 2 or not all(part and part == part.strip() for part in rest):
        raise UsageError(
            f"{text!r} does not name questions", hint=f"write {task}:SPLIT[:all|text|image]"
        )
    split, subset = (*rest, *(TASKS[task].default_split, "all")[len(rest) :])
    return Selector(task, split, _subset(subset, text))


def parse_all(texts: Iterable[str]) -> tuple[Selector, ...]:
    """Read several; each task name stands for one set of data.

    Raises: UsageError as `parse`, and when two files give one task name, or one text stands twice.
    """
    chosen = tuple(parse(text) for text in texts)
    for i, one in enumerate(chosen):
        for other in chosen[:i]:
            if one.task == other.task and one.file != other.file:
                raise UsageError(
                    f"{one.file} and {other.file} would both be the task {one.task!r}",
                    hint="rename one of the files",
                )
            if str(one) == str(other):
                raise UsageError(f"{one} is asked for twice", hint="name it once")
    return chosen


def with_paths(selectors: Iterable[Selector]) -> list[str]:
    """The tasks whose data lie where `--data` says, or in their usual place."""
    return [selector.task for selector in selectors if selector.file is None]


def _subset(subset: str, text: str) -> Subset:
    if subset not in get_args(Subset):
        raise UsageError(
            f"unknown subset {subset!r} in {text!r}", hint=f"subsets: {', '.join(get_args(Subset))}"
        )
    return cast("Subset", subset)


def _own(text: str) -> Selector | None:
    """The selector of a user's own file; None if the text does not name one."""
    if text.split(":")[0] in TASKS:
        return None
    path, sign, subset = text.rpartition(":")
    if not sign or _is_file(text):
        path, subset = text, "all"
    if not _is_file(path):
        return None
    file = Path(path)
    task = own.name_of(file)
    if task in TASKS:
        raise UsageError(
            f"{file} would be a second task {task!r}",
            hint=f"rename it, or if it holds that benchmark: --task {task} --data {file}",
        )
    return Selector(task, own.SPLIT, _subset(subset, text), file)


def _is_file(path: str) -> bool:
    return Path(path).suffix in own.SUFFIXES or Path(path).is_file()


def load(selector: Selector, paths: Mapping[str, str]) -> list[Question]:
    """Load the questions a selector names.

    `paths` says where a task's data are: one of BUILT_IN, or what the task's own
    `load` takes. A task that is not in it is loaded from its usual place, a file from itself.

    Raises: UsageError if the task has no usual place and no path was given, and what its loader
        raises.
    """
    if selector.file is not None:
        return own.load(selector.file, subset=selector.subset)
    task = TASKS[selector.task]
    source: str | Path | None = paths.get(selector.task, task.default_source)
    if source is None:
        raise UsageError(
            f"where the data of {selector.task} are is not known",
            hint=f"give --data with the path of its files, or {' or '.join(BUILT_IN)}",
        )
    if source in BUILT_IN:
        source = cast("Path", import_module("qatbench.mini").folder(source))
    return task.load(source, selector.split, subset=selector.subset)


def shareable(task: str, source: str | None) -> bool:
    """Whether questions, options and images of `task` from `source` may be published.

    A user's own may not: what may happen to them is not known.
    """
    return task in TASKS and (source in BUILT_IN or TASKS[task].shareable)


def place(task: str, paths: Mapping[str, str]) -> str:
    """Where a task's data come from, for the record: built in, a hub id, or `local files`."""
    if task not in TASKS:
        return "local files"
    source = str(paths.get(task, TASKS[task].default_source))
    return source if source in BUILT_IN or on_the_hub(source) else "local files"


def on_the_hub(source: str) -> bool:
    """Whether a source is a hub id ("owner/name[/CONFIG]") and not a path that exists."""
    named = source.count("/") in (1, 2) and not source.startswith((".", "/", "~"))
    return named and not source.endswith(own.SUFFIXES) and not Path(source).exists()


def places(paths: Mapping[str, str]) -> dict[str, str]:
    """`place` of every task."""
    return {task: place(task, paths) for task in TASKS}


def digest(questions: Iterable[Question]) -> str:
    """SHA-256 (hex) of the questions' content and order: equal digests, equal question sets.

    An image counts by its encoded bytes, be they in a file or in the record; one whose file is
    missing counts by the last three parts of its path, so that folders can be moved.
    """
    total = hashlib.sha256()
    for q in questions:
        content = [q.id, q.text, list(q.options.items()), q.gold, q.hint, _image_key(q.image)]
        total.update(json.dumps(content, ensure_ascii=True).encode() + b"\n")
    return total.hexdigest()


def _image_key(image: Path | bytes | None) -> str | None:
    if image is None:
        return None
    if isinstance(image, Path):
        if not image.is_file():
            return "missing:" + "/".join(image.parts[-3:])
        image = image.read_bytes()
    return hashlib.sha256(image).hexdigest()


def limit(questions: Sequence[Question], n: int, seed: int = 0) -> list[Question]:
    """Take the first `n` of a seeded order, returned in the order of the file.

    The passes of one circular question stay together and count once. With one seed, a smaller
    limit is part of a larger one.

    Raises: UsageError if `n` is below 1.
    """
    if n < 1:
        raise UsageError(f"a limit of {n} questions leaves nothing", hint="use 1 or more")
    units = list(dict.fromkeys(_unit(q) for q in questions))
    random.Random(seed).shuffle(units)
    chosen = set(units[:n])
    return [q for q in questions if _unit(q) in chosen]


def folds(questions: Sequence[Question], k: int, seed: int = 0) -> list[list[Question]]:
    """Split into `k` validation folds: disjoint, of similar size, together all questions.

    Questions with the same hint and text (up to case and white space) stay in one fold: they
    differ in their options or image only, and would leak from training into validation. So do
    the passes of one circular question.

    Raises: UsageError if `k` is below 2 or above the number of different texts.
    """
    buckets = _same_text(questions)
    if not 2 <= k <= len(buckets):
        raise UsageError(
            f"cannot make {k} folds of {len(questions)} questions with {len(buckets)} texts",
            hint=f"use 2 to {len(buckets)} folds" if len(buckets) > 1 else "use more questions",
        )
    random.Random(seed).shuffle(buckets)
    buckets.sort(key=len, reverse=True)  # stable; large ones first keeps the folds even
    members: list[list[int]] = [[] for _ in range(k)]
    for bucket in buckets:
        min(members, key=len).extend(bucket)
    return [[questions[i] for i in sorted(fold)] for fold in members]


def _unit(question: Question) -> tuple[str, Any]:
    """Key of what counts as one question: a circular group, or the question itself."""
    return (question.task, (question.group,) if question.group is not None else question.id)


def _same_text(questions: Sequence[Question]) -> list[list[int]]:
    """Positions of the questions, those of one normalised text together."""
    buckets: dict[str, list[int]] = {}
    for position, question in enumerate(questions):
        key = " ".join(f"{question.hint}\n{question.text}".split()).casefold()
        buckets.setdefault(key, []).append(position)
    return list(buckets.values())
