"""The two built-in models: LLaVA architecture in small, and their word-level tokenizer.

A CLIP vision tower (one patch a drawn tile), a two-layer projector and a Llama. Student and
teacher share tokenizer, processor and picture size; every quantized linear has inputs divisible
by 128.
"""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path
from typing import Any

from qatbench.mini import names, recall
from qatbench.mini.draw import PIXELS, SIDE, tile_words
from qatbench.mini.facts import KINDS as FACT_KINDS
from qatbench.mini.facts import facts as draw_facts
from qatbench.mini.questions import KINDS, draw
from qatbench.mini.tell import tells
from qatbench.records import LETTERS, Question
from qatbench.tasks import protocols

SPECIAL = ("<pad>", "</s>", "<unk>", "<image>")
PAD, END, UNKNOWN, IMAGE = range(4)
WORD = r"[^\W_]+|[^\w\s]|_"  # a run of letters and digits, or one other character
VISUAL_TOKENS = SIDE * SIDE
DESCRIBE = "Describe the picture."
AGAIN = "Tell it again."
WORKED = "\nAnswer with the text, then its letter."
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %} ASSISTANT:"
    "{% for part in message.content %} {{ part.text }}{% endfor %}{% else %}"
    "{% if not loop.first %} {% endif %}USER: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
SIZES: dict[str, dict[str, int]] = {
    "student": {"hidden": 256, "inner": 256, "layers": 4, "heads": 4, "vision_layers": 3},
    "teacher": {"hidden": 384, "inner": 512, "layers": 6, "heads": 6, "vision_layers": 3},
}
VISION_HIDDEN, VISION_INNER, VISION_HEADS = 128, 512, 4
CONTEXT = 1024  # positions; no prompt comes near


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of the world and of every protocol's prompt, after the special tokens."""
    words: dict[str, None] = dict.fromkeys(SPECIAL)
    for text in _texts():
        words |= dict.fromkeys(re.findall(WORD, text))
    return tuple(words)


def _texts() -> list[str]:
    texts = [*LETTERS, *"0123456789", ".,:;?!()'\"-/", DESCRIBE, WORKED, AGAIN, "USER: ASSISTANT:",
             *tile_words()]  # fmt: skip
    for value in vars(names).values():
        texts += value if isinstance(value, tuple) else []
    texts += [*recall.THINGS, *recall.SPOTS]
    for attributes in FACT_KINDS.values():
        texts += [text for a in attributes for text in (a.states, *a.asks, *a.values)]
    rng, facts = random.Random(0), draw_facts(0)
    for name in KINDS:
        for _ in range(50):
            made = draw(rng, facts, "train", (name,))
            texts += [made.text, made.hint, *made.choices]
            told = [] if made.grid is None else tells(made.grid, facts, rng)
            texts += [text for tell in told for text in tell]
    asked = Question(
        id="0", task="scienceqa", text="The", options={"A": "The", "B": "The"}, gold="A", hint="The"
    )
    for name in protocols.names():
        protocol = protocols.get(name)
        bare = asked.model_copy(update={"hint": ""})
        texts += [protocol.prompt(asked), protocol.prompt(bare), protocol.continuation(asked, "A")]
    return [*texts, "Choices: ;"]


def tokenizer() -> Any:
    """A word-level tokenizer; white space is dropped, unknown words are `<unk>`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(vocabulary())}
    inner = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[UNKNOWN]))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[END],
        unk_token=SPECIAL[UNKNOWN],
        extra_special_tokens={"image_token": SPECIAL[IMAGE]},
        clean_up_tokenization_spaces=False,
    )


def processor() -> Any:
    """LLaVA's processor for pictures of 48 x 48 pixels."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    side = SIDE * PIXELS
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer(),
        patch_size=PIXELS,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def build(size: str, seed: int) -> Any:
    """A freshly initialised fp32 model of one of SIZES."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    shape = SIZES[size]
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=VISION_HIDDEN,
        intermediate_size=VISION_INNER,
        num_hidden_layers=shape["vision_layers"],
        num_attention_heads=VISION_HEADS,
        image_size=SIDE * PIXELS,
        patch_size=PIXELS,
        projection_dim=VISION_HIDDEN,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=CONTEXT,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=VISUAL_TOKENS,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def save(model: Any, folder: Path) -> None:
    """Write a plain bf16 model folder with its processor; shards of less than 16 MB."""
    import torch

    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="12MB")
    processor().save_pretrained(folder)
