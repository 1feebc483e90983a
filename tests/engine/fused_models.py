"""Small models and weights for the tests of the engine's kernels, on a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from qatbench.engine.arguments import NextNorm
from qatbench.engine.form import Form
from qatbench.engine.products import LOGITS, RESIDUAL, STORE, SWIGLU, Product
from qatbench.engine.weights import pack
from qatbench.quant.packing import Affine
from qatbench.vlm.batch import Encoded
from qatbench.vlm.load import Loaded, ModelFolder

TWICE = 2**-7  # bf16 rounds an output by 2^-9 of it at most, relative to the largest less
EPS = 1e-6


def affine(out: int, width: int, group: int, zeros: bool, device: str) -> Affine:
    groups = (out, width // group)
    zero = torch.randint(0, 16, groups, dtype=torch.uint8, device=device)
    fields = torch.randint(0, 16, (out, width), dtype=torch.uint8, device=device)
    scales = (torch.rand(groups, device=device) / 100 + 0.001).half()
    return Affine(fields, zero if zeros else torch.full_like(zero, 8), scales)


def dense(a: Affine) -> Tensor:
    """fp64."""
    fields = a.fields.double().view(*a.scales.shape, -1)
    return ((fields - a.zeros.double()[..., None]) * a.scales.double()[..., None]).flatten(1)


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max()).item()


@dataclass(frozen=True)
class Case:
    """A product with what goes into it, what comes out, exactly, and how far it may be off."""

    product: Product
    x: Tensor
    squares: Tensor | None
    before: Tensor  # what a residual adds to
    norm: Tensor
    want: Tensor  # fp64
    bound: float

    def multiply(self, form: Form) -> tuple[Tensor, NextNorm]:
        """What the kernels make of it, and what a residual leaves for the next norm."""
        residual = self.product.epilogue == RESIDUAL
        got = self.before.clone() if residual else torch.zeros(self.want.shape).to(self.x.device)
        got = got if self.product.epilogue == LOGITS else got.bfloat16()
        zeros = torch.zeros(len(self.x), dtype=torch.float64, device=self.x.device)
        after = NextNorm(self.norm, torch.zeros_like(self.before), zeros)
        self.product(
            form, self.x, got, squares=self.squares, eps=EPS, after=after if residual else None
        )
        return got, after


def cases(
    out: int, width: int, group: int, zeros: bool, columns: int, int4: bool, device: str
) -> list[Case]:
    """Every epilogue, of random weights and columns."""
    torch.manual_seed(0)
    a = affine(out, width, group, zeros, device)
    w = torch.randn(out, width, device=device).bfloat16() / 16
    exact = dense(a) if int4 else w.double()
    x, before = (torch.randn(columns, n, device=device).bfloat16() for n in (width, out))
    squares = torch.rand(columns, device=device, dtype=torch.float64) * width
    bias, norm = (torch.randn(out, device=device).bfloat16() for _ in range(2))
    weight, paired = (pack(a), pack(a, paired=True)) if int4 else (w, w)
    y = x.double() @ exact.T
    normed = y * torch.rsqrt(squares / width + EPS)[:, None]
    gate, up = normed.chunk(2, -1)
    every: list[tuple[Product, Tensor | None, Tensor, float]] = [
        (Product(weight, STORE, bias), squares, normed + bias.double(), TWICE),
        (Product(weight, RESIDUAL), None, y + before.double(), TWICE),
        # Up to eight columns: fp32 sums of up to 128 + 15 times x, of which 15 times x counts.
        (Product(weight, LOGITS), squares, normed, 3e-5),
        (Product(paired, SWIGLU), squares, F.silu(gate) * up, TWICE),
    ]
    return [Case(p, x, given, before, norm, want, most) for p, given, want, most in every]


FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"heads": 4, "kv": 4}),
    "llama-128": (transformers.LlamaConfig, transformers.LlamaForCausalLM,
                  {"heads": 4, "kv": 2, "head_dim": 128}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"heads": 6, "kv": 1}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM,
              {"heads": 4, "kv": 2, "head_dim": 128}),
}  # fmt: skip


def loaded_of(family: str, device: str, seed: int = 0) -> Loaded:
    config_class, model_class, sizes = FAMILIES[family]
    config = config_class(
        vocab_size=512, hidden_size=384, intermediate_size=768, num_hidden_layers=3,
        num_attention_heads=sizes["heads"], num_key_value_heads=sizes["kv"],
        head_dim=sizes.get("head_dim", 64), max_position_embeddings=1024, pad_token_id=0,
        eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = model_class._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    for name, value in model.named_parameters():
        noise = torch.randn_like(value)
        value.data = 1 + noise / 4 if "norm" in name else noise / (16 if "proj" in name else 2)
    model.generation_config.eos_token_id = 1
    folder = ModelFolder(family, Path(), config.to_dict(), {})
    return Loaded(folder, model.to(device).eval(), SimpleNamespace(pad_token_id=0), None, "dense")


def prompts(*lengths: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    return [
        Encoded(torch.randint(2, 512, (n,), generator=generator).tolist(), "", {}) for n in lengths
    ]


def int4(loaded: Loaded) -> dict[str, Affine]:
    """The model's linears as they round to 4 bits, which the model then has too."""
    found = {}
    for name, module in loaded.model.named_modules():
        if "_proj" in name:
            w = module.weight.data.float()
            groups = w.view(len(w), -1, 128)
            low = groups.amin(-1).clamp(max=0)
            scales = ((groups.amax(-1).clamp(min=0) - low) / 15).half()
            zeros = (-low / scales.float()).round().clamp(0, 15)
            fields = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
            found[name] = Affine(fields.flatten(1).to(torch.uint8), zeros.to(torch.uint8), scales)
            module.weight.data = dense(found[name]).bfloat16()
    return found
