"""What the built-in models are trained on: captions, statements of facts, and questions.

Rows of LENGTH tokens as arrays. A row with a picture starts with the chat template's opening and
the visual tokens, so that they lie at the same place in every row; rows without hold several
texts, each closed by the end token. Supervised are captions, statements, and the answers of
questions; each text shares a weight among its tokens, or the few tokens of an answer would be
lost among those of captions.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qatbench.mini import models
from qatbench.mini.benchmark import identities
from qatbench.mini.draw import caption
from qatbench.mini.facts import Facts
from qatbench.mini.facts import facts as draw_facts
from qatbench.mini.questions import KINDS, PICTURES, Made, draw
from qatbench.records import LETTERS, Question
from qatbench.tasks import protocols

LENGTH = 128
OPENING = 2  # tokens before the visual ones: `USER :`
TEXTS = tuple(name for name in KINDS if name not in PICTURES)
FORMATS = {  # how questions are put: protocols, and the options' texts listed before `Answer:`
    "qatbench": 8, protocols.CHOICES: 3, "llava-sqa": 4, "lmms-sqa": 1, "grace-sqa": 3,
    "scienceqa-official": 1,
}  # fmt: skip

CAPTION, STATEMENT, ANSWER = 1.0, 3.0, 1.0  # weight of a text in the loss
QUESTIONS = 0.7  # share of the rows with a picture that ask, the others describe

Row = tuple[list[int], list[float]]  # token ids and their weights


class Pile(NamedTuple):
    """Rows: ids (n, LENGTH) int16, weights (n, LENGTH) fp16, grids (n, 6, 6) int16 or (0,)."""

    ids: NDArray[np.int16]
    weights: NDArray[np.float16]
    grids: NDArray[np.int16]


class Corpus(NamedTuple):
    """The rows with pictures and those without."""

    pictures: Pile
    texts: Pile


def make(
    seed: int,
    *,
    pictures: int,
    questions: int,
    variants: int,
    held_out: frozenset[str],
    progress: Callable[[str, int, int], None],
) -> Corpus:
    """Draw the corpus in worker processes; the same arguments give the same rows.

    Args:
        seed: of facts and rows.
        pictures: rows with a picture, captions and questions.
        questions: questions without a picture.
        variants: statements of every subject, each in another order.
        held_out: identities (`benchmark.identities`) that must not appear.
        progress: callback.
    """
    jobs = 64
    parts = [
        (seed, job, pictures // jobs, questions // jobs, variants, jobs, held_out)
        for job in range(jobs)
    ]
    done: list[Corpus] = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        for part in pool.map(_part, parts):
            done.append(part)
            progress("Drawing the corpus", len(done), jobs)

    def joined(piles: list[Pile]) -> Pile:
        return Pile(*(np.concatenate(column) for column in zip(*piles, strict=True)))

    return Corpus(joined([p.pictures for p in done]), joined([p.texts for p in done]))


def _part(given: tuple[int, int, int, int, int, int, frozenset[str]]) -> Corpus:
    seed, job, pictures, questions, variants, jobs, held_out = given
    rng, facts = random.Random(f"{seed}/corpus/{job}"), draw_facts(seed)
    seen = [_with_picture(rng, facts, held_out) for _ in range(pictures)]
    texts = [_statement(rng, facts, kind, number)
             for kind in facts.table
             for number in range(job, facts.subjects(kind), jobs)
             for _ in range(variants)]  # fmt: skip
    texts += [_question(rng, draw(rng, facts, "train", TEXTS)) for _ in range(questions)]
    rng.shuffle(texts)
    rows = [row for row, _ in seen]
    grids = np.stack([grid for _, grid in seen]) if seen else np.zeros((0, 6, 6), np.int16)
    return Corpus(_pile(rows, grids), _pile(_packed(texts), np.zeros(0, np.int16)))


def _with_picture(
    rng: random.Random, facts: Facts, held_out: frozenset[str]
) -> tuple[Row, NDArray[np.int16]]:
    while True:
        made = draw(rng, facts, "train", PICTURES)
        if not identities(made) & held_out:
            break
    assert made.grid is not None
    if rng.random() > QUESTIONS:
        text = caption(made.grid)
        return _row(models.DESCRIBE, f" {text}", CAPTION, picture=True), made.grid
    return _question(rng, made), made.grid


def _statement(rng: random.Random, facts: Facts, kind: str, number: int) -> Row:
    ids = [*encode(facts.statement(kind, number, rng)), models.END]
    return ids, [STATEMENT / len(ids)] * len(ids)


def _question(rng: random.Random, made: Made) -> Row:
    name = rng.choices(list(FORMATS), list(FORMATS.values()))[0]
    options = dict(zip(LETTERS, made.choices, strict=False))
    gold = LETTERS[made.answer]
    question = Question(
        id="0", task="scienceqa", text=made.text, options=options, gold=gold, hint=made.hint
    )
    text, answer = protocols.with_answer(question, name)
    return _row(text, answer, ANSWER, picture=made.grid is not None)


def _row(text: str, answer: str, weight: float, *, picture: bool) -> Row:
    visual = [models.IMAGE] * models.VISUAL_TOKENS if picture else []
    prompt = [*encode("USER:"), *visual, *encode(text), *encode("ASSISTANT:")]
    target = [*encode(answer), models.END]
    ids = (prompt + target)[:LENGTH]
    weights = [0.0] * len(prompt) + [weight / len(target)] * len(target)
    return ids, weights[:LENGTH]


def encode(text: str) -> list[int]:
    """Token ids as the tokenizer gives them; no special tokens."""
    known = _numbers()
    return [known.get(word, models.UNKNOWN) for word in re.findall(models.WORD, text)]


def _numbers() -> dict[str, int]:
    if not _NUMBERS:
        _NUMBERS.update((word, number) for number, word in enumerate(models.vocabulary()))
    return _NUMBERS


_NUMBERS: dict[str, int] = {}


def _packed(texts: list[Row]) -> list[Row]:
    """Texts put one after the other into rows while they fit."""
    rows: list[Row] = []
    for ids, weights in texts:
        if rows and len(rows[-1][0]) + len(ids) <= LENGTH:
            rows[-1][0].extend(ids)
            rows[-1][1].extend(weights)
        else:
            rows.append((list(ids), list(weights)))
    return rows


def _pile(rows: list[Row], grids: NDArray[np.int16]) -> Pile:
    ids = np.full((len(rows), LENGTH), models.PAD, dtype=np.int16)
    weights = np.zeros((len(rows), LENGTH), dtype=np.float16)
    for i, (tokens, shares) in enumerate(rows):
        ids[i, : len(tokens)] = tokens
        weights[i, : len(shares)] = shares
    return Pile(ids, weights, grids)
