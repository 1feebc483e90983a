"""Tells and drills: what the built-in models learn from beyond the questions is true."""

from __future__ import annotations

import random
import re

import pytest
import torch
import torch.nn.functional as F

from qatbench.mini import atlas, corpus, draw, models, names, pretrain, questions, tray
from qatbench.mini.facts import Facts, facts
from qatbench.mini.tell import tells


@pytest.fixture(scope="module")
def world() -> Facts:
    return facts(0)


def tiles(made: questions.Made) -> dict[tuple[int, int], str]:
    assert made.grid is not None
    return {(r, c): draw.tile_words()[made.grid[r, c]] for r in range(6) for c in range(6)}


STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


def test_what_is_around_a_sample(world: Facts) -> None:
    rng, told = random.Random(1), 0
    for _ in range(40):
        made = questions.draw(rng, world, "train", ("neighbour",))
        seen = tiles(made)
        for asked, answer in tells(made.grid, world, rng):  # type: ignore[arg-type]
            if not (found := re.fullmatch(r"What is around the (.+)\?", asked)):
                continue
            (place,) = [p for p, w in seen.items() if w == found[1] or w.split()[-1] == found[1]]
            its, around = answer.strip().split("; ")
            assert its == seen[place]
            assert len(around.split(", ")) == 4
            for part in around.split(", "):
                step = next(step for step in STEPS if part.startswith(step))
                beside = (place[0] + STEPS[step][0], place[1] + STEPS[step][1])
                assert part == f"{step} {seen.get(beside, 'the edge')}"
            told += 1
    assert told > 100


def test_what_is_known_of_a_corner(world: Facts) -> None:
    rng, told = random.Random(2), 0
    for _ in range(60):
        made = questions.draw(rng, world, "train", ("corner",))
        for asked, answer in tells(made.grid, world, rng):  # type: ignore[arg-type]
            if not (found := re.search(r"in the (\w+ \w+) corner", asked)):
                continue
            words = tiles(made)[tray.CORNERS[found[1]]]
            color, shape = words.removeprefix("hollow ").split()
            number = list(draw.COLORS).index(color) * len(draw.SHAPES) + draw.SHAPES.index(shape)
            known = [world.value("mineral", number, a) for a in range(3)]
            assert answer == f" {' '.join((words, *known))}"
            told += 1
    assert told >= 60


def test_what_is_known_of_towns(world: Facts) -> None:
    rng, told, ways = random.Random(3), 0, set()
    for _ in range(40):
        made = questions.draw(rng, world, "train", ("next_town",))
        found = {w.split()[1]: (p, w.split()[0]) for p, w in tiles(made).items() if " " in w}
        for asked, answer in tells(made.grid, world, rng):  # type: ignore[arg-type]
            if match := re.search(r"farthest (\w+)", asked):
                axis, sign = {"north": (0, 1), "south": (0, -1), "west": (1, 1), "east": (1, -1)}[
                    match[1]
                ]
                town = min(found, key=lambda t: sign * found[t][0][axis])
                number = draw.TOWN_LETTERS.index(town)
                known = [world.value("town", number, a) for a in range(2)]
                assert answer == f" {' '.join((town, found[town][1], names.TOWNS[number], *known))}"
                told += 1
            elif match := re.search(r"around town (\w)", asked):
                assert answer.startswith(f" {found[match[1]][1]}; north ")
        way, here = re.fullmatch(r"Which town is directly (\w+) of town (\w)\?", made.text).groups()  # type: ignore[union-attr]
        around = dict(tells(made.grid, world, rng))[f"What is around town {here}?"]  # type: ignore[arg-type]
        right = made.choices[made.answer].split()[1]
        assert f"{way} {right}" in around.split("; ")[1].split(", ")
        ways.add(way)
    assert ways == set(atlas.AXES)
    assert told > 60


def test_drills_name_the_letter_of_every_item_and_stories_keep_their_sentences(
    world: Facts,
) -> None:
    rng, words = random.Random(4), models.vocabulary()
    for _ in range(200):
        ids, weights = corpus._drill(rng, world)
        assert models.UNKNOWN not in ids
        assert min(weights) > 0
        text = " ".join(words[i] for i in ids)
        prompt, answer = text.split(" ASSISTANT : ")
        if "Tell it again" in prompt:
            said = prompt.removeprefix("USER : ").removesuffix(" Tell it again .")
            parts = answer.removesuffix(" </s>").split(" . ")
            assert sorted(p.removesuffix(" .") for p in parts) == sorted(
                p.removesuffix(" .") for p in said.split(" . ")
            )
        else:
            listed = prompt.removeprefix("USER : ").split(" Answer with")[0]
            for part in answer.removesuffix(" </s>").split(" , "):
                item, letter = part.rsplit(" . ", 1)
                assert f"{letter} . {item}" in listed


def test_the_step_computes_the_models_own_loss(world: Facts) -> None:
    """All piles in one forward equal LLaVA's forward pile by pile."""
    rng = random.Random(0)
    model = models.build("student", 0).eval()
    made = [corpus._scene(rng, world, frozenset()) for _ in range(4)]
    piles = corpus.Corpus(
        corpus._pile([corpus._caption(one) for one in made[:2]], made[:2]),
        corpus._pile([corpus._conversation(rng, world, one) for one in made[2:]], made[2:]),
        corpus._pile([corpus._statement(rng, world, "person", n) for n in range(3)], []),
        corpus._pile([corpus._drill(rng, world) for _ in range(2)], []),
    )
    settings = pretrain.PretrainSettings(rows=(2, 2, 3, 2), compile=False)
    step = pretrain._Step(model, piles, settings, "cpu")
    step.prepare(0.0)
    step.run()
    for told, stream in zip(step.losses, step.streams, strict=True):
        ids, weights, grids = stream.rows()
        pixels = {"pixel_values": pretrain._pixels(step.tiles, grids)} if len(grids) else {}
        with torch.no_grad():
            logits = model(input_ids=ids, **pixels).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        shares = weights[:, 1:].float().flatten()
        expected = (losses * shares).sum() / shares.sum()
        torch.testing.assert_close(told, expected, atol=1e-4, rtol=0)
