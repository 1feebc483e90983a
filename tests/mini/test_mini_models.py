"""The built-in models' parts: tokenizer, corpus, and a training run of two steps."""

from __future__ import annotations

import io
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from qatbench.errors import UsageError
from qatbench.mini import benchmark, corpus, draw, models, pretrain, questions
from qatbench.mini.facts import Facts, facts, home_split
from qatbench.records import Question
from qatbench.stages.common import silent
from qatbench.tasks import protocols
from qatbench.vlm.layout import grid_problems
from qatbench.vlm.load import find, load


@pytest.fixture(scope="module")
def world() -> Facts:
    return facts(0)


def test_the_tokenizer_splits_as_the_corpus_does_and_knows_every_prompt(world: Facts) -> None:
    tokenizer, rng = models.tokenizer(), random.Random(2)
    for name in protocols.names():
        made = questions.draw(rng, world, "test")
        options = dict(zip("ABCDE", made.choices, strict=False))
        asked = Question(
            id="1", task="scienceqa", text=made.text, options=options, gold="A", hint=made.hint
        )
        text = protocols.get(name).prompt(asked) + protocols.get(name).continuation(asked, "A")
        ids = corpus.encode(text)
        assert tokenizer(text).input_ids == ids
        assert models.UNKNOWN not in ids, name
    assert tokenizer("zebra_x").input_ids.count(models.UNKNOWN) >= 1


@pytest.mark.parametrize("size", list(models.SIZES))
def test_sizes_keep_their_promises(size: str) -> None:
    model = models.build(size, 0)
    limit = {"student": 4.5e6, "teacher": 9e6}[size]
    assert sum(p.numel() for p in model.parameters()) <= limit
    assert grid_problems(model.config.to_dict(), 4, 128) == []


def test_a_row_with_a_picture_is_what_the_processor_makes(world: Facts) -> None:
    made = questions.draw(random.Random(3), world, "train", ("neighbour",))
    assert made.grid is not None
    processor = models.processor()
    parts = [{"type": "image"}, {"type": "text", "text": made.text}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    image = Image.open(io.BytesIO(draw.png(made.grid)))
    wanted = processor(text=[text], images=[image], return_tensors="pt")
    ids, weights = corpus._row(made.text, " red", 1.0, picture=True)
    prompt = wanted["input_ids"][0].tolist()
    assert ids[: len(prompt)] == prompt
    assert [w > 0 for w in weights] == [False] * len(prompt) + [True] * 2
    tiles = pretrain._normalised_tiles("cpu")
    pixels = pretrain._pixels(tiles, torch.from_numpy(made.grid).long()[None])
    torch.testing.assert_close(pixels, wanted["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["about_book", "about_person", "home_of_person"])
def test_no_training_question_uses_the_wording_of_a_test_question(kind: str, world: Facts) -> None:
    rng = random.Random(5)
    asked = {questions.draw(rng, world, "test", (kind,)).text for _ in range(300)}
    trained = {questions.draw(rng, world, "train", (kind,)).text for _ in range(10_000)}
    assert not asked & trained
    shares = [home_split("book", n, a) for n in range(4096) for a in range(3)]
    assert {"test", "val", "train"} == set(shares)


def test_scenes_of_the_benchmark_are_held_out(world: Facts) -> None:
    """All splits and the circular questions; a held-out scene is drawn again."""
    held = pretrain.held_out(0)
    seen: set[str] = set()
    for split, size in benchmark.SIZES.items():
        benchmark.fill(world, split, size, 0, seen)
    dev = benchmark.fill(world, "dev", benchmark.CIRCULAR["dev"], 0, set(seen), questions.PICTURES)
    assert seen < held
    assert all(benchmark.identities(made) <= held for made in dev)
    first = corpus._scene(random.Random(9), world, frozenset())
    again = corpus._scene(random.Random(9), world, frozenset(benchmark.identities(first)))
    assert benchmark.identities(again).isdisjoint(benchmark.identities(first))


def test_statements_share_a_weight_and_answers_have_their_own(world: Facts) -> None:
    rng = random.Random(0)
    _, statement = corpus._statement(rng, world, "person", 7)
    assert sum(statement) == pytest.approx(corpus.STATEMENT)
    made = questions.draw(rng, world, "train", ("color_of",))
    ids, answer = corpus._question(rng, made)
    assert sum(answer) == pytest.approx(corpus.ANSWER)
    assert ids[-1] == models.END
    assert answer[-1] > 0


def test_two_steps_make_a_model_that_every_verb_can_load(tmp_path: Path) -> None:
    amounts = corpus.Amounts(64, 64, 64, 64, 64)
    settings = pretrain.PretrainSettings(steps=2, rows=(2, 3, 4, 2), amounts=amounts, compile=False)
    folder = pretrain.pretrain(settings, tmp_path, "cpu", silent)
    lines = [json.loads(line) for line in (tmp_path / "student.jsonl").read_text().splitlines()]
    assert lines[0]["settings"]["size"] == "student"
    assert lines[-1]["step"] == 2
    loaded = load(find(str(folder)), device="cpu", dtype=torch.float32)
    assert loaded.arch.is_vlm
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert max(sizes) < 16_000_000
    with pytest.raises(UsageError, match="not empty"):
        pretrain.pretrain(settings, tmp_path, "cpu", silent)
    assert lines[0]["settings"]["lr"] == pretrain.LR["student"]
    for wrong in (0.0, -1e-3):
        with pytest.raises(UsageError, match="learning rate"):
            pretrain.pretrain(replace(settings, lr=wrong), tmp_path / "new", "cpu", silent)
    few = replace(settings, amounts=corpus.Amounts(8, 8, 8, 8, 8))
    with pytest.raises(UsageError, match="fewer than 64"):
        pretrain.pretrain(few, tmp_path / "new", "cpu", silent)
    assert re.fullmatch(r"[\w<>/]+", loaded.tokenizer.eos_token)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_trains_like_a_step_that_is_not(world: Facts) -> None:
    amounts = corpus.Amounts(64, 64, 64, 64, 64)
    settings = pretrain.PretrainSettings(rows=(8, 8, 8, 8), amounts=amounts, lr=1e-3)
    drawn = corpus.make(0, amounts, frozenset(), silent)
    ends = []
    for captured in (False, True):
        model = models.build("student", 0).cuda().train()
        step = pretrain._Step(model, drawn, settings, "cuda")
        run = step.captured() if captured else step.run
        for _ in range(0 if captured else pretrain.WARM_UP):
            step.prepare(0.0)
            run()
        for _ in range(20):
            step.prepare(1e-3)
            run()
        ends.append(step.losses.tolist())
    assert ends[0] == pytest.approx(ends[1], rel=0.02)
