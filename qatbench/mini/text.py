"""A seeded text-only benchmark in the original ScienceQA layout; every word of it is our own.

A family is a list of items, templates and a rule that turns one item into a question. Each item
belongs to one split for good (`_deal`), in every family that uses it, and wrong choices come from
items of the same split or from a closed set of labels: a test question asks about words that no
training question asks about.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from qatbench.errors import UsageError
from qatbench.mini import words
from qatbench.mini.layout import new_folder, write_problems
from qatbench.mini.words import FAMILIES, Family, Item

SPLITS = ("train", "val", "test")
_DEAL = ("train", "test", "train", "test", "val", "train", "test", "train", "test")  # 4 : 1 : 4


class Draft(NamedTuple):
    """A question before its choices are drawn and shuffled."""

    text: str
    right: str
    wrong: list[str]
    hint: str = ""


class Made(NamedTuple):
    """One finished question: its split, the word it asks about, its problems.json entry."""

    split: str
    item: str
    record: dict[str, Any]


def build(out: Path, *, seed: int = 0, train: int = 600, val: int = 150, test: int = 600) -> Path:
    """Write the benchmark to `out`: problems.json, pid_splits.json and an empty images/.

    Written beside `out` and renamed, so a reader sees all of it or nothing; the same arguments
    give the same bytes.

    Returns: `out`, absolute.
    Raises: UsageError if `out` is a file or a folder that is not empty, or if a split is to hold
        fewer than one question or more than the word lists yield.
    """
    out = Path(out).absolute()
    made = questions(seed, {"train": train, "val": val, "test": test})
    problems = {str(pid): question.record for pid, question in enumerate(made, start=1)}
    pids = {s: [pid for pid, q in problems.items() if q["split"] == s] for s in SPLITS}
    with new_folder(out) as new:
        write_problems(new, problems, pids)
    return out


def questions(seed: int, sizes: dict[str, int]) -> list[Made]:
    """All questions of all splits, shuffled together; see `build` for what is raised."""
    rng = random.Random(seed)
    split_of = _deal(rng)
    made = [one for split in SPLITS for one in _fill(split, sizes[split], split_of, rng)]
    home: dict[str, str] = {}
    for one in made:
        if home.setdefault(identity(one.record), one.split) != one.split:
            raise AssertionError(f"in two splits: {one.record['question']!r}")
    rng.shuffle(made)
    return made


def identity(record: dict[str, Any]) -> str:
    """Key that equal questions share: the words of the text and the set of choices."""
    parts = (record["question"], *record["choices"])
    question, *choices = (re.sub(r"\W+", " ", part.lower()).strip() for part in parts)
    return "|".join((question, *sorted(choices)))


def _deal(rng: random.Random) -> dict[str, str]:
    """Give every asked word its split, label by label; a word met before keeps its split."""
    split_of: dict[str, str] = {}
    for family in FAMILIES:
        groups: dict[str, list[str]] = {}
        for item in family.items:
            groups.setdefault(item[1] if family.rule == "label" else "", []).append(item[0])
        for group in groups.values():
            new = [word for word in group if word not in split_of]
            rng.shuffle(new)
            split_of.update((word, _DEAL[i % len(_DEAL)]) for i, word in enumerate(new))
    return split_of


def _fill(split: str, size: int, split_of: dict[str, str], rng: random.Random) -> Iterator[Made]:
    """Take from every family in turn, so that all weigh the same until one runs dry."""
    if size < 1:
        raise UsageError(f"{split} must hold at least one question, got {size}")
    sources = [_offers(family, split, split_of, rng) for family in FAMILIES]
    seen: set[str] = set()
    while len(seen) < size and sources:
        for source in list(sources):
            one = next((one for one in source if identity(one.record) not in seen), None)
            if one is None:
                sources.remove(source)
            elif len(seen) < size:
                seen.add(identity(one.record))
                yield one
    if len(seen) < size:
        raise UsageError(
            f"{split}: {size} questions asked for, the word lists yield {len(seen)}",
            hint=f"ask for at most {len(seen)}",
        )


def _offers(
    family: Family, split: str, split_of: dict[str, str], rng: random.Random
) -> Iterator[Made]:
    """Every item of the split with every template, once, in random order."""
    pool = [item for item in family.items if split_of[item[0]] == split]
    pairs = list(product(pool, family.templates))
    rng.shuffle(pairs)
    for item, template in pairs:
        draft = RULES[family.rule](item, template, pool, rng)
        wrong = [choice for choice in dict.fromkeys(draft.wrong) if choice != draft.right]
        if wrong:
            yield Made(split, item[0], _record(family, split, draft, wrong, rng))


def _record(
    family: Family, split: str, draft: Draft, wrong: list[str], rng: random.Random
) -> dict[str, Any]:
    count = rng.randint(1, min(4, len(wrong)))  # wrong choices: two to five choices in all
    choices = [draft.right, *rng.sample(wrong, count)]
    rng.shuffle(choices)
    return {
        "question": draft.text,
        "choices": choices,
        "answer": choices.index(draft.right),
        "hint": draft.hint,
        "image": None,
        "task": "closed choice",
        "grade": f"grade{rng.randint(*family.grades)}",
        "subject": family.subject,
        "topic": family.topic,
        "category": family.category,
        "skill": family.skill,
        "lecture": "",
        "solution": "",
        "split": split,
    }


def _an(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' and not word.startswith('uk') else 'a'} {word}"


def _label(item: Item, template: str, pool: list[Item], rng: random.Random) -> Draft:
    """Name the label of a word, or pick the word that has the label."""
    word, label = item
    text = template.format(x=word, ax=_an(word), label=label, alabel=_an(label))
    if "label}" in template:
        return Draft(text, word, [other for other, its in pool if its != label])
    return Draft(text, label, [its for _, its in pool])


def _fact(item: Item, template: str, pool: list[Item], rng: random.Random) -> Draft:
    """From the word to its fact, or from the fact back to the word."""
    text = template.format(x=item[0], ax=_an(item[0]), fact=item[1])
    asked = 0 if "{fact}" in template else 1
    return Draft(text, item[asked], [other[asked] for other in pool])


def _size(item: Item, template: str, pool: list[Item], rng: random.Random) -> Draft:
    what, number, *units = item
    right, *wrong = (f"{number} {unit}" for unit in units)
    return Draft(template.format(x=what), right, wrong)


def _plural(item: Item, template: str, pool: list[Item], rng: random.Random) -> Draft:
    one, many = item
    doubled = f"{one}'s" if many.endswith("s") else f"{many}s"
    return Draft(template.format(x=one), many, [one, f"{one}s", f"{one}es", doubled])


def _past(item: Item, template: str, pool: list[Item], rng: random.Random) -> Draft:
    base, past, rest = item
    regular = base + ("d" if base.endswith("e") else "ed")
    who = rng.choice(words.WHO)
    text = template.format(x=base, who=who[0].lower() + who[1:], rest=rest)
    return Draft(text, past, [base, f"will {base}", regular, f"to {base}"])


def _sentence(item: Item, tense: str, who: str) -> str:
    base, past, rest = item
    verb = {"past": past, "present": base, "future": f"will {base}"}[tense]
    return f"{who} {verb} {rest}."


def _tense(item: Item, template: str, pool: list[Item], rng: random.Random) -> Draft:
    """`template` is a tense, or "pick" and a tense."""
    who, tense = rng.choice(words.WHO), template.split()[-1]
    others = [other for other in ("past", "present", "future") if other != tense]
    sentence = _sentence(item, tense, who)
    if template == tense:
        return Draft(f'Which tense is used in this sentence? "{sentence}"', tense, others)
    wrong = [_sentence(other, rng.choice(others), who) for other in pool if other != item]
    return Draft(f"Which sentence is in the {tense} tense?", sentence, wrong)


def _fragment(item: Item, template: str, pool: list[Item], rng: random.Random) -> Draft:
    """Tell a complete sentence from a fragment; `template` names the one to find."""

    def write(verb: Item, kind: str) -> str:
        who = rng.choice(words.WHO)
        whole = _sentence(verb, "past", who)
        lost_verb = f"{who} and {verb[2]}."
        lost_subject = f"{verb[1].capitalize()} {verb[2]} after school."
        dependent = f"Because {whole[0].lower()}{whole[1:]}"
        return whole if kind == "sentence" else rng.choice((lost_verb, lost_subject, dependent))

    other = "fragment" if template.endswith("sentence?") else "sentence"
    kind = "sentence" if other == "fragment" else "fragment"
    return Draft(template, write(item, kind), [write(verb, other) for verb in pool if verb != item])


def _guide(item: Item, template: str, pool: list[Item], rng: random.Random) -> Draft:
    word = item[0]
    low = rng.choice([guide for guide in words.GUIDES if guide < word][-6:])
    high = rng.choice([guide for guide in words.GUIDES if guide > word][:6])
    wrong = [other for other, _ in pool if not low <= other <= high]
    return Draft(template.format(low=low, high=high), word, wrong)


def _story(item: Item, template: str, pool: list[Item], rng: random.Random) -> Draft:
    """Hide a thing: the hint names its place, and one wrong place too."""
    (a, b), (here, there) = rng.sample(words.NAMES, 2), rng.sample(words.PLACES, 2)
    if "now" in template:
        hint = f"{a} found the {item[0]} in the {there} and carried it to the {here}."
    else:
        hint = f"{a} put the {item[0]} in the {here}. {b} looked for it in the {there}."
    text = template.format(x=item[0], a=a)
    return Draft(text, f"in the {here}", [f"in the {place}" for place in words.PLACES], hint)


def _meal(item: Item, template: str, pool: list[Item], rng: random.Random) -> Draft:
    morning, evening = rng.sample(words.FOODS, 2)
    hint = f"In this story, {_an(item[0])} eats {morning} in the morning and {evening} at night."
    right = morning if "morning" in template else evening
    return Draft(template.format(x=item[0]), right, list(words.FOODS), hint)


def _trade(item: Item, template: str, pool: list[Item], rng: random.Random) -> Draft:
    mine, theirs = item[0], rng.choice([other[0] for other in pool if other != item])
    a, b = rng.sample(words.NAMES, 2)
    hint = f"{a} has {mine}. {b} has {theirs}. The two friends trade with each other."
    return Draft(template.format(a=a, b=b, x=mine), theirs, [other[0] for other in pool], hint)


Rule = Callable[[Item, str, list[Item], random.Random], Draft]

RULES: dict[str, Rule] = {
    "label": _label,
    "fact": _fact,
    "size": _size,
    "plural": _plural,
    "past": _past,
    "tense": _tense,
    "fragment": _fragment,
    "guide": _guide,
    "story": _story,
    "meal": _meal,
    "trade": _trade,
}
