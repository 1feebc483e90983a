"""A language model's decoder as the engine sees it: its parts, its cache, one step in torch.

The step is what the CUDA kernels are held to, and what runs where they do not (CPU, fp32): the
model's own norms and linears, whatever their class; rotary embedding, cache and attention are here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatbench.errors import UsageError
from qatbench.vlm.load import Loaded

ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles depend on the position alone."""


@dataclass(frozen=True)
class Sizes:
    """Of a decoder; `head` is the size of one head, `group` the query heads of a key-value head."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    eps: float

    @property
    def group(self) -> int:
        """Query heads that share keys and values."""
        return self.heads // self.kv_heads


@dataclass
class Cache:
    """Keys and values of a batch, rotated; only [start, filled) of a row is looked at.

    keys, values: (layers, rows, kv_heads, length, head). start, filled, turned: (rows,) int32: the
    first place that is no padding, the place of the next token, its rotary position.
    """

    keys: Tensor
    values: Tensor
    start: Tensor
    filled: Tensor
    turned: Tensor

    @property
    def length(self) -> int:
        """Places a row."""
        return self.keys.shape[3]

    def grow(self, more: int) -> None:
        """Add places to every row."""
        self.keys, self.values = (F.pad(of, (0, 0, 0, more)) for of in (self.keys, self.values))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone: (n,) int64."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.start, self.filled, self.turned = (
            of_row[rows] for of_row in (self.start, self.filled, self.turned)
        )

    def bytes(self) -> int:
        """Of keys and values, room included."""
        return 2 * self.keys.numel() * self.keys.element_size()


class Decoder:
    """The parts of a loaded model's decoder.

    Raises: UsageError for angles that change with the length, and for windows of attention.
    """

    def __init__(self, loaded: Loaded) -> None:
        model = loaded.model
        self.prefix = loaded.arch.layers
        self.inner: Any = model.get_submodule(loaded.arch.layers.rpartition(".")[0])
        self.layers: Any = self.inner.layers
        self.head: nn.Linear = model.lm_head
        self._mrope = loaded.arch.mrope
        config = model.config.get_text_config()
        kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if kind not in ROPE:
            raise UsageError(
                f"rotary embedding {kind!r} changes with the length of the text",
                hint="--engine transformers",
            )
        others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if others:
            raise UsageError(
                f"layers of {', '.join(sorted(others))}: the engine attends to all of the text",
                hint="--engine transformers",
            )
        heads = int(config.num_attention_heads)
        self.sizes = Sizes(
            layers=len(self.layers),
            hidden=int(config.hidden_size),
            heads=heads,
            kv_heads=int(config.num_key_value_heads or heads),
            head=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            vocabulary=int(self.head.weight.shape[0]),
            eps=float(config.rms_norm_eps),
        )

    def cache(self, rows: int, length: int, dtype: torch.dtype) -> Cache:
        """An empty cache on the model's device."""
        s, device = self.sizes, self.head.weight.device
        shape = (s.layers, rows, s.kv_heads, length, s.head)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        start, filled, turned = (
            torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(3)
        )
        return Cache(keys, values, start, filled, turned)

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 .. length - 1: (length, head) each, the model's dtype.

        Text counts alike on all axes of M-RoPE (arXiv:2409.12191, Sec. 2.1), so one axis is enough.
        """
        weight = self.head.weight
        places = torch.arange(length, device=weight.device)[None]
        places = places[None].expand(3, -1, -1) if self._mrope else places
        cos, sin = self.inner.rotary_emb(weight[:1, None], places)
        return cos.reshape(-1, length, cos.shape[-1])[0], sin.reshape(-1, length, sin.shape[-1])[0]


def torch_step(
    decoder: Decoder, cache: Cache, rope: tuple[Tensor, Tensor], token: Tensor
) -> Tensor:
    """Logits (rows, vocabulary) after one more token of every row, (rows,); the cache moves on."""
    s = decoder.sizes
    rows, at = len(token), int(cache.filled[0])  # all rows are left-padded to one length
    cos, sin = (part[cache.turned.long()][:, None, None] for part in rope)
    seen = torch.arange(at + 1, device=token.device)
    mask = None
    if bool((cache.start > 0).any()):
        mask = (seen >= cache.start[:, None])[:, None, None]
    x = decoder.inner.embed_tokens(token)[:, None]
    for i, layer in enumerate(decoder.layers):
        part, normed = layer.self_attn, layer.input_layernorm(x)
        q = part.q_proj(normed).view(rows, 1, s.heads, s.head)
        k = part.k_proj(normed).view(rows, 1, s.kv_heads, s.head)
        v = part.v_proj(normed).view(rows, 1, s.kv_heads, s.head)
        if hasattr(part, "q_norm"):
            q, k = part.q_norm(q), part.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        cache.keys[i, :, :, at] = _turn(k, cos, sin)[:, :, 0]
        cache.values[i, :, :, at] = v[:, :, 0]
        keys, values = cache.keys[i, :, :, : at + 1], cache.values[i, :, :, : at + 1]
        found = F.scaled_dot_product_attention(
            _turn(q, cos, sin), keys, values, mask,
            scale=1 / math.sqrt(s.head), enable_gqa=s.group > 1,
        )  # fmt: skip
        x = x + part.o_proj(found.transpose(1, 2).reshape(rows, 1, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    cache.filled += 1
    cache.turned += 1
    logits: Tensor = decoder.head(decoder.inner.norm(x))[:, 0]
    return logits


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves of a head paired (arXiv:2104.09864, as Llama's weights have it)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
