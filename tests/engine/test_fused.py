"""The CUDA kernels against fp64 products, and their steps against the step in torch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from qatbench.engine import products
from qatbench.engine.decoder import torch_step
from qatbench.engine.fast import FastRunner
from qatbench.engine.products import LIBRARY, LOGITS, RESIDUAL, STORE, SWIGLU, Product
from qatbench.engine.weights import pack
from qatbench.quant.packing import Affine
from qatbench.vlm.batch import Encoded
from qatbench.vlm.load import Loaded, ModelFolder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# What bf16 rounds away once, at the output, relative to the largest output; norms round x again.
ONCE, TWICE, SILU = 2**-8, 2**-7, 2**-6
SHAPES = [(512, 1024, 128), (576, 576, 64), (256, 256, 32), (1536, 8960, 128)]
EPS = 1e-6


def affine(out: int, width: int, group: int, zeros: bool) -> Affine:
    groups = (out, width // group)
    zero = torch.randint(0, 16, groups, dtype=torch.uint8, device="cuda")
    fields = torch.randint(0, 16, (out, width), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(groups, device="cuda") / 100 + 0.001).half()
    return Affine(fields, zero if zeros else torch.full_like(zero, 8), scales)


def dense(a: Affine) -> Tensor:
    """fp64."""
    fields = a.fields.double().view(*a.scales.shape, -1)
    return ((fields - a.zeros.double()[..., None]) * a.scales.double()[..., None]).flatten(1)


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def some(forms: list[Any]) -> list[Any]:
    """The library's, and forms from both ends and between."""
    return [
        *(form for form in forms if form == LIBRARY),
        *forms[:: max(1, len(forms) // 3)],
        forms[-1],
    ]


@pytest.mark.parametrize(("out", "width", "group"), SHAPES)
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("columns", [1, 3, 20, 64])
@pytest.mark.parametrize("int4", [True, False], ids=["int4", "bf16"])
def test_products(out: int, width: int, group: int, zeros: bool, columns: int, int4: bool) -> None:
    if zeros and not int4:
        pytest.skip("bf16 has no zero points")
    torch.manual_seed(0)
    a = affine(out, width, group, zeros)
    w = torch.randn(out, width, device="cuda").bfloat16() / 16
    exact = dense(a) if int4 else w.double()
    x, residual = (torch.randn(columns, n, device="cuda").bfloat16() for n in (width, out))
    norm = (torch.rand(width, device="cuda") + 0.5).bfloat16()
    bias = torch.randn(out, device="cuda").bfloat16()
    wide = x.double()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * norm.double()
    weight, paired = (pack(a), pack(a, paired=True)) if int4 else (w, w)
    y = normed @ exact.T
    gate, up = y.chunk(2, -1)
    cases = [
        (Product(weight, STORE, norm, EPS, bias), y + bias.double(), TWICE),
        (Product(weight, RESIDUAL), wide @ exact.T + residual.double(), ONCE),
        (Product(weight, LOGITS), wide @ exact.T, 1e-5),
        (Product(paired, SWIGLU, norm, EPS), F.silu(gate) * up, SILU),
    ]
    forms = [(product, form) for product, _, _ in cases for form in product.forms(columns)]
    products.compile_all(forms, columns)
    for product, want, bound in cases:
        dtype = torch.float32 if product.epilogue == LOGITS else torch.bfloat16
        for form in product.forms(columns):
            got = torch.zeros(want.shape, dtype=dtype, device="cuda")
            product(form, x, got, residual=residual)
            most = TWICE if form == LIBRARY and product.epilogue in (LOGITS, RESIDUAL) else bound
            assert error(got, want) < most, (product.kind(columns), form)


@pytest.mark.parametrize(("out", "width", "group"), SHAPES)
@pytest.mark.parametrize("paired", [False, True])
def test_dequantizing_rounds_once(out: int, width: int, group: int, paired: bool) -> None:
    a = affine(out, width, group, zeros=True)
    room = torch.zeros(out, width, dtype=torch.bfloat16, device="cuda")
    products.dequantize(pack(a, paired=paired), room)
    assert torch.equal(room, dense(a).float().bfloat16())


@pytest.fixture(autouse=True)
def few_forms(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of its own for all tests, and few forms to measure."""
    root = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(root))
    every = Product.forms
    monkeypatch.setattr(Product, "forms", lambda self, columns: some(every(self, columns)))


FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"heads": 4, "kv": 4}),
    "llama-128": (transformers.LlamaConfig, transformers.LlamaForCausalLM,
                  {"heads": 4, "kv": 2, "head_dim": 128}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"heads": 6, "kv": 1}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM,
              {"heads": 4, "kv": 2, "head_dim": 128}),
}  # fmt: skip


def loaded_of(family: str, seed: int = 0) -> Loaded:
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
    return Loaded(folder, model.to("cuda").eval(), SimpleNamespace(pad_token_id=0), None, "dense")


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


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("lengths", [(40,), (700,), (33, 64, 7)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "int4"])
def test_steps_are_those_of_torch(family: str, lengths: tuple[int, ...], packed: bool) -> None:
    """Logits within a bound; where a token differs, its two best are closer than the error."""
    reference = loaded_of(family)
    weights = int4(reference) if packed else None
    fast = FastRunner(loaded_of(family), weights)
    asked = prompts(*lengths)
    slow = FastRunner(reference, kernels=False)
    a, b = fast.start(asked, 24), slow.start(asked, 24)
    state = b.state
    token = a.first
    for _ in range(20):
        state.token = token.clone()
        want = torch_step(slow.decoder, state.cache, state.rope, token)
        next_token = fast.step(a, 1)[:, 0]
        got = a.state.step.logits
        worst = (got - want.float()).abs().max().item()
        spread = want.float().std().item()
        assert worst < 0.15 * spread
        best = want.float().topk(2).values
        differs = next_token != want.float().argmax(-1)
        assert bool(((best[:, 0] - best[:, 1])[differs] <= 2 * worst).all())
        assert torch.equal(next_token, got.argmax(-1))
        token = next_token


def test_steps_of_one_call_and_of_several_are_the_same() -> None:
    fast = FastRunner(loaded_of("llama"))
    a = fast.start(prompts(40, 8), 24)
    together = fast.step(a, 20)
    b = fast.start(prompts(40, 8), 24)
    apart = torch.cat([fast.step(b, n) for n in (1, 3, 16)], 1)
    assert torch.equal(together, apart)
