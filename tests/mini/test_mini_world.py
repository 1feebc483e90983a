"""The drawn world: right answers follow from the picture, and splits share nothing."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qatbench.errors import UsageError
from qatbench.mini import atlas, benchmark, draw, names, questions, tray
from qatbench.mini.facts import KINDS as FACT_KINDS
from qatbench.mini.facts import Facts, facts, home_split, person
from qatbench.tasks import scienceqa

SIZES = {"train": 300, "val": 60, "test": 240}


@pytest.fixture(scope="module")
def world() -> Facts:
    return facts(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark.build(tmp_path_factory.mktemp("mini") / "world", sizes=SIZES, circular=40)


# --- pictures -----------------------------------------------------------------------------------


def test_every_tile_looks_different_and_has_its_own_words() -> None:
    pixels, words = draw.tile_pixels(), draw.tile_words()
    assert pixels.shape == (draw.TILES, 8, 8, 3)
    assert len(words) == len(set(words)) == draw.TILES
    assert len({tile.tobytes() for tile in pixels}) == draw.TILES
    assert words[draw.sample_tile(0, 0, 1)] == "hollow red circle"
    assert words[draw.land_tile(1, 2)] == f"forest {draw.TOWN_LETTERS[2]}"


def test_a_picture_shows_each_tile_at_its_place() -> None:
    grid = np.arange(36, dtype=np.int16).reshape(6, 6)
    picture = draw.picture(grid)
    for row, column in ((0, 0), (2, 5), (5, 1)):
        part = picture[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert np.array_equal(part, draw.tile_pixels()[grid[row, column]])
    opened = Image.open(io.BytesIO(draw.png(grid)))
    assert np.array_equal(np.asarray(opened), picture)


# --- right answers, worked out from the tiles alone ---------------------------------------------


def seen(made: questions.Made) -> dict[tuple[int, int], str]:
    assert made.grid is not None
    return {(r, c): draw.tile_words()[made.grid[r, c]] for r in range(6) for c in range(6)}


def beside(place: tuple[int, int], step: str) -> tuple[int, int]:
    down, right = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[step]
    return place[0] + down, place[1] + right


def towns(tiles: dict[tuple[int, int], str]) -> dict[str, tuple[tuple[int, int], str]]:
    """Letter -> (place, land)."""
    split = {place: words.split() for place, words in tiles.items()}
    return {words[1]: (place, words[0]) for place, words in split.items() if len(words) == 2}


def edge(tiles: dict[tuple[int, int], str], way: str) -> str:
    axis, sign = {"north": (0, 1), "south": (0, -1), "west": (1, 1), "east": (1, -1)}[way]
    found = towns(tiles)
    ranked = sorted(found, key=lambda town: sign * found[town][0][axis])
    assert found[ranked[0]][0][axis] != found[ranked[1]][0][axis]
    return ranked[0]


def the_only(tiles: dict[tuple[int, int], str], words: str) -> tuple[int, int]:
    (place,) = [p for p, its in tiles.items() if its == words or its.split()[-1] == words]
    return place


def solve(made: questions.Made, world: Facts) -> str:
    """The answer, by reading the question and looking at the tiles."""
    tiles, text = seen(made), made.text
    mineral = {
        f"{color} {shape}": i
        for i, (color, shape) in enumerate((c, s) for c in draw.COLORS for s in draw.SHAPES)
    }
    if found := re.fullmatch(r"What color is the (\w+)\?", text):
        return tiles[the_only(tiles, found[1])].split()[-2]
    if found := re.fullmatch(r"Which sample is in the (\w+ \w+) corner\?", text):
        return tiles[tray.CORNERS[found[1]]]
    if found := re.fullmatch(r"How many (\w+) samples are there\?", text):
        return names.NUMBERS[sum(found[1] in words.split() for words in tiles.values())]
    if found := re.fullmatch(r"How many samples have the shape of a (\w+)\?", text):
        return names.NUMBERS[sum(found[1] in words.split() for words in tiles.values())]
    if found := re.fullmatch(r"Which color has more samples, (\w+) or (\w+)\?", text):
        counts = Counter(word for words in tiles.values() for word in words.split())
        assert counts[found[1]] != counts[found[2]]
        return max(found[1], found[2], key=lambda color: counts[color])
    if found := re.fullmatch(r"Which sample is directly (\w+(?: of)?) the ([\w ]+)\?", text):
        (place,) = [p for p, words in tiles.items() if words == found[2]]
        return tiles[beside(place, found[1])]
    if found := re.fullmatch(r"What color is the sample directly (.+) the (\w+)\?", text):
        return tiles[beside(the_only(tiles, found[2]), found[1])].split()[-2]
    if found := re.fullmatch(r"How many pieces of (\w+) are there\?", text):
        name = {world.value("mineral", i, 0): kind for kind, i in mineral.items()}[found[1]]
        return names.NUMBERS[sum(words.endswith(name) for words in tiles.values())]
    if "the mineral" in text:
        if found := re.search(r"in the (\w+ \w+) corner", text):
            place = tray.CORNERS[found[1]]
        else:
            found = re.search(r"directly (.+?) the ((?:hollow )?\w+ \w+)", text)
            assert found is not None
            (known,) = [p for p, words in tiles.items() if words == found[2]]
            place = beside(known, found[1])
        number = mineral[tiles[place].removeprefix("hollow ")]
        asked = 0 if "name" in text else 1 if "hardness" in text else 2
        return world.value("mineral", number, asked)
    return solve_map(text, tiles, world)


def solve_map(text: str, tiles: dict[tuple[int, int], str], world: Facts) -> str:
    found = towns(tiles)
    if match := re.search(r"farthest (\w+)", text):
        town = edge(tiles, match[1])
        number = draw.TOWN_LETTERS.index(town)
        if text.startswith("Which town"):
            return f"town {town}"
        if "kind of land" in text:
            return found[town][1]
        if "name" in text:
            return names.TOWNS[number]
        return world.value("town", number, 0 if "sell" in text else 1)
    if match := re.fullmatch(r"On which kind of land is town (\w)\?", text):
        return found[match[1]][1]
    if match := re.fullmatch(r"How many towns lie on (\w+)\?", text):
        return names.NUMBERS[sum(land == match[1] for _, land in found.values())]
    if match := re.fullmatch(r"Which town is on the same kind of land as town (\w)\?", text):
        land = found[match[1]][1]
        (other,) = [t for t, (_, its) in found.items() if its == land and t != match[1]]
        return f"town {other}"
    match = re.fullmatch(r"Which town is directly (\w+) of town (\w)\?", text)
    assert match is not None, text
    axis, sign = atlas.AXES[match[1]]
    here = found[match[2]][0]
    ahead = [
        (abs(place[axis] - here[axis]), town)
        for town, (place, _) in found.items()
        if place[1 - axis] == here[1 - axis] and sign * (here[axis] - place[axis]) > 0
    ]
    return f"town {min(ahead)[1]}"


@pytest.mark.parametrize("kind", questions.PICTURES)
def test_the_right_choice_is_what_the_picture_shows(kind: str, world: Facts) -> None:
    rng = random.Random(kind)
    for _ in range(60):
        made = questions.draw(rng, world, "train", (kind,))
        assert made.choices[made.answer] == solve(made, world), made.text
        assert 2 <= len(made.choices) == len(set(made.choices)) <= 5


@pytest.mark.parametrize("kind", ["about_person", "about_book", "home_of_person"])
def test_facts_asked_are_those_stated(kind: str, world: Facts) -> None:
    rng = random.Random(kind)
    table = {person(n): n for n in range(world.people)}
    for _ in range(40):
        made = questions.draw(rng, world, "test", (kind,))
        right = made.choices[made.answer]
        if kind == "about_book":
            title = re.search(r"The [A-Z]\w+ [A-Z]\w+", made.text)
            assert title is not None
            number = next(n for n in range(4096) if world.subject("book", n) == title[0])
            stated = world.statement("book", number, rng)
        else:
            name = re.search(r"[A-Z]\w+ [A-Z] [A-Z]\w+", made.text)
            assert name is not None
            stated = world.statement("person", table[name[0]], rng)
        if kind == "home_of_person":
            town = int(world.table["person"][table[name[0]], 0])  # type: ignore[index]
            stated = world.statement("town", town, rng)
        assert right in stated


def test_facts_belong_to_one_split_and_names_to_one_person(world: Facts) -> None:
    shares = Counter(home_split("person", n, a) for n in range(3000) for a in range(7))
    assert 0.03 < shares["test"] / 21000 < 0.05
    assert len({person(n) for n in range(world.people)}) == world.people
    for kind, attributes in FACT_KINDS.items():
        assert world.table[kind].shape[1] == len(attributes)


# --- the benchmark ------------------------------------------------------------------------------


def test_splits_share_no_scene_and_no_question(folder: Path) -> None:
    problems = json.loads((folder / "problems.json").read_text())
    homes: dict[str, set[str]] = {}
    for pid, row in problems.items():
        file = folder / "images" / row["split"] / pid / "image.png"
        assert file.is_file() == (row["image"] is not None)
        key = file.read_bytes() if row["image"] else f"{row['hint']}|{row['question']}".encode()
        homes.setdefault(hashlib.sha256(key).hexdigest(), set()).add(f"{row['split']}/{pid}")
    assert len(homes) == sum(SIZES.values())
    pictures = {hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("image.png")}
    with (folder / "mmbench_dev.tsv").open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    import base64

    dev = {hashlib.sha256(base64.b64decode(row["image"])).hexdigest() for row in rows}
    assert len(dev) == 40
    assert not dev & pictures


def test_the_loaders_of_the_real_data_read_it(folder: Path) -> None:
    test = scienceqa.load(folder, "test", subset="all")
    assert len(test) == SIZES["test"]
    assert {q.subject for q in test} == {"natural science", "social science", "language science"}
    assert {len(q.options) for q in test} == {2, 3, 4, 5}
    assert any(q.hint for q in test)
    assert 0.4 < sum(q.has_image for q in test) / len(test) < 0.8
    assert len(scienceqa.load(folder, "trainval", subset="text")) > 0


def test_circular_rows_are_rotations_of_one_question(folder: Path) -> None:
    with (folder / "mmbench_dev.tsv").open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    groups: dict[int, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(int(row["index"]) % benchmark.PASS, []).append(row)
    for passes in groups.values():
        options = [[row[x] for x in "ABCD" if row[x]] for row in passes]
        assert len(passes) == len(options[0])
        assert all(sorted(some) == sorted(options[0]) for some in options)
        assert len({row[row["answer"]] for row in passes}) == 1
        assert len({row["answer"] for row in passes}) == len(passes)


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = benchmark.build(tmp_path / "again", sizes=SIZES, circular=40)
    for file in folder.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (again / file.relative_to(folder)).read_bytes()
    with pytest.raises(UsageError, match="not empty"):
        benchmark.build(folder, sizes=SIZES, circular=40)


def test_no_place_or_wording_of_the_choices_gives_the_answer_away(world: Facts) -> None:
    """Chance level for simple guesses that do not look: first, shortest, most like the others."""

    def alike(choices: tuple[str, ...]) -> int:
        words = [set(choice.split()) for choice in choices]
        shared: list[Any] = [sum(len(a & b) for b in words) for a in words]
        return shared.index(max(shared))

    rng = random.Random(1)
    for kind in questions.PICTURES:
        made = [questions.draw(rng, world, "train", (kind,)) for _ in range(800)]
        chance = sum(1 / len(one.choices) for one in made) / len(made)
        for guess in (lambda c: 0, alike, lambda c: sorted(range(len(c)), key=c.__getitem__)[0]):
            hits = sum(guess(one.choices) == one.answer for one in made) / len(made)
            assert hits < chance + 0.06, kind
