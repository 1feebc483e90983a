"""Plain transformers behind the interface of an engine: its tokens, its bytes, its room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_scoring import questions

from qatbench.engine import pick, plain
from qatbench.engine.plain import PlainRunner
from qatbench.errors import UsageError
from qatbench.tasks import protocols
from qatbench.vlm.batch import Encoded, Encoder
from qatbench.vlm.generate import generate
from qatbench.vlm.load import Loaded


def prompts_of(loaded: Loaded, data: Path) -> list[Encoded]:
    encoder, qatbench = Encoder(loaded), protocols.get("qatbench")
    return [encoder.prompt(qatbench.prompt(q), q.image) for q in questions(loaded, data)]


def test_tokens_are_those_of_generate_however_they_are_asked_for(
    any_model: Loaded, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(any_model.model.generation_config, "eos_token_id", -1)  # none ends
    prompts, runner = prompts_of(any_model, data), PlainRunner(any_model)
    assert len(set(map(len, prompts))) > 1
    started = runner.start(prompts, 6)
    parts = [started.first[:, None], runner.step(started, 2), runner.step(started, 0)]
    tokens = torch.cat([*parts, runner.step(started, 3)], 1)
    assert tokens.shape == (len(prompts), 6)
    told = any_model.tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)
    assert told == generate(any_model, prompts, 6)
    with pytest.raises(UsageError, match="room for 0"):
        runner.step(started, 1)


def test_bytes_are_those_of_the_weights_and_of_the_whole_room(text_model: Loaded) -> None:
    runner = PlainRunner(text_model)
    weights = sum(p.numel() * 4 for p in text_model.model.parameters())
    others = sum(b.nbytes for b in text_model.model.buffers())
    assert runner.weight_bytes() == weights + others
    text = text_model.model.config
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    prompts = [Encoded([5, 6, 7], "", {}), Encoded([8], "", {})]
    started = runner.start(prompts, 4)
    assert runner.cache_bytes(started) == 2 * token * (3 + 4)
    runner.step(started, 3)
    assert runner.cache_bytes(started) == 2 * token * (3 + 4)


def test_tied_weights_count_once(every_model: dict[str, Loaded]) -> None:
    model = every_model["text"].model
    kept = model.lm_head.weight
    before = PlainRunner(every_model["text"]).weight_bytes()
    try:
        model.lm_head.weight = model.model.embed_tokens.weight
        assert PlainRunner(every_model["text"]).weight_bytes() == before - kept.nbytes
    finally:
        model.lm_head.weight = kept


def test_engines_are_picked_by_name(text_model: Loaded) -> None:
    runner = pick.load("transformers", text_model.folder, device="cpu", dtype=torch.float32)
    assert isinstance(runner, plain.PlainRunner)
    assert (runner.engine, runner.kernel, runner.attention) == ("transformers", "Linear", "sdpa")
    with pytest.raises(UsageError, match="no engine 'vllm'") as error:
        pick.check(["transformers", "vllm"])
    assert error.value.hint == "--engine transformers or qatbench"
