"""The question kinds of the world, and finished questions with their choices."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from qatbench.mini import atlas, recall, tray
from qatbench.mini.draft import Draft
from qatbench.mini.draw import Grid
from qatbench.mini.facts import Facts

Rule = Callable[[random.Random, Facts, str], Draft]


class Kind(NamedTuple):
    """One kind of question: where ScienceQA and MMBench would file it, and how often it comes."""

    rule: Rule
    weight: float
    subject: str
    topic: str
    category: str  # ScienceQA's category is the skill's family
    skill: str
    grades: tuple[int, int]
    mmbench: tuple[str, str] = ("", "")  # category, l2-category; only with a picture


def _seen(rule: Callable[[random.Random, Facts], Draft]) -> Rule:
    """A rule about a picture: the split plays no part, as scenes are drawn anew."""
    return lambda rng, facts, split: rule(rng, facts)


_NAT, _SOC, _LAN = "natural science", "social science", "language science"
_COLOR = ("attribute_recognition", "finegrained_perception (instance-level)")
_PLACE = ("object_localization", "finegrained_perception (instance-level)")
_COUNT = ("object_localization", "finegrained_perception (instance-level)")
_SPACE = ("spatial_relationship", "finegrained_perception (cross-instance)")
_COMPARE = ("attribute_comparison", "finegrained_perception (cross-instance)")
_NATURE = ("natural_relation", "relation_reasoning")
_WORLD = ("physical_property_reasoning", "attribute_reasoning")
_MAP = ("structuralized_imagetext_understanding", "logic_reasoning")

KINDS: dict[str, Kind] = {
    "color_of": Kind(_seen(tray.color_of), 3, _NAT, "earth-science", "Minerals",
                     "Name the color of a sample", (1, 3), _COLOR),
    "corner": Kind(_seen(tray.corner), 3, _NAT, "earth-science", "Minerals",
                   "Find a sample on a tray", (1, 3), _PLACE),
    "count_color": Kind(_seen(tray.count_color), 3, _NAT, "earth-science", "Counting",
                        "Count samples of a color", (1, 3), _COUNT),
    "count_shape": Kind(_seen(tray.count_shape), 3, _NAT, "earth-science", "Counting",
                        "Count samples of a shape", (1, 3), _COUNT),
    "count_hollow": Kind(_seen(tray.count_hollow), 1, _NAT, "earth-science", "Counting",
                         "Count hollow samples", (1, 3), _COUNT),
    "more": Kind(_seen(tray.more), 2, _NAT, "earth-science", "Counting",
                 "Compare two counts", (2, 4), _COMPARE),
    "neighbour": Kind(_seen(tray.neighbour), 5, _NAT, "earth-science", "Minerals",
                      "Find the sample beside another", (3, 5), _SPACE),
    "hop": Kind(_seen(tray.hop), 5, _NAT, "earth-science", "Minerals",
                "Name the color beside a sample", (4, 6), _SPACE),
    "mineral": Kind(_seen(tray.mineral), 6, _NAT, "earth-science", "Properties of minerals",
                    "Recall a property of a mineral", (6, 9), _WORLD),
    "count_mineral": Kind(_seen(tray.count_mineral), 3, _NAT, "earth-science",
                          "Properties of minerals", "Count a mineral", (6, 9), _NATURE),
    "farthest": Kind(_seen(atlas.farthest), 4, _SOC, "geography", "Maps",
                     "Read directions on a map", (2, 5), _MAP),
    "land_of": Kind(_seen(atlas.land_of), 3, _SOC, "geography", "Maps",
                    "Read the land on a map", (2, 5), _MAP),
    "land_of_farthest": Kind(_seen(atlas.land_of_farthest), 4, _SOC, "geography", "Maps",
                             "Read land and directions", (4, 7), _MAP),
    "count_towns": Kind(_seen(atlas.count_towns), 2, _SOC, "geography", "Maps",
                        "Count towns on a map", (4, 7), _COUNT),
    "next_town": Kind(_seen(atlas.next_town), 4, _SOC, "geography", "Maps",
                      "Find the next town", (4, 7), _SPACE),
    "same_land": Kind(_seen(atlas.same_land), 2, _SOC, "geography", "Maps",
                      "Compare the land of towns", (4, 7), _COMPARE),
    "fact_of_farthest": Kind(_seen(atlas.fact_of_farthest), 4, _SOC, "geography", "Towns",
                             "Recall a fact about a town", (6, 9), _WORLD),
    "name_of_farthest": Kind(_seen(atlas.name_of_farthest), 3, _SOC, "geography", "Towns",
                         "Recall the name of a town", (6, 9), _WORLD),
    "about_person": Kind(recall.about_person, 26, _SOC, "civics", "People",
                         "Recall a fact about a person", (5, 10)),
    "home_of_person": Kind(recall.home_of_person, 4, _SOC, "civics", "People",
                           "Combine two facts", (8, 12)),
    "about_book": Kind(recall.about_book, 8, _LAN, "literature", "Books",
                       "Recall a fact about a book", (5, 10)),
    "story": Kind(recall.story, 3, _LAN, "reading-comprehension", "Stories",
                  "Find a detail in a story", (2, 6)),
}  # fmt: skip
PICTURES = tuple(name for name, kind in KINDS.items() if kind.mmbench[0])


class Made(NamedTuple):
    """One finished question."""

    kind: str
    text: str
    hint: str
    choices: tuple[str, ...]
    answer: int
    grid: Grid | None


def draw(
    rng: random.Random, facts: Facts, split: str, kinds: tuple[str, ...] = tuple(KINDS)
) -> Made:
    """One question: a drawn kind, two to five choices in a drawn order."""
    name = rng.choices(kinds, [KINDS[kind].weight for kind in kinds])[0]
    return finish(name, KINDS[name].rule(rng, facts, split), rng)


def finish(name: str, draft: Draft, rng: random.Random) -> Made:
    """Draw and shuffle the choices: wrong ones come from the near end of the list."""
    wrong = [choice for choice in dict.fromkeys(draft.near) if choice != draft.right]
    count = min(rng.randint(2, 4) if len(wrong) > 1 else 1, len(wrong))
    choices = [draft.right, *rng.sample(wrong[: count + 2], count)]
    rng.shuffle(choices)
    return Made(
        name, draft.text, draft.hint, tuple(choices), choices.index(draft.right), draft.grid
    )
