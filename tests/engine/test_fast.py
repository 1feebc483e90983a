"""The engine on a CPU in fp32 tells plain transformers' tokens; what it does not run it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from engine_types import Ask, Load, Packs

from qatbench.engine import fast, fused, pick
from qatbench.engine.decoder import ROPE, Decoder
from qatbench.engine.fast import FastRunner
from qatbench.engine.form import LIBRARY, Card
from qatbench.engine.fused import Fused
from qatbench.engine.plain import PlainRunner
from qatbench.engine.products import Product
from qatbench.engine.runner import Runner
from qatbench.errors import ArtifactError, UsageError
from qatbench.quant.packing import Affine
from qatbench.vlm import kernel
from qatbench.vlm import load as models
from qatbench.vlm.batch import Encoded
from qatbench.vlm.generate import generate
from qatbench.vlm.load import Loaded, ModelFolder

ATOL = 5e-5  # as tests/vlm/test_scoring.py: fp32, other orders of addition
NAMES = [*tiny.SAVE, "mini/student"]


def told(runner: Runner, prompts: list[Encoded], *counts: int) -> torch.Tensor:
    """Tokens (rows, 1 + all counts), asked for in so many calls."""
    started = runner.start(prompts, 1 + sum(counts))
    parts = [runner.step(started, count) for count in counts]
    return torch.cat([started.first[:, None], *parts], 1)


# --- the same tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_generate(
    name: str, load: Load, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(name)
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", -1)  # none ends
    prompts = ask(loaded, 5)
    assert len(set(map(len, prompts))) > 1  # padded
    assert {bool(p.pixels) for p in prompts} == ({True, False} if loaded.arch.is_vlm else {False})
    runner = FastRunner(loaded)
    together = told(runner, prompts, 7)
    assert torch.equal(told(runner, prompts, 2, 0, 1, 4), together)
    assert torch.equal(told(PlainRunner(loaded), prompts, 7), together)
    texts = loaded.tokenizer.batch_decode(together.tolist(), skip_special_tokens=True)
    assert texts == generate(loaded, prompts, 8)
    assert len({tuple(row) for row in together.tolist()}) > 1


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_plain_model_on_a_row_alone(
    name: str, load: Load, ask: Ask
) -> None:
    loaded = load(name)
    prompts, runner = ask(loaded, 3), FastRunner(loaded)
    tokens = told(runner, prompts, 4)
    assert runner.last is not None
    for prompt, row, logits in zip(prompts, tokens.tolist(), runner.last, strict=True):
        want = loaded.model(**prompt.inputs(row[:-1])).logits[0, -1]
        torch.testing.assert_close(logits, want, atol=ATOL, rtol=0)


@pytest.mark.parametrize(("memory", "way"), [(10**12, "dense"), (0, "library")])
@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["text", "llava"])
def test_packed_checkpoints_on_a_cpu_run_with_the_kernel_that_is_picked(
    family: str, method: str, memory: int, way: str, pack: Packs, ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernel, "_memory", lambda: memory)  # dense only where it fits
    folder = pack(family, method)
    runner = pick.load("qatbench", folder, device="cpu", dtype=torch.float32)
    assert isinstance(runner, FastRunner)
    linear = runner.decoder.layers[0].mlp.down_proj
    assert hasattr(linear, "qweight") == (way == "library")
    assert runner.kernel == type(linear).__name__
    assert (runner.kernel == "Linear") == (way == "dense")
    assert (runner.engine, runner.attention) == ("qatbench", "sdpa, filled part")
    prompts = ask(runner.loaded, 3)
    plain = PlainRunner(models.load(folder, device="cpu", dtype=torch.float32, kernel=way))
    assert torch.equal(told(runner, prompts, 5), told(plain, prompts, 5))


@pytest.mark.parametrize("name", ["text", "qwen2_5_vl"])
def test_rows_that_stay_go_on_as_before(name: str, load: Load, ask: Ask) -> None:
    loaded = load(name)
    prompts = ask(loaded, 4)
    runners: list[Runner] = [FastRunner(loaded), PlainRunner(loaded)]
    for runner in runners:
        together = told(runner, prompts, 6)
        started = runner.start(prompts, 7)
        parts = [runner.step(started, 2)[[3, 1]]]
        runner.keep(started, [3, 1])
        parts.append(runner.step(started, 3))
        runner.keep(started, [1])
        last = runner.step(started, 1)
        assert torch.equal(torch.cat(parts, 1), together[[3, 1], 1:6])
        assert torch.equal(last, together[[1], 6:])


def tiny_llama(**changes: Any) -> Loaded:
    """A text model with other settings than the family's own."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**tiny.text_sizes(96) | changes)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    tiny._lively(model, 0).float()
    folder = ModelFolder("tiny", Path(), config.to_dict(), {})
    return Loaded(folder, model, SimpleNamespace(pad_token_id=0), None, "dense")


ANGLES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


def turned(kind: str) -> Loaded:
    return tiny_llama(
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0}
        | ANGLES.get(kind, {"factor": 4.0})
    )


def words(*lengths: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    return [
        Encoded(torch.randint(2, 96, (n,), generator=generator).tolist(), "", {}) for n in lengths
    ]


@pytest.mark.parametrize("kind", ROPE)
def test_rotary_embeddings_that_are_scaled(kind: str) -> None:
    loaded = turned(kind)
    prompts = words(40, 9, 23)
    runner = FastRunner(loaded)
    assert torch.equal(told(runner, prompts, 12), told(PlainRunner(loaded), prompts, 12))
    cos, _ = runner.decoder.rope(4)
    same = torch.allclose(cos, FastRunner(turned("default")).decoder.rope(4)[0])
    assert same == (kind == "default")


def test_all_and_one_key_value_heads_and_no_token_at_all(load: Load) -> None:
    for kv in (1, 4):
        loaded = tiny_llama(num_key_value_heads=kv)
        prompts = words(3, 1)
        assert torch.equal(
            told(FastRunner(loaded), prompts, 6), told(PlainRunner(loaded), prompts, 6)
        )
    runner = FastRunner(load("text"))
    started = runner.start(words(5), 1)
    assert runner.step(started, 0).shape == (1, 0)


# --- bytes ----------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_weights_and_of_the_whole_room(load: Load) -> None:
    loaded = load("text")
    runner = FastRunner(loaded)
    held = [*loaded.model.parameters(), *loaded.model.buffers()]
    assert runner.weight_bytes() == sum(tensor.numel() * 4 for tensor in held)
    token = 2 * tiny.LAYERS * tiny.KV_HEADS * tiny.HEAD * 4
    started = runner.start(words(3, 1), 4)
    assert runner.cache_bytes(started) == 2 * token * (3 + 4)
    runner.step(started, 3)
    assert runner.cache_bytes(started) == 2 * token * (3 + 4)


# --- refusals -------------------------------------------------------------------------------------


def test_beyond_the_room(load: Load) -> None:
    runner = FastRunner(load("text"))
    started = runner.start(words(4), 3)
    with pytest.raises(UsageError, match="3 tokens asked for, there is room for 2"):
        runner.step(started, 3)
    assert runner.step(started, 2).shape == (1, 2)  # the refusal took nothing
    with pytest.raises(UsageError, match="room for 0"):
        runner.step(started, 1)


@pytest.mark.parametrize("name", NAMES)
def test_room_is_made_for_more(name: str, load: Load, ask: Ask) -> None:
    loaded = load(name)
    prompts = ask(loaded, 3)
    want = told(PlainRunner(loaded), prompts, 9)
    runners: list[Runner] = [FastRunner(loaded), PlainRunner(loaded)]
    for runner in runners:
        started = runner.start(prompts, 3)
        parts = [started.first[:, None], runner.step(started, 2)]
        runner.grow(started, 4)
        parts.append(runner.step(started, 1))
        runner.grow(started, 3)
        assert started.room == 10
        parts.append(runner.step(started, 6))
        assert torch.equal(torch.cat(parts, 1), want)
        with pytest.raises(UsageError):
            runner.step(started, 1)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("hidden", 1000, "multiple of 64, not 1000"), ("head", 96, "128 or 256, not 96"),
        ("intermediate_size", 1001, "multiple of 8, not 1001"),
        ("hidden_act", "gelu", "SiLU, not 'gelu'"),
    ],
)  # fmt: skip
def test_shapes_that_kernels_do_not_take(part: str, value: Any, said: str) -> None:
    sizes, config = {"hidden": 1024, "head": 64}, {"intermediate_size": 1000, "hidden_act": "silu"}
    decoder: Any = SimpleNamespace(
        sizes=SimpleNamespace(**sizes), inner=SimpleNamespace(config=SimpleNamespace(**config))
    )
    fused._check_sizes(decoder)
    setattr(decoder.sizes if part in sizes else decoder.inner.config, part, value)
    with pytest.raises(UsageError, match=said) as error:
        fused._check_sizes(decoder)
    assert error.value.hint == "--engine transformers"


def test_a_width_that_only_torch_multiplies_has_no_other_form() -> None:
    card = Card(132, 228 << 10)
    assert Product(torch.empty(4096, 1000, device="meta")).forms(1, card) == [LIBRARY]
    assert len(Product(torch.empty(4096, 1024, device="meta")).forms(1, card)) > 5


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_change_with_the_length(kind: str) -> None:
    loaded = tiny_llama()
    loaded.model.config.rope_parameters["rope_type"] = kind
    with pytest.raises(UsageError, match=f"'{kind}' changes with the length") as error:
        FastRunner(loaded)
    assert error.value.hint == "--engine transformers"


def test_attention_through_a_window() -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        **tiny.text_sizes(96), use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    model = transformers.Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    folder = ModelFolder("tiny", Path(), config.to_dict(), {})
    loaded = Loaded(folder, model, SimpleNamespace(pad_token_id=0), None, "dense")
    with pytest.raises(UsageError, match="sliding_attention") as error:
        FastRunner(loaded)
    assert error.value.hint == "--engine transformers"


def unread(**quantization: Any) -> ModelFolder:
    """A folder of which only the config is known: nothing of it can be loaded."""
    config: dict[str, Any] = {"model_type": "llama"}
    if quantization:
        config["quantization_config"] = quantization
    return ModelFolder("tiny", Path("/nowhere"), config, {})


def test_widths_and_dtypes_are_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def touched(*arguments: Any, **how: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(models, "load", touched)
    monkeypatch.setattr(fast, "affine_state", touched)
    three = unread(bits=3, quant_method="gptq")
    with pytest.raises(UsageError, match="16 and 4 bits on CUDA, not 3") as error:
        fast.load(three, device="cuda", dtype=torch.bfloat16)
    assert error.value.hint == "--engine transformers"
    for folder in (unread(), unread(bits=4, quant_method="gptq")):
        for dtype in (torch.float16, torch.float32):
            with pytest.raises(UsageError, match=f"bfloat16 on CUDA, not {dtype}") as error:
                fast.load(folder, device="cuda", dtype=dtype)
            assert error.value.hint == "--dtype bfloat16, or --engine transformers"
    for folder in (unread(), three):
        with pytest.raises(AssertionError, match="loaded"):
            fast.load(folder, device="cpu", dtype=torch.float16)


@pytest.mark.parametrize(
    ("group", "settings", "told"),
    [
        (96, {}, r"layers.0.self_attn.q_proj: .* 1152 x 384 in groups of 96"),
        (128, {"intermediate_size": 352}, r"layers.0.mlp.down_proj: .* 384 x 352 in groups of 128"),
        (None, {"mlp_bias": True}, "gate and up with a bias"),
    ],
    ids=["group", "width", "bias"],
)
def test_what_kernels_do_not_take_is_known_without_weights(
    group: int | None, settings: dict[str, Any], told: str
) -> None:
    sizes = {"hidden_size": 384, "intermediate_size": 768, "num_attention_heads": 6} | settings
    config = transformers.LlamaConfig(num_hidden_layers=2, vocab_size=64, **sizes)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    folder = ModelFolder("tiny", Path(), config.to_dict(), {})
    decoder = Decoder(Loaded(folder, model, SimpleNamespace(), None, "none"))
    with pytest.raises(UsageError, match=told) as error:
        fused.check(decoder, group)
    assert error.value.hint == "--engine transformers"
    if group == 96:
        fused.check(decoder, 128)
        fused.check(decoder, -1)
        fused.check(decoder)


def test_shapes_are_refused_before_any_weight_is_loaded(
    source: Callable[[str], ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast.cuda, "check", lambda device: None)
    for name in ("load", "load_state"):
        monkeypatch.setattr(models, name, lambda *given, **how: pytest.fail("loaded"))
    for name in ("text", "llava"):
        with pytest.raises(UsageError, match="take heads of 64, 128 or 256") as error:
            fast.load(source(name), device="cuda", dtype=torch.bfloat16)
        assert error.value.hint == "--engine transformers"


@pytest.mark.parametrize("settings", [{"group_size": 96}, {"quant_method": "another"}], ids=str)
def test_a_format_without_groups_is_left_to_whoever_unpacks(
    settings: dict[str, Any], source: Callable[[str], ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(fast.cuda, "check", lambda device: None)
    monkeypatch.setattr(fast, "check", lambda decoder, group: asked.append(group))
    monkeypatch.setattr(fast, "load_around", lambda *given: pytest.fail("loaded"))
    text = source("text")
    packed = ModelFolder("tiny", text.path, text.config | {"quantization_config": settings}, {})

    def unpack(*given: Any) -> Any:
        raise ArtifactError("cannot unpack")

    monkeypatch.setattr(fast, "affine_state", unpack)
    with pytest.raises(ArtifactError, match="cannot unpack"):
        fast.load(packed, device="cuda", dtype=torch.bfloat16)
    assert asked == [settings.get("group_size")]


def test_packed_fields_are_for_the_kernels_alone(load: Load) -> None:
    nothing = torch.zeros(1)
    packed = {"model.layers.0.mlp.down_proj": Affine(nothing, nothing, nothing)}
    with pytest.raises(UsageError, match="for CUDA in bfloat16") as error:
        FastRunner(load("text"), packed)
    assert error.value.hint == "--dtype bfloat16"


@pytest.mark.parametrize("head", [32, 96, 192, 512])
def test_heads_that_the_kernels_do_not_take(head: int) -> None:
    with pytest.raises(UsageError, match=f"heads of 64, 128 or 256, not {head}") as error:
        Fused(Decoder(tiny_llama(head_dim=head)), {})
    assert error.value.hint == "--engine transformers"


@pytest.mark.parametrize(("group", "inner"), [(16, 128), (32, 96)])
def test_shapes_that_the_kernels_do_not_take(group: int, inner: int) -> None:
    decoder = Decoder(tiny_llama(head_dim=64, intermediate_size=inner))
    packed = {}
    for name, module in decoder.inner.named_modules():
        if name.endswith("_proj"):
            groups = (module.out_features, module.in_features // group)
            fields = torch.zeros(module.weight.shape, dtype=torch.uint8)
            eights = torch.full(groups, 8, dtype=torch.uint8)
            packed[f"model.{name}"] = Affine(fields, eights, torch.ones(groups).half())
    first = "model.layers.0.self_attn.q_proj" if group == 16 else "model.layers.0.mlp.down_proj"
    with pytest.raises(UsageError, match=f"{first}: .* in groups of {group}") as error:
        Fused(decoder, packed)
    assert error.value.hint == "--engine transformers"
    assert "--engine" not in error.value.message


def test_activations_that_the_kernels_do_not_take() -> None:
    loaded = tiny_llama(head_dim=64, hidden_act="gelu")
    prompts = words(7, 3)  # in torch the model's own is used
    assert torch.equal(told(FastRunner(loaded), prompts, 5), told(PlainRunner(loaded), prompts, 5))
    with pytest.raises(UsageError, match="'gelu'") as error:
        Fused(Decoder(loaded), {})
    assert error.value.hint == "--engine transformers"
