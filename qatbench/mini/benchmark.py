"""Write the drawn world as a benchmark: ScienceQA's layout and MMBench's TSV.

Splits share no scene and no question. Each is drawn until it is full; a question that was drawn
before, in any split, is drawn again.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qatbench.errors import UsageError
from qatbench.mini import draw
from qatbench.mini.facts import Facts
from qatbench.mini.facts import facts as draw_facts
from qatbench.mini.layout import new_folder, write_problems
from qatbench.mini.questions import KINDS, PICTURES, Made
from qatbench.mini.questions import draw as draw_question

SIZES = {"train": 6000, "val": 600, "test": 2400}
CIRCULAR = {"dev": 300}  # MMBench questions; each becomes as many rows as it has options
LICENSE = "CC0-1.0: the author waives all rights to this drawn benchmark, worldwide.\n"
PASS = 1_000_000  # added to the index of each further pass of a circular question


def build(
    out: Path, *, seed: int = 0, sizes: dict[str, int] | None = None, circular: int | None = None
) -> Path:
    """Write problems.json, pid_splits.json, images/, mmbench_dev.tsv and LICENSE to `out`.

    Written beside `out` and renamed, so a reader sees all of it or nothing; the same arguments
    give the same bytes.

    Args:
        out: folder to make.
        seed: of facts, scenes and questions.
        sizes: questions a split; default SIZES.
        circular: MMBench questions; default CIRCULAR["dev"].

    Returns: `out`, absolute.
    Raises: UsageError if `out` is a file or a folder that is not empty, or a size is below 1.
    """
    out = Path(out).absolute()
    sizes = sizes or SIZES
    dev = CIRCULAR["dev"] if circular is None else circular
    if min(*sizes.values(), dev) < 1:
        raise UsageError("every split must hold at least one question")
    with new_folder(out) as new:
        facts, seen = draw_facts(seed), set[str]()
        splits = {name: fill(facts, name, size, seed, seen) for name, size in sizes.items()}
        rounds = fill(facts, "dev", dev, seed, seen, PICTURES)
        _write_scienceqa(new, splits, random.Random(f"{seed}/grades"))
        _write_mmbench(new / "mmbench_dev.tsv", rounds)
        (new / "LICENSE").write_text(LICENSE, encoding="utf-8")
    return out


def fill(
    facts: Facts,
    split: str,
    size: int,
    seed: int,
    seen: set[str],
    kinds: tuple[str, ...] = tuple(KINDS),
) -> list[Made]:
    """Draw `size` questions of a split; `seen` holds the identities of all drawn so far."""
    rng = random.Random(f"{seed}/{split}")
    home = "test" if split == "dev" else split
    made: list[Made] = []
    while len(made) < size:
        one = draw_question(rng, facts, home, kinds)
        keys = identities(one)
        if not keys & seen:
            seen |= keys
            made.append(one)
    return made


def identities(question: Made) -> set[str]:
    """Hashes that no two questions may share: of the scene, or of hint and text without one."""
    if question.grid is not None:
        return {hashlib.sha256(question.grid.tobytes()).hexdigest()}
    text = f"{question.hint}\n{question.text}".lower()
    return {hashlib.sha256(text.encode()).hexdigest()}


def _write_scienceqa(folder: Path, splits: dict[str, list[Made]], rng: random.Random) -> None:
    problems: dict[str, dict[str, Any]] = {}
    pids: dict[str, list[str]] = {}
    for split, made in splits.items():
        pids[split] = [str(len(problems) + i + 1) for i in range(len(made))]
        for pid, question in zip(pids[split], made, strict=True):
            problems[pid] = _record(split, question, rng)
            if question.grid is not None:
                file = folder / "images" / split / pid / "image.png"
                file.parent.mkdir(parents=True)
                file.write_bytes(draw.png(question.grid))
    write_problems(folder, problems, pids)


def _record(split: str, question: Made, rng: random.Random) -> dict[str, Any]:
    kind = KINDS[question.kind]
    return {
        "question": question.text,
        "choices": list(question.choices),
        "answer": question.answer,
        "hint": question.hint,
        "image": None if question.grid is None else "image.png",
        "task": "closed choice",
        "grade": f"grade{rng.randint(*kind.grades)}",
        "subject": kind.subject,
        "topic": kind.topic,
        "category": kind.category,
        "skill": kind.skill,
        "lecture": "",
        "solution": "",
        "split": split,
    }


def _write_mmbench(path: Path, made: list[Made]) -> None:
    columns = ["index", "question", "hint", *"ABCD", "answer", "category", "l2-category", "image",
               "split"]  # fmt: skip
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for number, question in enumerate(made):
            writer.writerows(_passes(number, question))


def _passes(number: int, question: Made) -> Iterator[dict[str, Any]]:
    """A row a rotation of the options; four options at most, as in MMBench."""
    right = question.choices[question.answer]
    choices = [right, *(c for c in question.choices if c != right)][:4]
    choices.sort(key=question.choices.index)
    assert question.grid is not None
    picture = base64.b64encode(draw.png(question.grid)).decode()
    category, l2_category = KINDS[question.kind].mmbench
    for turn in range(len(choices)):
        shown = choices[turn:] + choices[:turn]
        yield {
            "index": number + turn * PASS,
            "question": question.text,
            "hint": question.hint,
            **dict(zip("ABCD", shown, strict=False)),
            "answer": "ABCD"[shown.index(right)],
            "category": category,
            "l2-category": l2_category,
            "image": picture,
            "split": "dev",
        }
