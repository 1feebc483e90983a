"""A decoding step on CUDA in bf16: five kernels a layer, captured once as a graph.

norm + q, k, v | rotary embedding, cache, attention | o + residual | norm + gate, up, SiLU | down +
residual; before them the embedding, after them norm + head and the choice of the token, so that a
step needs nothing from the host. A norm is done by three kernels: who makes x scales it and adds up
its squares, who multiplies divides by their root (`linear.cu`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatbench.engine.decoder import Decoder
from qatbench.engine.form import Card
from qatbench.engine.products import LOGITS, RESIDUAL, STORE, SWIGLU, Product, dequantize
from qatbench.engine.screen import Screen, screen
from qatbench.engine.weights import CHUNK, TILE, Packed, check_shape, pack
from qatbench.errors import ShapeError, UsageError
from qatbench.quant.packing import Affine

JOINED = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("self_attn", ("o_proj",)),
          ("mlp", ("gate_proj", "up_proj")), ("mlp", ("down_proj",)))  # fmt: skip
"""Linears that share their input, joined along the outputs."""
HEADS = (64, 128, 256)
"""Head sizes that `attention.cu` takes: a warp's lanes are shared evenly by whole keys."""


class Room:
    """Where INT4 weights are written out in bf16 for a dense product, one linear at a time."""

    def __init__(self, weights: int, device: torch.device) -> None:
        self.memory = torch.empty(weights, dtype=torch.bfloat16, device=device)
        self.holds: Packed | None = None

    def dense(self, packed: Packed) -> Tensor:
        """The weights (rows, width), valid until the next call for others."""
        out = self.memory[: packed.rows * packed.width].view(packed.rows, packed.width)
        if self.holds is not packed:
            dequantize(packed, out)
            self.holds = packed
        return out


class PackedLinear(nn.Module):
    """Some outputs of a joined INT4 linear, for many columns at a time: prefill."""

    def __init__(
        self, packed: Packed, room: Room, first: int, outputs: int, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.packed, self.room, self.first, self.outputs = packed, room, first, outputs
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., outputs), bf16."""
        weight = self.room.dense(self.packed)[self.first : self.first + self.outputs]
        return F.linear(x, weight, self.bias)


@dataclass(frozen=True)
class Layer:
    """What multiplies and what normalises in a layer."""

    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    first_norm: Tensor
    second_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None

    def products(self) -> tuple[Product, ...]:
        """In the order of a step."""
        return self.qkv, self.out, self.gate_up, self.down


def _weights(layer: Any, part: str, names: tuple[str, ...]) -> int:
    """Weights of linears that are joined."""
    modules = [getattr(getattr(layer, part), name) for name in names]
    return sum(module.in_features * module.out_features for module in modules)


def check(decoder: Decoder, group: int | None = None) -> None:
    """Refuse what the kernels would compute wrongly. The model may be on `meta`.

    Args:
        decoder: whose layers are alike.
        group: inputs that share a scale of INT4 weights; -1: all of an output's; None: bf16.

    Raises: UsageError.
    """
    _check_sizes(decoder)
    layer = decoder.layers[0]
    for part, names in JOINED:
        modules = [getattr(getattr(layer, part), name) for name in names]
        if _paired(names) and any(module.bias is not None for module in modules):
            raise UsageError("gate and up with a bias are not supported by the engine",
                             hint="--engine transformers")  # fmt: skip
        if group is None:
            continue
        out, width = sum(module.out_features for module in modules), modules[0].in_features
        with _refused(f"{decoder.prefix}.0.{part}.{names[0]}"):
            check_shape(out, width, width if group == -1 else group, _paired(names))


def _paired(names: tuple[str, ...]) -> bool:
    """Whether a tile holds outputs of two linears, as of gate and up."""
    return names[0] == "gate_proj"


@contextlib.contextmanager
def _refused(name: str) -> Iterator[None]:
    """Say whose weights have a shape that kernels do not take."""
    try:
        yield
    except ShapeError as error:
        raise UsageError(f"{name}: {error.message}", hint="--engine transformers") from error


def _check_sizes(decoder: Decoder) -> None:
    s, hint = decoder.sizes, "--engine transformers"
    if s.head not in HEADS or s.hidden % CHUNK:
        raise UsageError(
            f"the engine's kernels take heads of 64, 128 or 256, not {s.head}, "
            f"and a hidden size that is a multiple of {CHUNK}, not {s.hidden}",
            hint=hint,
        )
    inner = decoder.inner.config.intermediate_size
    if 2 * inner % TILE:
        raise UsageError(
            f"the engine's kernels take an inner size that is a multiple of {TILE // 2}, "
            f"not {inner}",
            hint=hint,
        )
    act = decoder.inner.config.hidden_act
    if act not in ("silu", "swish"):
        raise UsageError(f"the engine's kernels compute SiLU, not {act!r}", hint=hint)


class Fused:
    """The decoder of a model on CUDA, its linears joined and, where INT4, packed for the kernels.

    `packed` has the linears that are INT4, by their names in the model; it is emptied as they are
    taken over. The model's modules then use the same memory.

    Raises: UsageError for shapes that the kernels do not take.
    """

    def __init__(self, decoder: Decoder, packed: dict[str, Affine]) -> None:
        self.decoder = decoder
        check(decoder)
        device = decoder.head.weight.device
        self.int4 = bool(packed)
        sizes = [_weights(layer, *joined) for layer in decoder.layers for joined in JOINED]
        self.room = Room(max(sizes) if packed else 0, device)
        self.layers = [self._layer(i, layer, packed) for i, layer in enumerate(decoder.layers)]
        self.norm = decoder.inner.norm.weight.data
        head = decoder.head.weight.data
        if short := -len(head) % TILE:  # the last tile is filled up; nobody looks there
            head = F.pad(head, (0, 0, 0, short))
        self.head = Product(head, LOGITS, None, not self._whole())

    @functools.cached_property
    def screen(self) -> Screen:
        """The head in 8 bits, for steps of one row: made when they are first asked about."""
        assert isinstance(self.head.weight, Tensor)
        return screen(self.head.weight, self.head.alone)

    def drop_screen(self) -> None:
        """Give its memory back, where steps of one row are faster without it."""
        self.__dict__.pop("screen", None)

    def _layer(self, index: int, layer: Any, packed: dict[str, Affine]) -> Layer:
        joined = [self._join(index, layer, part, names, packed) for part, names in JOINED]
        (qkv, bias), (out, out_bias), (gate_up, _), (down, down_bias) = joined
        whole = self._whole()
        norms = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
        q_norm, k_norm = (None if norm is None else norm.weight.data for norm in norms)
        return Layer(
            Product(qkv, STORE, bias, not whole), Product(out, RESIDUAL, out_bias, whole),
            Product(gate_up, SWIGLU, None, not whole), Product(down, RESIDUAL, down_bias, whole),
            layer.input_layernorm.weight.data, layer.post_attention_layernorm.weight.data,
            q_norm, k_norm,
        )  # fmt: skip

    def _whole(self) -> bool:
        """Whether products of hidden outputs have a block for every multiprocessor."""
        return self.decoder.sizes.hidden // TILE >= Card.current().multiprocessors

    def _join(
        self, index: int, layer: Any, part: str, names: tuple[str, ...], packed: dict[str, Affine]
    ) -> tuple[Packed | Tensor, Tensor | None]:
        """One weight for linears of one input; their modules become views of it."""
        owner = getattr(layer, part)
        modules = [getattr(owner, name) for name in names]
        keys = [f"{self.decoder.prefix}.{index}.{part}.{name}" for name in names]
        here = [key in packed for key in keys]
        if any(here) and not all(here):
            raise UsageError(f"layer {index}: some of {', '.join(names)} are INT4, some are not",
                             hint="--engine transformers")  # fmt: skip
        biases = [module.bias for module in modules]
        bias = None if biases[0] is None else torch.cat([b.data for b in biases])
        counts = [module.out_features for module in modules]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        if all(here):
            affine = [packed.pop(key) for key in keys]
            joined = Affine(*(torch.cat(fields) for fields in zip(*affine, strict=True)))
            with _refused(keys[0]):
                weight = pack(joined, paired=_paired(names))
            for name, module, first, count in zip(names, modules, starts, counts, strict=True):
                linear = PackedLinear(weight, self.room, first, count, module.bias)
                setattr(owner, name, linear)
            return weight, bias
        if len(modules) == 1:
            return modules[0].weight.data, bias
        dense = torch.cat([module.weight.data for module in modules])
        for module, first, count in zip(modules, starts, counts, strict=True):
            module.weight.data = dense[first : first + count]
        return dense, bias

    def packed_bytes(self) -> int:
        """Bytes of the packed linears, and of the screen if there is one."""
        weights = [p.weight for layer in self.layers for p in layer.products()]
        screened = self.screen.bytes() if "screen" in self.__dict__ else 0
        return screened + sum(w.bytes() for w in weights if isinstance(w, Packed))

    def kinds(self, rows: int) -> dict[str, list[Product]]:
        """Products that share a form, by what decides it, in the order of a step.

        Of one row the last two are heads, of which a step takes either.
        """
        found: dict[str, list[Product]] = {}
        heads = [self.head, *([self.screen.product] if rows == 1 else [])]
        for product in [p for layer in self.layers for p in layer.products()] + heads:
            found.setdefault(product.kind(rows), []).append(product)
        return found

    def names(self) -> Mapping[str, str]:
        """What multiplies and what attends, for the record."""
        return {"linear": "int4 mma" if self.int4 else "bf16 mma", "attention": "split keys"}
