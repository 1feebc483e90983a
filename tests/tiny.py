"""Seeded random models and data, small enough for a test: no weights are downloaded.

2-layer text models (Llama, Qwen2, Qwen3), 2-layer VLMs with their real processors (LLaVA, Qwen2-VL,
Qwen2.5-VL, Qwen3-VL), and a folder in ScienceQA's layout. Models are saved as plain bf16 folders.
Every size is a multiple of 32, as 3-bit packing needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from qatbench.stages.quantize import QuantizeSettings
from qatbench.tasks import selector
from qatbench.vlm.load import ModelFolder

HIDDEN, INNER, LAYERS, GROUP = 64, 128, 2, 32
HEAD, HEADS, KV_HEADS = 32, 4, 2
IMAGE, PATCH = 32, 8
VISUAL_TOKENS = (IMAGE // PATCH) ** 2
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
WORDS = (
    "Question: Which of these is a renewable resource, and why does it matter?\nAnswer: "
    "USER: ASSISTANT: Context: Select the best answer. Which animal is a mammal? a bird a fish "
    "the horse the eagle the salmon water wind coal natural gas oil a lizard is cold-blooded "
    "Look at the picture. What color is the square? red green blue yellow white black solid liquid"
)


def tokenizer(*, image_token: bool = False, turns: bool = False) -> Any:
    """A byte-level BPE tokenizer with pad, eos and, for LLaVA, `<image>`; `turns`: Qwen's marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    pad, end = ("<|endoftext|>", "<|im_end|>") if turns else ("<pad>", "</s>")
    special = [pad, "</s>", *(["<image>"] if image_token else []), *(QWEN if turns else ())]
    trainer = trainers.BpeTrainer(
        vocab_size=352,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([WORDS], trainer)
    extra = {"extra_special_tokens": {"image_token": "<image>"}} if image_token else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, eos_token=end, **extra)


def text_sizes(vocabulary: int) -> dict[str, Any]:
    """Sizes of the language model of both families."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }


def _lively(model: Any, seed: int) -> Any:
    """Random weights far from their small defaults, norms far from 1: errors must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1 and name.endswith("weight"):
                value.copy_(1 + 0.2 * noise)
            elif value.ndim == 1:
                value.copy_(0.1 * noise)
            else:
                embeds = "embed" in name and "patch_embed." not in name
                value.copy_(noise * (1.0 if embeds else 1.5 / value[0].numel() ** 0.5))
    return model.to(torch.bfloat16)


def save_text_model(folder: Path, *, seed: int = 0) -> Path:
    """A text Llama with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    model = LlamaForCausalLM(LlamaConfig(**text_sizes(len(words))))
    _lively(model, seed).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_llava(folder: Path, *, seed: int = 0) -> Path:
    """A LLaVA (CLIP tower, projector, Llama) with its processor and chat template."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = tokenizer(image_token=True)
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE,
        patch_size=PATCH,
        projection_dim=HIDDEN,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text_sizes(len(words))),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    _lively(LlavaForConditionalGeneration(config), seed).save_pretrained(folder)
    size = {"height": IMAGE, "width": IMAGE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size=size),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


# --- Qwen ---------------------------------------------------------------------------------------

QWEN = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<|video_pad|>")  # fmt: skip
QWEN_TEMPLATE = (  # as in the published checkpoints, without their default system turn
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_PATCH, MERGE = 8, 2
# Pixels of an image after resizing: every picture of `save_questions` has 9 or 12 visual tokens,
# the proof's picture of 96 x 96 has 16.
QWEN_PIXELS = {"min_pixels": 48 * 48, "max_pixels": 64 * 96}


def _sizes(words: Any, width: int) -> dict[str, Any]:
    end = words.convert_tokens_to_ids("<|im_end|>")
    return text_sizes(len(words)) | {"hidden_size": width, "eos_token_id": end}


def _with_tokenizer(model: Any, folder: Path, seed: int, words: Any) -> Path:
    _lively(model, seed).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_qwen2(folder: Path, *, seed: int = 0, width: int = HIDDEN, tied: bool = False) -> Path:
    """A text Qwen2: biases on q, k and v, no head_dim in its config."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    words = tokenizer(turns=True)
    sizes = {key: value for key, value in _sizes(words, width).items() if key != "head_dim"}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=tied))
    return _with_tokenizer(model, folder, seed, words)


def save_qwen3(folder: Path, *, seed: int = 0, width: int = HIDDEN, tied: bool = False) -> Path:
    """A text Qwen3: norms on q and k, heads wider than hidden_size / heads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words = tokenizer(turns=True)
    model = Qwen3ForCausalLM(Qwen3Config(**_sizes(words, width), tie_word_embeddings=tied))
    return _with_tokenizer(model, folder, seed, words)


def _mrope(half: int, rule: str) -> dict[str, Any]:
    """RoPE settings with half a head's width split over time, height and width as published."""
    side = 3 * half // 8 if rule == "qwen2" else 5 * half // 16
    settings = {"rope_type": "default", "rope_theta": 1e6}
    interleaved = {} if rule == "qwen2" else {"mrope_interleaved": True}
    return settings | {"mrope_section": [half - 2 * side, side, side]} | interleaved


def _save_vlm(folder: Path, seed: int, words: Any, model: Any, processor: Any) -> Path:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    _lively(model, seed).save_pretrained(folder)
    grid = {"patch_size": QWEN_PATCH, "merge_size": MERGE, "temporal_patch_size": 2} | QWEN_PIXELS
    processor(
        image_processor=Qwen2VLImageProcessor(**grid),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(**grid),
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def _marks(words: Any) -> dict[str, int]:
    names = ("image", "image_pad"), ("video", "video_pad"), *((n, n) for n in VISION_ENDS)
    return {f"{key}_token_id": words.convert_tokens_to_ids(f"<|{token}|>") for key, token in names}


VISION_ENDS = ("vision_start", "vision_end")
_TOWER = {"depth": 2, "num_heads": 4, "patch_size": QWEN_PATCH, "spatial_merge_size": MERGE,
          "temporal_patch_size": 2}  # fmt: skip


def save_qwen2_vl(folder: Path, *, seed: int = 0, width: int = HIDDEN, tied: bool = False) -> Path:
    """A Qwen2-VL (ViT with merger, Qwen2) with its processor and chat template."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    words = tokenizer(turns=True)
    text = _sizes(words, width) | {"rope_parameters": _mrope(width // HEADS // 2, "qwen2")}
    del text["head_dim"]  # the family has none: hidden_size / heads
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=_TOWER | {"embed_dim": HIDDEN, "hidden_size": width, "mlp_ratio": 2},
        tie_word_embeddings=tied,
        **_marks(words),
    )
    model = Qwen2VLForConditionalGeneration(config)
    return _save_vlm(folder, seed, words, model, Qwen2VLProcessor)


def save_qwen2_5_vl(
    folder: Path, *, seed: int = 0, width: int = HIDDEN, tied: bool = False
) -> Path:
    """A Qwen2.5-VL: its first vision block attends inside windows, its second to the image."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    )

    words = tokenizer(turns=True)
    text = _sizes(words, width) | {"rope_parameters": _mrope(width // HEADS // 2, "qwen2")}
    del text["head_dim"]
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "out_hidden_size": width}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=_TOWER | sizes | {"window_size": 32, "fullatt_block_indexes": [1]},
        tie_word_embeddings=tied,
        **_marks(words),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    return _save_vlm(folder, seed, words, model, Qwen2_5_VLProcessor)


def save_qwen3_vl(folder: Path, *, seed: int = 0, width: int = HIDDEN, tied: bool = False) -> Path:
    """A Qwen3-VL: features of its first vision block also enter the language model (DeepStack)."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    words = tokenizer(turns=True)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "out_hidden_size": width}
    config = Qwen3VLConfig(
        text_config=_sizes(words, width) | {"rope_parameters": _mrope(HEAD // 2, "qwen3")},
        vision_config=_TOWER
        | sizes
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        tie_word_embeddings=tied,
        **_marks(words),
    )
    model = Qwen3VLForConditionalGeneration(config)
    return _save_vlm(folder, seed, words, model, Qwen3VLProcessor)


SAVE: dict[str, Callable[..., Path]] = {
    "text": save_text_model,
    "llava": save_llava,
    "qwen2": save_qwen2,
    "qwen3": save_qwen3,
    "qwen2_vl": save_qwen2_vl,
    "qwen2_5_vl": save_qwen2_5_vl,
    "qwen3_vl": save_qwen3_vl,
}
QWEN_TEXT = ("qwen2", "qwen3")
QWEN_VLMS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


# --- data ---------------------------------------------------------------------------------------

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
ANIMALS = {"horse": "a mammal", "eagle": "a bird", "salmon": "a fish"}
SECRET_HINT = "Look at the picture before you select."


def save_questions(
    folder: Path, *, text: int = 6, images: int = 6, missing: tuple[str, ...] = ()
) -> Path:
    """A folder in ScienceQA's layout: `text` + `images` questions in each of train and test.

    Ids are `train-t0` .. and `test-i0` ..; the image files of the ids in `missing` are not there.
    """
    problems: dict[str, Any] = {}
    splits: dict[str, list[str]] = {}
    for split in ("train", "test"):
        splits[split] = []
        for i in range(text):
            name, answer = list(ANIMALS.items())[i % 3]
            choices = list(ANIMALS.values()) + (["a lizard"] if i % 2 else [])
            more = "Select the best answer. " * (i % 3)  # prompts of several lengths
            question = f"{more}Which animal is the {name}? {i}"
            row = _row(split, question, choices, choices.index(answer))
            splits[split].append(f"{split}-t{i}")
            problems[splits[split][-1]] = row
        for i in range(images):
            colour = list(COLOURS)[i % 3]
            row = _row(split, f"What color is square {i}?", list(COLOURS), i % 3)
            pid = f"{split}-i{i}"
            splits[split].append(pid)
            problems[pid] = row | {"image": "image.png", "hint": SECRET_HINT}
            if pid not in missing:
                save_image(folder, split, pid, colour, i)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems), encoding="utf-8")
    (folder / "pid_splits.json").write_text(json.dumps(splits), encoding="utf-8")
    return folder


def save_image(folder: Path, split: str, pid: str, colour: str, seed: int) -> Path:
    """The picture of one question: a coloured square with a seeded dark patch."""
    picture = Image.new("RGB", (40 + seed, 40), COLOURS[colour])
    picture.paste((seed * 20 % 256, 0, 60), (5 + seed, 5, 20 + seed, 20))
    file = folder / "images" / split / pid / "image.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)
    return file


def _row(split: str, question: str, choices: list[str], answer: int) -> dict[str, Any]:
    return {
        "question": question,
        "choices": choices,
        "answer": answer,
        "hint": "",
        "image": None,
        "split": split,
        "subject": "natural science",
        "topic": "biology",
        "category": "Animals",
        "skill": "Classify",
        "grade": "grade2",
    }


# --- checkpoints ----------------------------------------------------------------------------------

SAMPLES = 6


class Made(NamedTuple):
    """A finished checkpoint and its provenance."""

    path: Path
    record: dict[str, Any]


Make = Callable[[str, str, int], Made]
Source = Callable[..., ModelFolder]


def settings(family: str, method: Any, bits: int = 4) -> QuantizeSettings:
    """Calibration on six training questions, with images for the LLaVA."""
    part = "scienceqa:train:text" if family == "text" else "scienceqa:train"
    return QuantizeSettings(method, bits, GROUP, selector.parse(part), SAMPLES, device="cpu")


def one_json_object(*arguments: str) -> tuple[dict[str, Any], str]:
    """What a command prints, run in a process of its own: one JSON object; and its stderr."""
    command = [sys.executable, "-m", "qatbench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout), done.stderr
