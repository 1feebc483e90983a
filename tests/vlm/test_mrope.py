"""Models with positions in time, height and width: prompts, positions and batches of images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from qatbench.errors import ArtifactError
from qatbench.vlm.batch import Encoded, Encoder, pixel_batch
from qatbench.vlm.generate import generate
from qatbench.vlm.load import Loaded
from qatbench.vlm.scoring import OptionRow, score_options

CPU = torch.device("cpu")
# 9, 12 and 16 visual tokens: tiny.QWEN_PIXELS
SIZES = {(40, 40): 9, (45, 40): 12, (96, 96): 16}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, made = tmp_path_factory.mktemp("pictures"), []
    for index, size in enumerate(SIZES):
        picture = Image.new("RGB", size, (70 * index + 40, 200 - 60 * index, 30))
        picture.paste((250, 250, 250), (5, 5, 20 + 5 * index, 25))
        made.append(root / f"{index}.png")
        picture.save(made[-1])
    return made


def marks(prompt: Encoded, loaded: Loaded) -> int:
    return prompt.ids.count(loaded.tokenizer.convert_tokens_to_ids("<|image_pad|>"))


def test_each_image_has_as_many_visual_tokens_as_merged_patches(
    qwen_vlm: Loaded, pictures: list[Path]
) -> None:
    encoder = Encoder(qwen_vlm)
    for picture, wanted in zip(pictures, SIZES.values(), strict=True):
        prompt = encoder.prompt("What is it?", picture)
        patches = int(prompt.pixels["image_grid_thw"].prod())
        assert marks(prompt, qwen_vlm) == wanted == patches // tiny.MERGE**2
        assert len(prompt.pixels["pixel_values"]) == patches
        assert prompt.kinds is not None
        assert int(prompt.kinds.sum()) == wanted


def test_several_images_come_first_and_in_order(qwen_vlm: Loaded, pictures: list[Path]) -> None:
    encoder = Encoder(qwen_vlm)
    together = encoder.prompt("Which?", pictures)
    alone = [encoder.prompt("Which?", picture) for picture in pictures]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert (
        together.text == f"<|im_start|>user\n{image * 3}Which?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert marks(together, qwen_vlm) == sum(SIZES.values())
    batch = pixel_batch(alone, CPU, torch.float32)
    assert batch.keys() == together.pixels.keys() == {"pixel_values", "image_grid_thw"}
    for key, value in batch.items():
        assert torch.equal(value, together.pixels[key])
    assert encoder.prompt("Which?", pictures[:1]).ids == alone[0].ids
    assert encoder.prompt("Which?", []).ids == encoder.prompt("Which?", None).ids


def test_positions_are_those_that_the_model_gives(qwen_vlm: Loaded, pictures: list[Path]) -> None:
    encoder = Encoder(qwen_vlm)
    for image in (pictures[0], pictures[1], pictures):
        prompt = encoder.prompt("What is it?", image)
        inputs = prompt.inputs([5, 6, 7])
        whole, _ = qwen_vlm.model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], prompt.pixels["image_grid_thw"]
        )
        assert torch.equal(prompt.positions(3), whole[:, 0])
        assert prompt.places is not None
        assert prompt.places.shape == (3, len(prompt))
        assert prompt.positions().max() < len(prompt) - 1  # an image is no longer than its sides


def test_text_has_simple_positions(qwen_vlm: Loaded) -> None:
    prompt = Encoder(qwen_vlm).prompt("What is it?", None)
    assert torch.equal(prompt.positions(2), torch.arange(len(prompt) + 2).repeat(3, 1))
    assert prompt.pixels == {}
    assert prompt.text == "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"


def test_models_without_mrope_have_no_places(text_model: Loaded, llava: Loaded) -> None:
    for loaded in (text_model, llava):
        prompt = Encoder(loaded).prompt("What is it?", None)
        assert prompt.places is None
        assert prompt.kinds is None
        assert prompt.inputs([5]).keys() == {"input_ids"}
        assert torch.equal(prompt.positions(2), torch.arange(len(prompt) + 2))


def test_several_images_in_several_rows_are_scored_as_alone(
    qwen_vlm: Loaded, pictures: list[Path]
) -> None:
    encoder = Encoder(qwen_vlm)
    rows = []
    for image in (pictures, pictures[1], None, pictures[::-1][:2]):
        prompt = encoder.prompt("What is it?", image)
        rows.append(OptionRow(prompt, [encoder.answer(prompt, x) for x in (" a bird", " coal")]))
    scores = score_options(qwen_vlm, rows)
    for row, got in zip(rows, scores, strict=True):
        for option, score in zip(row.answers, got, strict=True):
            with torch.inference_mode():
                logp = qwen_vlm.model(**row.prompt.inputs(option)).logits[0].log_softmax(-1)
            at = range(len(row.prompt) - 1, len(row.prompt) + len(option) - 1)
            wanted = logp[at, option].mean().item()
            assert score == pytest.approx(wanted, abs=1e-4)  # fp32 sums in another order


def test_places_decide_scores(qwen_vlm: Loaded, pictures: list[Path]) -> None:
    """Otherwise the tests above would pass with positions that simply count."""
    encoder = Encoder(qwen_vlm)
    prompt = encoder.prompt("What is it?", pictures)
    answers = [encoder.answer(prompt, text) for text in (" a bird", " coal")]
    flat = torch.arange(len(prompt)).repeat(3, 1)
    (right,), (wrong,) = (
        score_options(qwen_vlm, [OptionRow(p, answers)])
        for p in (prompt, dataclasses.replace(prompt, places=flat))
    )
    assert max(abs(a - b) for a, b in zip(right, wrong, strict=True)) > 1e-2


def test_padded_generation_equals_one_by_one(qwen_vlm: Loaded, pictures: list[Path]) -> None:
    encoder = Encoder(qwen_vlm)
    images: list[list[Path]] = [pictures, [], pictures[1:2], pictures[:2]]
    prompts = [encoder.prompt("What is it? " * (4 - i), some) for i, some in enumerate(images)]
    assert len(set(map(len, prompts))) == 4
    alone = [generate(qwen_vlm, [prompt], 8)[0] for prompt in prompts]
    assert len(set(alone)) > 1
    assert generate(qwen_vlm, prompts, 8) == alone


def test_generation_takes_the_likeliest_token_whatever_the_model_recommends(
    qwen_vlm: Loaded, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = Encoder(qwen_vlm).prompt("What is it?", pictures[0])
    more: list[int] = []
    with torch.inference_mode():
        for _ in range(6):
            more.append(int(qwen_vlm.model(**prompt.inputs(more)).logits[0, -1].argmax()))
    wanted = qwen_vlm.tokenizer.decode(more, skip_special_tokens=True)
    assert generate(qwen_vlm, [prompt], 6) == [wanted]
    monkeypatch.setattr(qwen_vlm.model.generation_config, "repetition_penalty", 9.0)
    assert generate(qwen_vlm, [prompt], 6) == [wanted]


def test_after_a_newline_an_answer_has_no_leading_space(qwen_vlm: Loaded, llava: Loaded) -> None:
    for loaded, first in ((qwen_vlm, "a bird"), (llava, " a bird")):
        encoder = Encoder(loaded)
        prompt = encoder.prompt("Which?", None)
        assert loaded.tokenizer.decode(encoder.answer(prompt, " a bird")) == first


def test_a_picture_that_the_processor_refuses_is_an_error_of_that_picture(
    qwen_vlm: Loaded, tmp_path: Path
) -> None:
    Image.new("RGB", (2010, 10)).save(tmp_path / "ribbon.png")
    with pytest.raises(ArtifactError, match="aspect ratio"):
        Encoder(qwen_vlm).prompt("What is it?", tmp_path / "ribbon.png")
