"""This project's engine: `Runner` over a static cache, with fused kernels on CUDA in bf16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from qatbench.engine.decoder import Cache, Decoder, torch_step
from qatbench.engine.fused import Fused, Step
from qatbench.engine.runner import Started
from qatbench.errors import UsageError
from qatbench.quant.packing import Affine
from qatbench.vlm.batch import Encoded, arithmetic, pixel_batch
from qatbench.vlm.load import Loaded

Told = Callable[[str, int, int], None]


@dataclass
class _State:
    cache: Cache
    token: Tensor
    left: int  # tokens that can still be told
    step: Step | None
    rope: tuple[Tensor, Tensor] | None


class FastRunner:
    """See `runner.Runner`. Fused kernels on CUDA in bf16, else the model's own linears."""

    engine = "qatbench"

    def __init__(
        self, loaded: Loaded, packed: dict[str, Affine] | None = None, progress: Told | None = None
    ) -> None:
        self.loaded = loaded
        self.decoder = Decoder(loaded)
        self.progress = progress
        self.fused: Fused | None = None
        if loaded.device.type == "cuda" and arithmetic(loaded.model) == torch.bfloat16:
            self.fused = Fused(self.decoder, packed or {})
        elif packed:
            raise UsageError("packed weights are for CUDA in bfloat16", hint="--dtype bfloat16")
        self.kernel = type(self.decoder.layers[0].mlp.down_proj).__name__
        self.attention = "sdpa, filled part"
        if self.fused:
            names = self.fused.names()
            self.kernel, self.attention = names["linear"], names["attention"]

    @torch.inference_mode()
    def start(self, prompts: Sequence[Encoded], room: int) -> Started:
        """Read a batch of prompts. Raises: UsageError where they and the room are too long."""
        loaded, device = self.loaded, self.loaded.device
        length, rows = max(map(len, prompts)), len(prompts)
        config = loaded.model.config.get_text_config()
        if length + room > config.max_position_embeddings:
            raise UsageError(
                f"{length} tokens and {room} more are beyond the model's "
                f"{config.max_position_embeddings} positions", hint="fewer, or shorter prompts",
            )  # fmt: skip
        ids = torch.full((rows, length), loaded.tokenizer.pad_token_id or 0)
        mask = torch.zeros(rows, length, dtype=torch.long)
        for b, prompt in enumerate(prompts):
            ids[b, length - len(prompt) :] = torch.tensor(prompt.ids)
            mask[b, length - len(prompt) :] = 1
        places = [prompt.positions(1) for prompt in prompts]
        padded = [F.pad(p, (length + 1 - p.shape[-1], 0)) for p in places]
        positions = torch.stack(padded, dim=-2).to(device)
        filling = transformers.DynamicCache(config=config)
        logits = loaded.model(
            input_ids=ids.to(device), attention_mask=mask.to(device),
            position_ids=positions[..., :length], past_key_values=filling, use_cache=True,
            logits_to_keep=1, **pixel_batch(prompts, device, arithmetic(loaded.model)),
        ).logits  # fmt: skip
        cache = self.decoder.cache(rows, length + room, filling.layers[0].keys.dtype)
        for i, layer in enumerate(filling.layers):
            cache.keys[i, :, :, :length] = layer.keys
            cache.values[i, :, :, :length] = layer.values
            layer.keys = layer.values = None
        cache.filled += length
        cache.start.copy_(torch.tensor([length - len(prompt) for prompt in prompts]))
        cache.turned.copy_(positions[..., length].reshape(-1, rows)[0])
        token = logits[:, -1].float().argmax(-1)
        first = token.clone()
        step = rope = None
        if self.fused:
            self._choose(rows)
            step = Step(self.fused, cache, token, room)
        else:
            rope = self.decoder.rope(length + room + 1)
        return Started(first, room, _State(cache, token, room - 1, step, rope))

    def _choose(self, rows: int) -> None:
        assert self.fused
        told = self.progress

        def tell(done: int, total: int) -> None:
            if told:
                told(f"Measuring kernels for {rows} rows", done, total)

        self.fused.choose_forms(rows, tell)

    @torch.inference_mode()
    def step(self, started: Started, count: int) -> Tensor:
        """The next tokens, (rows, count). Raises: UsageError beyond the room."""
        state: _State = started.state
        if count > state.left:
            raise UsageError(f"{count} tokens asked for, there is room for {state.left}")
        told = started.room - 1 - state.left
        state.left -= count
        if state.step:
            state.step.replay(count)
            return state.step.told[:, told : told + count].clone()
        assert state.rope is not None
        found = []
        for _ in range(count):
            logits = torch_step(self.decoder, state.cache, state.rope, state.token)
            state.token = logits.float().argmax(-1)
            found.append(state.token)
        return torch.stack(found, 1)

    def weight_bytes(self) -> int:
        """Bytes of all weights on the device."""
        held = {p.data_ptr(): p.numel() * p.element_size() for p in self.loaded.model.parameters()}
        buffers: dict[int, Any] = {b.data_ptr(): b.numel() * b.element_size()
                                   for b in self.loaded.model.buffers()}  # fmt: skip
        return sum((held | buffers).values()) + (self.fused.weight_bytes() if self.fused else 0)

    def cache_bytes(self, started: Started) -> int:
        """Bytes of keys and values, room included."""
        state: _State = started.state
        return state.cache.bytes()
