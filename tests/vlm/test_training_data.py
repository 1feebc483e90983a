"""Training rows: what is supervised in conversations, several images, packing, lengths, sources."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.records import Question
from qatbench.stages.objective import look
from qatbench.tasks.conversations import Conversation, Turn
from qatbench.tasks.images import open_rgb
from qatbench.tasks.sources import Source
from qatbench.vlm.load import Loaded
from qatbench.vlm.training import Row, TrainingData

CPU = torch.device("cpu")
LLAVA_TEMPLATE = (  # of llava-hf/llava-1.5-7b-hf, without its marks for masking
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three pictures of three shapes: Qwen gives them 9, 12 and 16 visual tokens or so."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(((48, 48), (96, 48), (40, 90))):
        picture = Image.new("RGB", size, (200, 40 * i, 20))
        picture.paste((10, 200, 60 * i), (5 * i, 3, 20, 20))
        picture.save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(3)]


@pytest.fixture(scope="module")
def llava_chat(llava: Loaded) -> Loaded:
    processor = copy.copy(llava.processor)
    processor.chat_template = LLAVA_TEMPLATE  # type: ignore[union-attr]
    return replace(llava, processor=processor)


@pytest.fixture(scope="module")
def text_chat(text_model: Loaded) -> Loaded:
    words = copy.deepcopy(text_model.tokenizer)
    words.chat_template = TEXT_TEMPLATE
    return replace(text_model, tokenizer=words)


TURNS = (
    Turn("What is it?", "red"),
    Turn("red or blue?", "Look at the picture."),
    Turn("What is it?", "red"),
)


def talk(images: list[Path], name: str = "x", turns: tuple[Turn, ...] = TURNS) -> Conversation:
    return Conversation(name, turns, tuple(images))


def data(loaded: Loaded, *items: Any, **more: Any) -> TrainingData:
    return TrainingData(loaded, [Source("talks", items)], ("qatbench",), 0, **more)


def only(loaded: Loaded, item: Any, **more: Any) -> Row:
    return data(loaded, item, **more).step(0, 1)[0]


def told(loaded: Loaded, row: Row) -> list[str]:
    return [loaded.tokenizer.decode(row.ids[i:j]) for i, j in row.spans]


# --- what is supervised ---------------------------------------------------------------------------


def test_llava_supervises_answers_with_an_end_that_its_template_lacks(
    llava_chat: Loaded, pictures: list[Path]
) -> None:
    row = only(llava_chat, talk(pictures[:2]))
    visual = "<image>" * tiny.VISUAL_TOKENS
    assert told(llava_chat, row) == [" red</s>", " Look at the picture.</s>", " red</s>"]
    assert llava_chat.tokenizer.decode(row.ids) == (
        f"USER: {visual}\n{visual}\nWhat is it? ASSISTANT: red</s> USER: red or blue? "
        "ASSISTANT: Look at the picture.</s> USER: What is it? ASSISTANT: red</s>"
    )


def test_qwen_supervises_answers_with_the_end_of_its_template(
    qwen_vlm: Loaded, pictures: list[Path]
) -> None:
    row = only(qwen_vlm, talk(pictures))
    ends = ["red<|im_end|>", "Look at the picture.<|im_end|>", "red<|im_end|>"]
    assert told(qwen_vlm, row) == ends
    messages: list[dict[str, Any]] = []
    for turn in TURNS:
        messages.append({"role": "user", "content": [{"type": "text", "text": turn.asked}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answered}]})
    messages[0]["content"][:0] = [{"type": "image"}] * 3
    whole = qwen_vlm.processor.apply_chat_template(messages, tokenize=False)  # type: ignore[union-attr]
    inputs = qwen_vlm.processor(  # type: ignore[misc]
        text=[whole], images=[open_rgb(p) for p in pictures], return_tensors="pt"
    )
    length = len(row)  # the library's own tokens, without the newline after the last end
    assert inputs["input_ids"][0, :length].tolist() == row.ids
    assert inputs["input_ids"].shape[1] - length <= 1
    kinds = (inputs["input_ids"] == qwen_vlm.folder.config["image_token_id"]).long()
    places, _ = qwen_vlm.model.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=kinds, image_grid_thw=inputs["image_grid_thw"]
    )
    batch = data(qwen_vlm, talk(pictures)).collate([row], CPU, torch.float32)
    assert torch.equal(batch.inputs["position_ids"][:, 0], places[:, 0, :length])


def test_a_text_model_uses_its_own_chat_template(text_chat: Loaded) -> None:
    row = only(text_chat, talk([]))
    assert told(text_chat, row) == [" red</s>", " Look at the picture.</s>", " red</s>"]
    assert text_chat.tokenizer.decode(row.ids) == (
        "[user] What is it?\n[assistant] red</s>\n[user] red or blue?\n[assistant] Look at the "
        "picture.</s>\n[user] What is it?\n[assistant] red</s>"
    )


def test_a_templates_own_start_token_is_not_put_twice(text_chat: Loaded) -> None:
    from tokenizers.processors import TemplateProcessing

    words = copy.deepcopy(text_chat.tokenizer)
    start = words.eos_token_id
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", start)]
    )
    words.chat_template = "{{ eos_token }}" + TEXT_TEMPLATE
    row = only(replace(text_chat, tokenizer=words), talk([]))
    assert words("red").input_ids[0] == start  # what the tokenizer does by itself
    assert [token == start for token in row.ids[:2]] == [True, False]


def test_batches_supervise_the_spans_and_see_all_text(
    llava_chat: Loaded, pictures: list[Path]
) -> None:
    stream = data(llava_chat, talk(pictures[:2], "a"), talk([], "b"), talk(pictures[2:], "c"))
    rows = stream.step(0, 3)
    batch = stream.collate(rows, CPU, torch.float32)
    ids = batch.inputs["input_ids"].reshape(-1)
    mark = stream.image_token
    assert batch.where.tolist() == sorted(batch.where.tolist())
    assert torch.equal(ids[batch.where + 1], batch.target)
    assert sorted(batch.target.tolist()) == sorted(t for row in rows for t in row.target)
    assert torch.isin(batch.where, batch.every).all()
    assert torch.equal(ids[batch.every + 1], batch.every_target)
    assert mark not in batch.every_target.tolist()
    text = sum(sum(token != mark for token in row.ids[1:]) for row in rows)
    assert len(batch.every) == text  # the last token of a row predicts nothing
    positions = batch.inputs["position_ids"].reshape(-1)
    assert torch.equal(positions[batch.every + 1], positions[batch.every] + 1)


# --- several images, packing, grouping ------------------------------------------------------------


def mixed(pictures: list[Path]) -> list[Any]:
    question = Question(
        id="q", task="t", text="What color?", options={"A": "red", "B": "blue"}, gold="A",
        image=pictures[1],
    )  # fmt: skip
    return [
        talk(pictures[:2], "two"),
        talk([], "none"),
        talk([pictures[2], pictures[0], pictures[1]], "three", TURNS[:1]),
        question,
    ]


@pytest.mark.parametrize("packing", ["pack", "group"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_rows_with_several_images_compute_together_what_they_do_alone(
    family: str,
    packing: Any,
    llava_chat: Loaded,
    every_model: dict[str, Loaded],
    pictures: list[Path],
) -> None:
    loaded = llava_chat if family == "llava" else every_model[family]
    stream = data(loaded, *mixed(pictures), packing=packing)
    rows = sorted(stream.step(0, 4), key=len, reverse=True)
    batch = stream.collate(rows, CPU, torch.float32)
    assert len(batch.inputs["input_ids"]) == (4 if packing == "group" else 1)
    seen = look(loaded.model, batch, images=True)
    logits, images = [], []
    for row in rows:  # the plain model, on one row at a time, without positions of ours
        inputs = row.prompt.inputs(row.rest)
        out = loaded.model(**inputs, output_hidden_states=True)
        logits += [out.logits[0, i - 1 : j - 1] for i, j in row.spans]
        hidden, ids = out.hidden_states[-2][0], torch.tensor(row.ids)
        images.append(hidden[ids == stream.image_token])
    # fp32 sums in another order; logits are of order 1
    torch.testing.assert_close(seen.logits, torch.cat(logits), rtol=1e-4, atol=1e-4)
    counts = {len(where) for where in batch.images}
    assert len(batch.images) == 6
    assert (counts == {tiny.VISUAL_TOKENS}) == (family == "llava")
    torch.testing.assert_close(torch.cat(seen.images), torch.cat(images), rtol=1e-4, atol=1e-4)


def test_each_image_has_as_many_tokens_as_its_own_size_gives(
    qwen_vlm: Loaded, pictures: list[Path]
) -> None:
    alone = [len(only(qwen_vlm, talk([p])).prompt.pixels["pixel_values"]) for p in pictures]
    stream = data(qwen_vlm, talk(pictures))
    row = stream.step(0, 1)[0]
    where = stream.collate([row], CPU, torch.float32).images
    assert [len(places) * tiny.MERGE**2 for places in where] == alone
    assert len(set(alone)) > 1
    gaps = torch.cat([places[1:] - places[:-1] for places in where])
    assert (gaps == 1).all()  # no image holds the separator between two


def test_visual_tokens_that_do_not_add_up_are_an_artifact_error(
    llava_chat: Loaded, every_model: dict[str, Loaded], pictures: list[Path]
) -> None:
    for loaded in (llava_chat, every_model["qwen2_vl"]):
        stream = data(loaded, talk(pictures[:2]))
        row = stream.step(0, 1)[0]
        mark = stream.image_token
        ids = list(row.prompt.ids)
        ids.remove(mark)  # type: ignore[arg-type]
        places = row.prompt.places
        prompt = replace(row.prompt, ids=ids, places=None if places is None else places[:, 1:])
        with pytest.raises(ArtifactError, match="visual tokens for 2 images"):
            stream.collate([replace(row, prompt=prompt)], CPU, torch.float32)


def test_rows_without_places_count_on_all_axes_beside_rows_with_them(
    every_model: dict[str, Loaded], pictures: list[Path]
) -> None:
    stream = data(every_model["qwen2_vl"], talk(pictures[:1], "a"), talk([], "b"))
    rows = stream.step(0, 2)
    plain = [replace(r, prompt=replace(r.prompt, places=None)) for r in rows if not r.prompt.pixels]
    placed = [row for row in rows if row.prompt.pixels]
    assert len(plain) == len(placed) == 1
    both = stream.collate(plain + placed, CPU, torch.float32).inputs["position_ids"]
    assert torch.equal(both, stream.collate(rows, CPU, torch.float32).inputs["position_ids"])
    assert stream.collate(plain, CPU, torch.float32).inputs["position_ids"].ndim == 2


# --- lengths and unusable samples -----------------------------------------------------------------


def test_a_long_conversation_is_cut_at_its_end(llava_chat: Loaded, pictures: list[Path]) -> None:
    whole = only(llava_chat, talk(pictures[:2]))
    for length in range(len(whole.prompt) + 1, len(whole) + 2):
        stream = data(llava_chat, talk(pictures[:2]), max_length=length)
        row = stream.step(0, 1)[0]
        assert row.ids == whole.ids[:length]
        inside = [t for t, at in _supervised(whole) if at < length]
        assert row.target == inside
        assert stream.collate([row], CPU, torch.float32).target.tolist() == inside
        assert stream.skipped == {}


def _supervised(row: Row) -> list[tuple[int, int]]:
    return [(row.ids[at], at) for i, j in row.spans for at in range(i, j)]


def test_a_sample_without_room_for_an_answer_is_counted_and_replaced(
    llava_chat: Loaded, pictures: list[Path]
) -> None:
    room = len(only(llava_chat, talk(pictures[:2])).prompt)  # the answer would start right after
    items = [talk(pictures[:2], "long"), *(talk(pictures[:1], f"s{i}") for i in range(3))]
    stream = data(llava_chat, *items, max_length=room)
    rows = [row for number in range(4) for row in stream.step(number, 4)]
    assert len(rows) == 16
    assert all(len(row.prompt.pixels["pixel_values"]) == 1 and len(row) <= room for row in rows)
    assert stream.skipped == {"talks/long": f"no answer within {room} tokens"}
    again = data(llava_chat, *items, max_length=room)
    later = again.step(2, 4)  # not after steps 0 and 1, as in a resumed run
    assert [row.ids for row in later] == [row.ids for row in rows[8:12]]


def test_a_long_question_is_counted_too(llava_chat: Loaded, pictures: list[Path]) -> None:
    questions = [mixed(pictures)[-1]]
    with pytest.raises(ArtifactError, match="unusable; questions/q: no answer within 8 tokens"):
        TrainingData(llava_chat, questions, ("qatbench",), 0, max_length=8).step(0, 1)


def test_text_with_the_models_special_tokens_is_unusable(
    llava_chat: Loaded, every_model: dict[str, Loaded]
) -> None:
    for loaded, bad in ((llava_chat, "</s>"), (every_model["qwen2_vl"], "<|image_pad|>")):
        for turn in (Turn(f"a {bad} b", "red"), Turn("red", f"a {bad} b")):
            stream = data(loaded, talk([], "bad", (TURNS[0], turn)), talk([], "good"))
            stream.step(0, 2)
            assert stream.skipped == {"talks/bad": "its text holds a special token of the model"}


def test_images_that_cannot_be_read_are_counted(
    llava_chat: Loaded, pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "torn.png").write_bytes(pictures[0].read_bytes()[:60])
    stream = data(
        llava_chat,
        talk([tmp_path / "torn.png"], "torn"),
        talk([tmp_path / "gone.png"], "gone"),
        talk(pictures[:1], "good"),
    )
    assert len(stream.step(0, 3)) == 3
    assert set(stream.skipped) == {"talks/torn", "talks/gone"}
    assert "cannot be decoded" in stream.skipped["talks/torn"]
    with pytest.raises(ArtifactError, match="20 training samples one after another"):
        data(llava_chat, talk([tmp_path / "gone.png"], "gone")).step(0, 1)


def test_a_picture_that_the_processor_refuses_is_counted(
    every_model: dict[str, Loaded], pictures: list[Path], tmp_path: Path
) -> None:
    Image.new("RGB", (900, 2)).save(tmp_path / "thin.png")  # Qwen: at most 200 : 1
    stream = data(
        every_model["qwen2_vl"], talk([tmp_path / "thin.png"], "thin"), talk(pictures[:1])
    )
    stream.step(0, 2)
    assert list(stream.skipped) == ["talks/thin"]
    assert "the processor refuses an image" in stream.skipped["talks/thin"]


# --- sources --------------------------------------------------------------------------------------


def test_questions_and_conversations_take_turns_by_weight(
    llava_chat: Loaded, pictures: list[Path]
) -> None:
    question = mixed(pictures)[-1]
    sources = [Source("talks", [talk([])], 3.0), Source("questions", [question], 1.0)]
    stream = TrainingData(llava_chat, sources, ("qatbench", "choices"), 0)
    rows = stream.step(0, 8)
    assert sum(len(row.spans) == 3 for row in rows) == 6
    assert sum("What color?" in row.prompt.text for row in rows) == 2


def test_one_source_of_questions_gives_the_rows_of_the_questions(llava: Loaded, data: Path) -> None:
    from qatbench.tasks import selector

    questions = selector.load(selector.parse("scienceqa:train"), {"scienceqa": str(data)})
    formats = ("qatbench", "choices")
    plain = TrainingData(llava, questions, formats, 3)
    named = TrainingData(llava, [Source("sqa", questions, 0.5)], formats, 3)
    for number in range(4):
        one, other = plain.step(number, 5), named.step(number, 5)
        assert [row.ids for row in one] == [row.ids for row in other]


# --- refusals -------------------------------------------------------------------------------------


def test_conversations_need_a_chat_template(text_model: Loaded) -> None:
    with pytest.raises(PrerequisiteError, match="has no chat template") as caught:
        data(text_model, talk([]))
    assert caught.value.hint


def test_a_text_model_refuses_conversations_with_images(
    text_chat: Loaded, pictures: list[Path]
) -> None:
    with pytest.raises(UsageError, match="text model"):
        data(text_chat, talk(pictures[:1]))


def test_a_template_that_does_not_put_answers_after_their_prompts_is_refused(
    llava: Loaded,
) -> None:
    with pytest.raises(ArtifactError, match="does not continue"):
        data(llava, talk([])).step(0, 1)  # the tiny template knows one user turn only


def test_a_template_that_raises_is_refused_without_its_words(llava: Loaded) -> None:
    processor = copy.copy(llava.processor)
    processor.chat_template = (  # type: ignore[union-attr]
        "{% if messages|length > 1 %}{{ raise_exception(messages[0].content[0].text) }}{% endif %}A"
    )
    with pytest.raises(ArtifactError, match="refuses conversations") as caught:
        data(replace(llava, processor=processor), talk([])).step(0, 1)
    assert TURNS[0].asked not in caught.value.message
