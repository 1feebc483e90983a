"""The built-in text benchmark: layout, determinism, splits that share nothing, no giveaway."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chisquare

from qatbench import mini
from qatbench.errors import UsageError
from qatbench.mini import text, words

SIZES = {"train": 600, "val": 150, "test": 600}
KEYS = [  # in the order of the original problems.json
    *("question", "choices", "answer", "hint", "image", "task", "grade", "subject", "topic"),
    *("category", "skill", "lecture", "solution", "split"),
]
Problems = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text.build(tmp_path_factory.mktemp("mini") / "deep" / "text")


@pytest.fixture(scope="module")
def problems(benchmark: Path) -> Problems:
    found: Problems = json.loads((benchmark / "problems.json").read_text("utf-8"))
    return found


def test_layout_is_scienceqa(benchmark: Path, problems: Problems) -> None:
    assert sorted(p.name for p in benchmark.iterdir()) == [
        "images",
        "pid_splits.json",
        "problems.json",
    ]
    assert list((benchmark / "images").iterdir()) == []
    for record in problems.values():
        assert list(record) == KEYS
        assert record["image"] is None
        assert record["lecture"] == record["solution"] == ""
        assert record["grade"] in {f"grade{i}" for i in range(1, 13)}
        assert all(record[key] for key in ("question", "task", "topic", "category", "skill"))
    assert not [p for p in benchmark.parent.iterdir() if p != benchmark]  # no scratch left


def test_pid_splits_say_what_the_problems_say(benchmark: Path, problems: Problems) -> None:
    splits = json.loads((benchmark / "pid_splits.json").read_text("utf-8"))
    for name, size in SIZES.items():
        assert len(splits[name]) == size
        assert {problems[pid]["split"] for pid in splits[name]} == {name}
        assert len(splits[f"mini{name}"]) == size // 10
        assert set(splits[f"mini{name}"]) < set(splits[name])
    assert set(splits["trainval"]) == set(splits["train"]) | set(splits["val"])
    assert len(splits["trainval"]) == 750
    assert len(splits) == 7
    assert len(problems) == 1350


def test_choices_are_distinct_and_the_answer_is_one_of_them(problems: Problems) -> None:
    for record in problems.values():
        assert 2 <= len(record["choices"]) <= 5
        assert len({choice.lower() for choice in record["choices"]}) == len(record["choices"])
        assert 0 <= record["answer"] < len(record["choices"])
    assert {len(record["choices"]) for record in problems.values()} == {2, 3, 4, 5}


def test_every_subject_and_fourteen_topics_in_every_split(problems: Problems) -> None:
    for split in SIZES:
        records = [record for record in problems.values() if record["split"] == split]
        assert {r["subject"] for r in records} == {
            "natural science",
            "social science",
            "language science",
        }
        topics = Counter(record["topic"] for record in records)
        assert len(topics) == 14
        assert max(topics.values()) < 0.2 * len(records)
        assert sum(bool(record["hint"]) for record in records) > 0.1 * len(records)


def test_splits_share_no_question_and_none_comes_twice(problems: Problems) -> None:
    keys = [text.identity(record) for record in problems.values()]
    assert len(set(keys)) == len(keys)


def test_a_question_offered_twice_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = text.questions(0, {"train": 1, "val": 1, "test": 1})[0]
    monkeypatch.setattr(text, "_offers", lambda *_: iter([one, one]))
    taken: list[text.Made] = []
    with pytest.raises(UsageError, match="the word lists yield 1"):
        taken.extend(text._fill("train", 2, {}, random.Random(0)))
    assert taken == [one]  # extend() keeps what came before the error


def test_identity_ignores_case_punctuation_and_the_order_of_choices() -> None:
    one = {"question": "Is it  wet?", "choices": ["Yes", "no"]}
    assert text.identity(one) == text.identity({"question": "is it wet", "choices": ["no", "yes"]})
    assert text.identity(one) != text.identity({"question": "is it wet", "choices": ["no"]})
    assert text.identity(one) != text.identity({"question": "is it dry", "choices": ["no", "yes"]})


@pytest.mark.parametrize("seed", [0, 1])
def test_no_word_is_asked_about_in_two_splits(seed: int) -> None:
    made = text.questions(seed, SIZES)
    asked = {s: {one.item for one in made if one.split == s} for s in SIZES}
    assert asked["train"].isdisjoint(asked["test"])
    assert asked["train"].isdisjoint(asked["val"])
    assert asked["val"].isdisjoint(asked["test"])


def test_a_question_in_two_splits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    made = text.questions(0, {"train": 1, "val": 1, "test": 1})[0]
    monkeypatch.setattr(text, "_fill", lambda split, *_: [made._replace(split=split)])
    with pytest.raises(AssertionError, match="in two splits"):
        text.questions(0, {"train": 1, "val": 1, "test": 1})


def test_answers_are_uniform_over_positions() -> None:
    made = [one.record for seed in range(4) for one in text.questions(seed, SIZES)]
    for count in (2, 3, 4, 5):
        at = Counter(r["answer"] for r in made if len(r["choices"]) == count)
        observed = [at[position] for position in range(count)]
        # fixed seeds, 600 or more questions each: a uniform shuffle gives p < 1e-3 once in 250
        # such tests, while an answer 1.3 times too often at one position gives p < 1e-4
        assert sum(observed) > 600
        assert chisquare(observed).pvalue > 1e-3


def test_the_longest_or_shortest_choice_is_no_giveaway(problems: Problems) -> None:
    chance = sum(1 / len(r["choices"]) for r in problems.values()) / len(problems)
    for pick in (min, max):
        hits = [r["choices"].index(pick(r["choices"], key=len)) for r in problems.values()]
        right = sum(h == r["answer"] for h, r in zip(hits, problems.values(), strict=True))
        # 4 sd of a guess over 1350 questions is 0.05; the rest is what real word lengths give away
        assert right / len(problems) == pytest.approx(chance, abs=0.12)


def test_hints_hold_the_answer(problems: Problems) -> None:
    hinted = [record for record in problems.values() if record["hint"]]
    for record in hinted:
        right = record["choices"][record["answer"]].removeprefix("in ")
        assert right in record["hint"]


def test_rules_answer_right() -> None:
    rng = random.Random(0)
    verb, other = ("fly", "flew", "a kite"), ("eat", "ate", "the soup")
    past = text.RULES["past"](verb, 'Past of "{x}"?', [verb], rng)
    assert (past.text, past.right) == ('Past of "fly"?', "flew")
    assert past.wrong == ["fly", "will fly", "flyed", "to fly"]
    picked = text.RULES["tense"](verb, "pick future", [verb, other], rng)
    assert picked.right.endswith("will fly a kite.")
    assert all("will" not in sentence for sentence in picked.wrong)
    pool = [("lemon", "noun"), ("always", "adverb"), ("lazy", "adjective")]
    for _ in range(20):
        guide = text.RULES["guide"](("lemon", "noun"), "{low} {high}", pool, rng)
        low, high = guide.text.split()
        assert low < "lemon" < high
        assert all(not low <= word <= high for word in guide.wrong)
        assert "always" in guide.wrong
    back = text.RULES["fact"](("France", "Paris"), "{fact}?", [("Peru", "Lima")], rng)
    assert back[:3] == ("Paris?", "France", ["Peru"])


def test_labels_of_the_word_lists_do_not_overlap() -> None:
    for family in words.FAMILIES:
        asked = [item[0] for item in family.items]
        assert len(set(asked)) == len(asked), family.skill


def test_same_seed_same_bytes(benchmark: Path, tmp_path: Path) -> None:
    again, other = text.build(tmp_path / "again"), text.build(tmp_path / "other", seed=1)
    for name in ("problems.json", "pid_splits.json"):
        assert (again / name).read_bytes() == (benchmark / name).read_bytes()
        assert (other / name).read_bytes() != (benchmark / name).read_bytes()


def test_build_takes_an_empty_folder_and_refuses_a_full_one(tmp_path: Path) -> None:
    out = text.build(tmp_path, train=5, val=1, test=3)
    before = (out / "problems.json").read_bytes()
    assert len(json.loads(before)) == 9
    with pytest.raises(UsageError, match="not empty"):
        text.build(tmp_path, seed=1)
    assert (out / "problems.json").read_bytes() == before


@pytest.mark.parametrize("size", [0, 5000])
def test_build_refuses_sizes_it_cannot_fill(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match="train"):
        text.build(tmp_path / "out", train=size)
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("qatbench.mini.layout.os.rename", fail)
    with pytest.raises(OSError, match="disk full"):
        text.build(tmp_path / "out", train=5, val=5, test=5)
    assert list(tmp_path.iterdir()) == []


def test_folder_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = mini.folder("mini-text")
    assert first == tmp_path / "qatbench" / f"mini-text-{mini.VERSIONS['mini-text']}-seed0"
    made = (first / "problems.json").stat()
    assert mini.folder("mini-text") == first
    assert (first / "problems.json").stat().st_mtime_ns == made.st_mtime_ns
    assert (first / "problems.json").stat().st_ino == made.st_ino


def _ask(_: int) -> str:
    return str(mini.folder("mini-text"))


def test_folder_is_safe_when_two_ask_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        answers = pool.map(_ask, range(4), chunksize=1)
    assert len(set(answers)) == 1
    assert len(json.loads((Path(answers[0]) / "problems.json").read_text("utf-8"))) == 1350
