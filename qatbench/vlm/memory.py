"""What memory a piece of work takes, from the models' configs alone. No torch.

GB are 1e9 bytes, as in every measured figure here. A training holds the most at one of two
moments, and the estimate is the larger; nothing in it is fitted:

  start of the backward pass  weights, moments, teacher, logits, what all layers have saved
  its end                     weights, moments, teacher, gradients, what one layer has saved

A layer saves, in bytes a token (h hidden, a heads x head_dim, i inner), counted tensor by tensor:

  bf16 weights                    two norms 16 h   q, k, v, output  8 a   MLP  8 i
  fp32 weights, bf16 arithmetic   two norms 26 h                    8 a        8 i
  fp32                            two norms 24 h                   16 a       16 i

and its additive mask, tokens squared. With checkpointing it saves its input only, and one layer at
a time is computed again. Moments are 8 bytes a trained weight (AdamW), or 2 and two scales a block
of 256 (8-bit AdamW). The frozen vision tower keeps nothing. Training on the grid adds a scale a
group (weight, gradient, moments); on the grid, and where fp32 weights meet bf16 arithmetic, a layer
saves a copy of its weights too. Losses hold 5 (cross-entropy), 8.5 (plain distillation) or 10.5
(decoupled) fp32 copies of up to 1024 positions' logits. Held against measured peaks in
tests/vlm/test_memory.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qatbench.recipe import TAUGHT, TRAINED
from qatbench.vlm import layout
from qatbench.vlm.counts import count, stored

GB = 1e9
METHODS = ("eval", "rtn", "gptq", "awq", "autoround", *TRAINED)
ON_THE_GRID = ("qat", "grace")
COPIES = {"sft": 5.0, "kd": 8.5, "qat": 5.0, "grace": 10.5}  # fp32 logits in the losses
# Bytes a weight at the peak of `quantize --device cpu`, measured on a Llama of 222 million weights
# (benchmarks/quantize_memory.py) and rounded up.
ON_CPU = {"rtn": 9.0, "gptq": 10.5, "awq": 14.5, "autoround": 10.5}
# Beside weights on a GPU, bytes a weight of the widest linear (of a layer for AutoRound). RTN and
# GPTQ as measured at the widths of Qwen2-VL-2B and LLaVA-1.5-7B; AWQ is taken to be as GPTQ, and of
# AutoRound six fp32 copies are counted.
ON_GPU = {"rtn": 16.0, "gptq": 18.0, "awq": 18.0, "autoround": 24.0}
CHUNK = 1024  # positions whose logits are in fp32 at a time


@dataclass(frozen=True)
class Work:
    """A piece of work. The defaults are the leanest training that train-qat offers."""

    method: str  # one of METHODS
    bits: int = 4
    group_size: int = 128
    batch_size: int = 8  # sequences in one forward: --micro-batch-size of train-qat
    length: int = 704  # tokens of a sequence
    answer: int = 64  # of them supervised
    accumulated: bool = False  # whether an optimizer step has more than one forward
    weights: Literal["bfloat16", "float32"] = "bfloat16"  # what the optimizer updates
    optimizer: Literal["adamw8bit", "adamw"] = "adamw8bit"
    checkpointing: bool = True
    teacher_dtype: Literal["auto", "int8"] = "auto"
    device: str = "cuda"

    @property
    def arithmetic(self) -> int:
        """Bytes of an activation."""
        return 4 if self.device == "cpu" and self.weights == "float32" else 2

    @property
    def tokens(self) -> int:
        """Tokens of one forward."""
        return self.batch_size * self.length


@dataclass(frozen=True)
class Need:
    """Bytes by what holds them, at the moment when the most is held on one device."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All of them, bytes."""
        return sum(self.parts.values())


def need(config: Mapping[str, Any], work: Work, teacher: Mapping[str, Any] | None = None) -> Need:
    """What `work` holds on its device at once; `teacher` is the config of one.

    Raises: UsageError for a config without its sizes.
    """
    if work.method in TRAINED:
        return training(config, work, teacher)
    return answering(config, work) if work.method == "eval" else calibrating(config, work)


def answering(config: Mapping[str, Any], work: Work) -> Need:
    """What `eval` holds: the weights as they multiply, and one forward of the widest layer.

    The library's kernels keep 8 and 4 bits packed; 3 and 2 bits are multiplied densely.
    """
    settings = config.get("quantization_config") or {}
    bits = int(settings.get("bits", work.bits))
    if bits in (4, 8):
        weights = stored(config, bits, int(settings.get("group_size", work.group_size)))
    else:
        weights = float(work.arithmetic * count(config).total)
    text = layout.text_sizes(config)
    wide = 4 * int(text["intermediate_size"]) + 6 * int(text["hidden_size"])
    logits = (work.arithmetic + 8) * min(CHUNK, work.tokens) * _vocabulary(config)
    return Need({"weights": weights, "activations": work.arithmetic * wide * work.tokens + logits})


def calibrating(config: Mapping[str, Any], work: Work) -> Need:
    """What `quantize` holds on its device.

    On a GPU the model stays in main memory: RTN has one linear there at a time, GPTQ and AWQ the
    library's fp32 copy of the model beside a linear's statistics, AutoRound what surrounds the
    layers and a layer that is tuned. On the CPU all of it lies in the same memory.
    """
    counts = count(config)
    if work.device == "cpu":
        return Need({"weights, integers, packing, reload": ON_CPU[work.method] * counts.total})
    widest = float(max(out * width for out, width in layout.linear_shapes(config).values()))
    if work.method == "rtn":
        return Need({"a linear": ON_GPU["rtn"] * widest})
    if work.method in ("gptq", "awq"):
        copy = {"the library's copy": 4.0 * counts.total}
        return Need(copy | {"a linear's statistics": ON_GPU[work.method] * widest})
    layer = counts.linears / int(layout.text_sizes(config)["num_hidden_layers"])
    around = 4.0 * (counts.total - counts.linears)
    return Need({"around the layers": around, "a layer": ON_GPU[work.method] * layer})


def writing(config: Mapping[str, Any]) -> float:
    """Bytes of main memory that the export and its reload proof hold, wherever it was made."""
    return ON_CPU["rtn"] * count(config).total


def training(
    config: Mapping[str, Any], work: Work, teacher: Mapping[str, Any] | None = None
) -> Need:
    """What a training of TRAINED holds on its device; `teacher` is the config of one.

    Raises: UsageError for a config without its sizes.
    """
    counts, layers = count(config), int(layout.text_sizes(config)["num_hidden_layers"])
    width = 4 if work.weights == "float32" else 2
    scales = _scales(config, work) if work.method in ON_THE_GRID else 0
    moment = 8 if work.optimizer == "adamw" else 2 + 8 / 256
    held = {
        "weights": width * counts.total + 4 * scales,
        "moments": moment * (counts.trained + scales),
    }
    taught = work.method in TAUGHT and teacher is not None
    if taught and teacher is not None:
        held["teacher"] = _teacher(teacher, work)
    gradients = width * counts.trained + 4 * scales
    layer = _saved(config, work) + _copied(work, counts.linears / layers)
    entering = width * int(layout.text_sizes(config)["hidden_size"]) * work.tokens
    every = layers * entering + layer if work.checkpointing else layers * layer
    every += _losses(config, work, taught)
    if work.accumulated:
        return Need(held | {"gradients": gradients, "activations": every})
    last = entering + layer
    if every > gradients + last:
        return Need(held | {"activations": every})
    return Need(held | {"gradients": gradients, "activations": last})


def _scales(config: Mapping[str, Any], work: Work) -> float:
    """Scales of all quantized linears."""
    shapes = layout.linear_shapes(config).values()
    return sum(n * (1 if work.group_size == -1 else w / work.group_size) for n, w in shapes)


def _teacher(config: Mapping[str, Any], work: Work) -> float:
    counts = count(config)
    eight = counts.linears if work.teacher_dtype == "int8" else 0
    return float(work.arithmetic * (counts.total - eight) + eight)


def _saved(config: Mapping[str, Any], work: Work) -> float:
    """Bytes that one decoder layer saves for its backward pass."""
    text = layout.text_sizes(config)
    hidden, inner = int(text["hidden_size"]), int(text["intermediate_size"])
    heads = int(text["num_attention_heads"])
    inside = heads * int(text.get("head_dim") or hidden // heads)
    mixed = 16 if work.weights == "bfloat16" else 26
    norms = 24 if work.arithmetic == 4 else mixed
    size = work.arithmetic
    token = norms * hidden + 4 * size * (inside + inner)
    return float(work.tokens * (token + size * work.length))


def _copied(work: Work, linears: float) -> float:
    """Bytes of the weights that layers save because they compute with other ones than they hold."""
    other = work.weights == "float32" and work.arithmetic == 2
    return work.arithmetic * linears if work.method in ON_THE_GRID or other else 0.0


def _losses(config: Mapping[str, Any], work: Work, taught: bool) -> float:
    """Bytes of the logits of supervised tokens, and of what the losses make of them."""
    rows = work.batch_size * work.answer
    wide = 4 * COPIES[work.method] * min(CHUNK, rows)
    return (wide + work.arithmetic * rows * (2 if taught else 1)) * _vocabulary(config)


def _vocabulary(config: Mapping[str, Any]) -> int:
    return int(layout.text_sizes(config)["vocab_size"])
