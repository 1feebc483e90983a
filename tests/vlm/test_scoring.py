"""Option scoring and generation against the slow, obvious way."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.records import Question
from qatbench.tasks import protocols, scienceqa
from qatbench.tasks.images import open_rgb
from qatbench.vlm import answer, batch
from qatbench.vlm.batch import Encoded, Encoder
from qatbench.vlm.generate import generate
from qatbench.vlm.load import Loaded
from qatbench.vlm.scoring import OptionRow, score_options

# fp32 keeps 2^-24 of logits near 10; a few hundred additions in another order stay below this.
ATOL = 5e-5


def questions(loaded: Loaded, data: Path) -> list[Question]:
    return scienceqa.load(data, "test", subset="all" if loaded.arch.is_vlm else "text")


def rows_of(loaded: Loaded, data: Path, protocol: str = "qatbench") -> list[OptionRow]:
    encoder, chosen = Encoder(loaded), protocols.get(protocol)
    rows = []
    for q in questions(loaded, data):
        prompt = encoder.prompt(chosen.prompt(q), q.image)
        texts = [chosen.continuation(q, letter) for letter in q.options]
        rows.append(OptionRow(prompt, [encoder.answer(prompt, text) for text in texts]))
    return rows


@torch.inference_mode()
def one_by_one(loaded: Loaded, row: OptionRow) -> list[float]:
    """Each option in a forward of its own through the plain model, at the model's own positions."""
    scores = []
    for option in row.answers:
        logp = loaded.model(**row.prompt.inputs(option)).logits[0].log_softmax(-1)
        start = len(row.prompt)
        each = [logp[start + i - 1, token] for i, token in enumerate(option)]
        scores.append(torch.stack(each).mean().item())
    return scores


@pytest.mark.parametrize("protocol", ["qatbench", "llava-sqa"])
def test_scores_equal_a_forward_per_option(any_model: Loaded, data: Path, protocol: str) -> None:
    rows = rows_of(any_model, data, protocol)
    assert any(row.prompt.pixels for row in rows) == any_model.arch.is_vlm
    if protocol == "qatbench":
        assert max(len(option) for row in rows for option in row.answers) > 1

    got = score_options(any_model, rows)

    for row, scores in zip(rows, got, strict=True):
        assert scores == pytest.approx(one_by_one(any_model, row), abs=ATOL)


def test_an_image_decides_scores(llava: Loaded, data: Path) -> None:
    row = next(row for row in rows_of(llava, data) if row.prompt.pixels)
    dark = {key: torch.zeros_like(value) for key, value in row.prompt.pixels.items()}
    other = OptionRow(dataclasses.replace(row.prompt, pixels=dark), row.answers)
    (seen,), (unseen,) = score_options(llava, [row]), score_options(llava, [other])
    assert max(abs(a - b) for a, b in zip(seen, unseen, strict=True)) > 100 * ATOL


def test_the_choice_does_not_depend_on_the_batch(any_model: Loaded, data: Path) -> None:
    encoder = Encoder(any_model)
    asked = questions(any_model, data)
    items = answer.items_of(encoder, asked, {"scienceqa": "qatbench"}, "options")
    chosen = {}
    for size in (1, 32):
        rows = [p for some in answer.batches(items, size, 0) for p in answer.answer(encoder, some)]
        chosen[size] = {row.id: row.chosen for row in rows}
    assert len(chosen[1]) == len(asked)
    assert chosen[1] == chosen[32]


def test_a_prompt_is_computed_once(any_model: Loaded, data: Path) -> None:
    row = rows_of(any_model, data)[-1]
    seen: list[int] = []

    def count(module: torch.nn.Module, args: object, kwargs: dict[str, Tensor]) -> None:
        seen.append(kwargs["input_ids"].numel())

    handle = batch.backbone(any_model.model).register_forward_pre_hook(count, with_kwargs=True)
    try:
        score_options(any_model, [row])
    finally:
        handle.remove()
    assert len(row.answers) > 2
    # An option's last token is predicted only.
    assert seen == [len(row.prompt) + sum(len(answer) - 1 for answer in row.answers)]


def test_equal_options_tie_and_the_first_is_chosen(text_model: Loaded) -> None:
    options = {"A": "a bird", "B": "a fish", "C": "a fish"}
    q = Question(id="q", task="scienceqa", text="Which?", options=options, gold="A")
    encoder = Encoder(text_model)
    items = answer.items_of(encoder, [q], {"scienceqa": "qatbench"}, "options")
    (row,) = answer.answer(encoder, items)
    assert row.scores is not None
    assert row.scores["B"] == row.scores["C"] != row.scores["A"]
    best = max(row.scores.values())
    assert row.tie == (row.scores["B"] == best)
    same = q.model_copy(update={"options": dict.fromkeys("ABC", "a fish")})
    (row,) = answer.answer(
        encoder, answer.items_of(encoder, [same], {"scienceqa": "qatbench"}, "options")
    )
    assert (row.chosen, row.tie) == ("A", True)


def test_generation_in_a_batch_equals_one_by_one(any_model: Loaded, data: Path) -> None:
    encoder = Encoder(any_model)
    plain = protocols.get("qatbench")
    prompts = [encoder.prompt(plain.prompt(q), q.image) for q in questions(any_model, data)]
    assert len(set(map(len, prompts))) > 1  # otherwise nothing is padded
    alone = [generate(any_model, [prompt], 6)[0] for prompt in prompts]
    assert len(set(alone)) > 1
    assert generate(any_model, prompts, 6) == alone


def test_generation_is_that_of_the_plain_model_and_rows_leave_as_they_end(
    any_model: Loaded, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, plain = Encoder(any_model), protocols.get("qatbench")
    prompts = [encoder.prompt(plain.prompt(q), q.image) for q in questions(any_model, data)]

    def plainly(prompt: Encoded) -> list[int]:
        inputs = prompt.inputs() | {"attention_mask": torch.ones(1, len(prompt)).long()}
        out = any_model.model.generate(
            **inputs, max_new_tokens=8, do_sample=False, repetition_penalty=1.0
        )
        ids: list[int] = out[0, len(prompt) :].tolist()
        return ids

    free = [plainly(prompt) for prompt in prompts]
    ends = [free[0][2], free[-1][4]]  # now some rows end early, others never
    monkeypatch.setattr(any_model.model.generation_config, "eos_token_id", ends)
    wanted = [plainly(prompt) for prompt in prompts]
    lengths = {len(ids) for ids in wanted}
    assert len(lengths) > 1
    texts = [[t for t in ids if t not in ends] for ids in wanted]
    widths: list[int] = []
    handle = any_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        got = generate(any_model, prompts, 8)
    finally:
        handle.remove()
    assert got == any_model.tokenizer.batch_decode(texts, skip_special_tokens=True)
    assert widths == [sum(len(ids) > step for ids in wanted) for step in range(max(lengths))]


def test_generation_is_greedy_and_holds_no_prompt(llava: Loaded, data: Path) -> None:
    row = next(row for row in rows_of(llava, data) if row.prompt.pixels)
    ids = list(row.prompt.ids)
    with torch.inference_mode():
        for _ in range(4):
            logits = llava.model(input_ids=torch.tensor([ids]), **row.prompt.pixels).logits
            ids.append(int(logits[0, -1].argmax()))
    wanted = llava.tokenizer.decode(ids[len(row.prompt) :], skip_special_tokens=True)
    assert generate(llava, [row.prompt], 4) == [wanted]


def test_a_vlm_prompt_is_one_user_turn_with_its_visual_tokens(llava: Loaded, data: Path) -> None:
    picture = data / "images/test/test-i0/image.png"
    prompt = Encoder(llava).prompt("What color?", picture)
    assert prompt.text == "USER: <image>\nWhat color? ASSISTANT:"
    mark = llava.tokenizer.convert_tokens_to_ids("<image>")
    assert prompt.ids.count(mark) == tiny.VISUAL_TOKENS
    assert prompt.pixels["pixel_values"].shape == (1, 3, tiny.IMAGE, tiny.IMAGE)
    assert Encoder(llava).prompt("What color?", None).text == "USER: What color? ASSISTANT:"


def test_a_text_model_gets_the_prompt_as_it_is_and_no_image(text_model: Loaded) -> None:
    encoder = Encoder(text_model)
    assert text_model.tokenizer.decode(encoder.prompt("Answer:", None).ids) == "Answer:"
    with pytest.raises(UsageError, match="text model"):
        encoder.prompt("Answer:", b"png")


def test_an_answer_that_merges_with_its_prompt_is_refused_without_its_text(
    text_model: Loaded,
) -> None:
    encoder = Encoder(text_model)
    prompt = encoder.prompt("Which of these i", None)
    with pytest.raises(ArtifactError) as caught:
        encoder.answer(prompt, "s zebra")
    assert "zebra" not in caught.value.message


def test_damaged_and_huge_images_name_no_path(tmp_path: Path) -> None:
    torn = tmp_path / "secret-folder" / "1" / "image.png"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(ArtifactError) as caught:
        open_rgb(torn)
    assert "secret-folder" not in caught.value.message
    with pytest.raises(PrerequisiteError) as missing:
        open_rgb(torn.parent / "absent.png")
    assert "secret-folder" not in missing.value.message


@pytest.mark.parametrize("side", [8_001, 14_000])  # 14,000^2: where the image library itself stops
def test_an_image_of_too_many_pixels_is_refused(side: int) -> None:
    stream = io.BytesIO()
    Image.new("1", (side, side)).save(stream, "PNG")
    with pytest.raises(ArtifactError, match="image"):
        open_rgb(stream.getvalue())


def test_a_picture_is_encoded_once_and_gives_the_same_prompt(
    any_model: Loaded, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not any_model.arch.is_vlm:
        pytest.skip("a text model")
    pictured = [q for q in questions(any_model, data) if q.image is not None]
    opened: list[object] = []
    plain = batch.open_rgb
    monkeypatch.setattr(batch, "open_rgb", lambda one: opened.append(one) or plain(one))
    encoder, chosen = Encoder(any_model), protocols.get("llava-sqa")
    for q in pictured:
        first = Encoder(any_model).prompt(f"{chosen.prompt(q)} Why?", q.image)
        encoder.prompt(chosen.prompt(q), q.image)
        opened.clear()
        again = encoder.prompt(f"{chosen.prompt(q)} Why?", q.image)
        assert not opened
        assert (again.ids, again.text) == (first.ids, first.text)
        assert again.pixels.keys() == first.pixels.keys()
        assert all(torch.equal(again.pixels[key], first.pixels[key]) for key in first.pixels)
        assert torch.equal(again.positions(), first.positions())
    monkeypatch.setattr(batch, "HELD", 0)
    without = Encoder(any_model)
    for _ in range(2):
        opened.clear()
        without.prompt("What?", pictured[0].image)
        assert opened
