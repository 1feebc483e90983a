"""What the built-in models are trained on: captions, statements of facts, and questions.

Rows of LENGTH tokens as arrays. A row with a picture starts with the chat template's opening and
the visual tokens, so that they lie at the same place in every row; then comes a caption, or a
question and as many tells (tell.py) as fit. Rows without hold several texts, each closed by the
end token. Supervised are captions, tells, statements, and the answers of questions; each text
shares a weight among its tokens, or the few tokens of an answer would be lost among those of
captions.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qatbench.mini import models, names
from qatbench.mini.benchmark import identities
from qatbench.mini.draw import SHAPES, TOWN_LETTERS, caption
from qatbench.mini.facts import Facts
from qatbench.mini.facts import facts as draw_facts
from qatbench.mini.questions import KINDS, PICTURES, Made, draw
from qatbench.mini.tell import tells
from qatbench.records import LETTERS, Question
from qatbench.tasks import protocols
from qatbench.tasks import protocols_prompts as prompts

LENGTH = 128
JOBS = 64  # parts, each drawn from a seed of its own
OPENING = 2  # tokens before the visual ones: `USER :`
TEXTS = tuple(name for name in KINDS if name not in PICTURES)
WORKED = "worked"  # lettered options, answered by the text and then its letter: to learn letters
FORMATS = {  # how questions are put: protocols, the options' texts before `Answer:`, and WORKED
    "qatbench": 9, protocols.CHOICES: 2, "llava-sqa": 4, WORKED: 4, "lmms-sqa": 1, "grace-sqa": 2,
    "scienceqa-official": 1,
}  # fmt: skip
STATED = {"person": 78, "book": 20, "town": 1, "mineral": 1}  # how often each kind is stated

CAPTION, TELL, STATEMENT, ANSWER, DRILL = 1.0, 1.0, 3.0, 2.0, 1.0  # weight of a text in the loss
PROMPT = 0.3  # of a drill's prompt, which is the only one that counts

_ITEMS = (*names.JOBS, *names.PETS, *names.FOODS, *names.INSTRUMENTS, *names.TOWNS, *SHAPES)

Row = tuple[list[int], list[float]]  # token ids and their weights


class Pile(NamedTuple):
    """Rows: ids (n, LENGTH) int16, weights (n, LENGTH) fp16, grids (n, 6, 6) int16 or (0,)."""

    ids: NDArray[np.int16]
    weights: NDArray[np.float16]
    grids: NDArray[np.int16]


class Corpus(NamedTuple):
    """Captions of pictures, questions about pictures, facts and questions, and drills."""

    captions: Pile
    pictures: Pile
    texts: Pile
    drills: Pile


class Amounts(NamedTuple):
    """How much is drawn: rows with a caption, with questions, and texts without a picture."""

    captions: int = 200_000
    pictures: int = 500_000
    questions: int = 800_000
    statements: int = 1_200_000
    drills: int = 400_000

    def part(self, jobs: int) -> Amounts:
        """One of `jobs` equal parts."""
        return Amounts(*(amount // jobs for amount in self))


def make(
    seed: int,
    amounts: Amounts,
    held_out: frozenset[str],
    progress: Callable[[str, int, int], None],
) -> Corpus:
    """Draw the corpus in worker processes; the same arguments give the same rows.

    Args:
        seed: of facts and rows.
        amounts: how much of everything.
        held_out: identities (`benchmark.identities`) of scenes that must not appear. Facts need
            none: a question of val or test has a wording that train does not use.
        progress: callback.
    """
    parts = [(seed, job, amounts.part(JOBS), held_out) for job in range(JOBS)]
    done: list[Corpus] = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        for part in pool.map(_part, parts):
            done.append(part)
            progress("Drawing the corpus", len(done), JOBS)

    def joined(piles: list[Pile]) -> Pile:
        return Pile(*(np.concatenate(column) for column in zip(*piles, strict=True)))

    return Corpus(*(joined(list(piles)) for piles in zip(*done, strict=True)))


def _part(given: tuple[int, int, Amounts, frozenset[str]]) -> Corpus:
    seed, job, amounts, held_out = given
    rng, facts = random.Random(f"{seed}/corpus/{job}"), draw_facts(seed)

    def scenes(count: int) -> list[Made]:
        return [_scene(rng, facts, held_out) for _ in range(count)]

    described, asked = scenes(amounts.captions), scenes(amounts.pictures)
    kinds = rng.choices(list(STATED), list(STATED.values()), k=amounts.statements)
    texts = [_statement(rng, facts, kind, facts.draw(kind, rng)) for kind in kinds]
    texts += [_question(rng, draw(rng, facts, "train", TEXTS)) for _ in range(amounts.questions)]
    rng.shuffle(texts)
    return Corpus(
        _pile([_caption(made) for made in described], described),
        _pile([_conversation(rng, facts, made) for made in asked], asked),
        _pile(_packed(texts), []),
        _pile([_drill(rng, facts) for _ in range(amounts.drills)], []),
    )


def _scene(rng: random.Random, facts: Facts, held_out: frozenset[str]) -> Made:
    while True:
        made = draw(rng, facts, "train", PICTURES)
        if not identities(made) & held_out:
            return made


def _caption(made: Made) -> Row:
    assert made.grid is not None
    return _row(models.DESCRIBE, f" {caption(made.grid)}", CAPTION, picture=True)


def _conversation(rng: random.Random, facts: Facts, made: Made) -> Row:
    """A question, then tells while they fit."""
    assert made.grid is not None
    ids, weights = _question(rng, made)
    for asked, told in tells(made.grid, facts, rng):
        turn, shares = _row(asked, told, TELL, picture=False)
        if len(ids) + len(turn) > LENGTH:
            break
        ids, weights = ids + turn, weights + shares
    return ids, weights


def _drill(rng: random.Random, facts: Facts) -> Row:
    """Find what was said before: the letters of a list, or a story told in another order.

    Without these a small model never learns to choose a letter. The prompt counts a little too:
    which letter comes next in a list depends on the one before.
    """
    if rng.random() < 0.3:
        sentences = draw(rng, facts, "train", ("story",)).hint.removesuffix(".").split(". ")
        asked = f"{'. '.join(sentences)}. {models.AGAIN}"
        told = f" {'. '.join(rng.sample(sentences, len(sentences)))}."
    else:
        letters, items = _listed(rng, facts)
        lines = list(zip(letters, items, strict=True))
        asked = "\n".join(f"{letter}. {item}" for letter, item in lines) + models.WORKED
        shuffled = rng.sample(lines, len(lines))
        told = f" {', '.join(f'{item}. {letter}' for letter, item in shuffled)}"
    ids, weights = _row(asked, told, DRILL, picture=False)
    prompt = weights.count(0.0)
    return ids, [weight or PROMPT / prompt for weight in weights]


def _listed(rng: random.Random, facts: Facts) -> tuple[Sequence[str], Sequence[str]]:
    """The options of a question with their letters, or a long list with drawn letters."""
    if rng.random() < 0.5:
        choices = draw(rng, facts, "train").choices
        return LETTERS[: len(choices)], choices
    count = rng.randint(8, 14)
    return rng.sample("ABCDE" + "".join(TOWN_LETTERS), count), rng.sample(_ITEMS, count)


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
    text, answer = protocols.with_answer(question, "llava-sqa" if name == WORKED else name)
    if name == WORKED:
        text = text.replace(prompts.LETTER_SUFFIX, models.WORKED)
        answer = f" {made.choices[made.answer]}.{answer}"
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


def _pile(rows: list[Row], scenes: list[Made]) -> Pile:
    ids = np.full((len(rows), LENGTH), models.PAD, dtype=np.int16)
    weights = np.zeros((len(rows), LENGTH), dtype=np.float16)
    for i, (tokens, shares) in enumerate(rows):
        ids[i, : len(tokens)] = tokens
        weights[i, : len(shares)] = shares
    grids = [made.grid for made in scenes if made.grid is not None]
    return Pile(ids, weights, np.stack(grids) if grids else np.zeros(0, np.int16))
