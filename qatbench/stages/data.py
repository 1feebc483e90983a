"""data check: what a copy of a data set holds, against the figures of the published releases.

`missing` is what a whole copy has and this one has not: it can be used for what it is. `wrong` is
what cannot be in any copy of the release, or cannot be read. Ids and paths may be told; texts not.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qatbench import store
from qatbench.errors import QatbenchError
from qatbench.records import Question
from qatbench.stages.common import Progress
from qatbench.stages.data_places import Place
from qatbench.tasks import images as pictures
from qatbench.tasks import known_figures, mmbench, own, scienceqa, selector
from qatbench.tasks.known_figures import Figures

TOLD = 3  # examples in a sentence


@dataclass(frozen=True)
class Part:
    """One split of one place."""

    split: str
    release: str | None  # None: no figures are known
    known: int | None
    figures: Mapping[str, Any]  # what was counted
    missing_images: tuple[str, ...]  # the last three parts of each path
    damaged_images: tuple[str, ...]  # ids of questions, and why
    digest: str  # as `eval` records it: equal digests, equal question sets
    missing: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def state(self) -> str:
        """For people: wrong, incomplete, `rows complete` (but not their images), or complete."""
        if self.wrong:
            return "wrong"
        if self.known is None:
            return "incomplete" if self.missing else "readable"
        if self.figures["rows"] < self.known:
            return "incomplete"
        return "rows complete" if self.missing else "complete"


@dataclass(frozen=True)
class Checked:
    """What was found at one place."""

    place: Place
    parts: tuple[Part, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)  # name -> SHA-256 (hex) of its bytes
    missing: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    absent: str | None = None  # why nothing can be looked at

    @property
    def is_wrong(self) -> bool:
        """Whether anything there is wrong."""
        return bool(self.wrong) or any(part.wrong for part in self.parts)


def check(places: Sequence[Place], *, images: bool, progress: Progress) -> list[Checked]:
    """Look at every place; `images` decodes every image as well.

    Raises: nothing of what is wrong with data: it is told.
    """
    return [_check(place, images, progress) for place in places]


def _check(place: Place, images: bool, progress: Progress) -> Checked:
    if place.absent:
        return Checked(place, absent=place.absent)
    progress(f"Reading {place.name}", 0, 0)
    files = {
        file.relative_to(place.root).as_posix(): store.file_digest(file) for file in place.files()
    }
    try:
        splits = _splits(place)
    except QatbenchError as error:
        return Checked(place, files=files, wrong=(error.message,))
    parts, wrong = [], []
    decoded: dict[bytes | Path, str | None] = {}
    for split in splits:
        try:
            rows = _read(place, split)
        except QatbenchError as error:
            wrong.append(error.message)
            continue
        if images:
            _decode(rows, decoded, progress)
        parts.append(_part(place, split, rows, decoded if images else None))
    there = set(splits)
    expected = known_figures.EXPECTED.get(place.task, ()) if place.known else ()
    if any(part.release == "ScienceQA-IMG" for part in parts):
        expected = ("val", "test")
    lacking = [split for split in expected if split not in there]
    told = [f"split {split}: none of {_rows_of(place, split)} rows" for split in lacking]
    return Checked(place, tuple(parts), files, tuple(told), tuple(wrong))


def _rows_of(place: Place, split: str) -> int:
    found = known_figures.scienceqa(split, only_images=False, place=place.path.name)
    return found.rows if found else 0


def _splits(place: Place) -> list[str]:
    if place.task == "scienceqa":
        return scienceqa.splits(place.path)
    return mmbench.splits(place.path) if place.task == "mmbench" else [own.SPLIT]


def _read(place: Place, split: str) -> list[Question]:
    if place.task == "scienceqa":
        return scienceqa.read(place.path, split)
    return mmbench.read(place.path, split) if place.task == "mmbench" else own.load(place.path)


def _decode(
    rows: Iterable[Question], decoded: dict[bytes | Path, str | None], progress: Progress
) -> None:
    """Decode each different image once; what is wrong with it, or None."""
    todo = dict.fromkeys(q.image for q in rows if q.image is not None and q.image not in decoded)
    for done, image in enumerate(todo, start=1):
        decoded[image] = None
        if not (isinstance(image, Path) and not image.is_file()):
            try:
                pictures.open_rgb(image)
            except QatbenchError as error:
                decoded[image] = error.message
        progress("Decoding images", done, len(todo))


# --- one split ------------------------------------------------------------------------------------


def _part(
    place: Place,
    split: str,
    rows: Sequence[Question],
    decoded: Mapping[bytes | Path, str | None] | None,
) -> Part:
    absent = [q.image for q in rows if isinstance(q.image, Path) and not q.image.is_file()]
    damaged = tuple(
        f"{q.id}: {decoded[q.image]}"
        for q in rows
        if decoded and q.image is not None and decoded.get(q.image)
    )
    known = _known(place, split, rows)
    figures = counted(rows)
    missing, wrong = _against(figures, known)
    if absent:
        told = ", ".join("/".join(path.parts[-3:]) for path in absent[:TOLD])
        missing.append(f"{len(absent)} of {figures['image']} images, e.g. {told}")
    if place.task == "scienceqa" and place.known and (none := sum(not q.subject for q in rows)):
        missing.append(f"the subject of {none} rows: scores by subject leave them out")
    if damaged:
        wrong.append(f"{len(damaged)} images cannot be decoded, e.g. {'; '.join(damaged[:TOLD])}")
    wrong += _inconsistent(rows)
    return Part(
        split=split,
        release=known.release if known else None,
        known=known.rows if known else None,
        figures=figures | {"image_here": figures["image"] - len(absent)},
        missing_images=tuple("/".join(path.parts[-3:]) for path in absent),
        damaged_images=damaged,
        digest=selector.digest(rows),
        missing=tuple(missing),
        wrong=tuple(wrong),
    )


def _known(place: Place, split: str, rows: Sequence[Question]) -> Figures | None:
    if not place.known:
        return None
    name = place.path.stem if place.path.is_file() else place.path.name
    if place.task == "mmbench":
        return known_figures.mmbench(split, rows=len(rows), place=name)
    only = bool(rows) and all(q.has_image for q in rows)
    return known_figures.scienceqa(split, only_images=only, place=name)


def counted(rows: Sequence[Question]) -> dict[str, Any]:
    """The figures of a split: counts of rows, and of questions where passes make one."""
    hinted = [bool(q.hint) for q in rows]
    image = [q.has_image for q in rows]
    groups = Counter(q.group for q in rows if q.group is not None)
    contents = Counter(map(_content, rows))
    found: dict[str, Any] = {
        "rows": len(rows),
        "questions": len(groups) + sum(q.group is None for q in rows),
        "image": sum(image),
        "hint": sum(hinted),
        "both": sum(a and b for a, b in zip(image, hinted, strict=True)),
        "neither": sum(not a and not b for a, b in zip(image, hinted, strict=True)),
        "choices": dict(sorted(Counter(len(q.options) for q in rows).items())),
        "unanswered": sum(q.gold is None for q in rows),
        "repeated": sum(contents.values()) - len(contents),  # rows equal to an earlier one
    }
    if groups:
        found["passes"] = dict(sorted(Counter(groups.values()).items(), reverse=True))
    return found


def _content(question: Question) -> str:
    """What a question shows, its image by its bytes or the end of its path."""
    image = question.image
    if isinstance(image, Path):
        image = image.read_bytes() if image.is_file() else "/".join(image.parts[-3:]).encode()
    shown = [question.hint, question.text, list(question.options.items()), question.gold]
    return hashlib.sha256(repr(shown).encode() + (image or b"")).hexdigest()


def _against(found: Mapping[str, Any], known: Figures | None) -> tuple[list[str], list[str]]:
    """(missing, wrong): fewer rows than the release has are missing, anything else is wrong."""
    if known is None:
        return [], []
    rows, whole = found["rows"], known.rows
    if rows > whole:
        return [], [f"{rows} rows, more than the {whole} of {known.release}"]
    if rows < whole:
        beyond = [
            f"{found[name]} rows with {told}, more than the {limit} of {known.release}"
            for name, told in (("image", "an image"), ("hint", "a hint"))
            if (limit := getattr(known, name)) is not None and found[name] > limit
        ]
        return [f"{whole - rows} of the {whole} rows of {known.release}"], beyond
    wrong = []
    for name in ("questions", "passes", "image", "hint", "both", "neither", "choices"):
        expected = getattr(known, name)
        if expected is not None and found.get(name) != expected:
            wrong.append(f"{name}: {found.get(name)}, not {expected} as in {known.release}")
    return [], wrong


def _inconsistent(rows: Sequence[Question]) -> list[str]:
    """What no release has: an id twice, and passes that are not one question's."""
    wrong = []
    ids = Counter(q.id for q in rows)
    if twice := [name for name, n in ids.items() if n > 1]:
        wrong.append(f"{len(twice)} ids are there twice, e.g. {', '.join(twice[:TOLD])}")
    groups: dict[str, list[Question]] = defaultdict(list)
    for q in rows:
        if q.group is not None:
            groups[q.group].append(q)
    first = [name for name, some in groups.items() if all(q.circular_pass for q in some)]
    if first:
        told = ", ".join(first[:TOLD])
        wrong.append(f"{len(first)} questions lack their first pass, e.g. {told}: not scored")
    other = [name for name, some in groups.items() if len({_meaning(q) for q in some}) > 1]
    if other:
        told = ", ".join(other[:TOLD])
        wrong.append(f"{len(other)} questions differ between their passes, e.g. {told}")
    return wrong


def _meaning(question: Question) -> tuple[str, tuple[str, ...], str | None]:
    """What all passes share: the text, the set of options, the text of the right one."""
    gold = question.options[question.gold] if question.gold else None
    return question.text, tuple(sorted(question.options.values())), gold
