"""This project's engine: `Runner` over a static cache, with fused kernels on CUDA in bf16."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qatbench.engine import cuda, forms
from qatbench.engine.decoder import Cache, Decoder, torch_step
from qatbench.engine.fused import Fused, check
from qatbench.engine.plain import held_bytes
from qatbench.engine.products import shared_by
from qatbench.engine.runner import Direct, Started
from qatbench.engine.step import Chosen, Step
from qatbench.errors import UsageError
from qatbench.quant.packing import Affine
from qatbench.vlm import load as models
from qatbench.vlm.batch import Encoded, arithmetic
from qatbench.vlm.generate import begin, tell
from qatbench.vlm.hollow import hollow_model, load_around
from qatbench.vlm.kernel import pick_kernel
from qatbench.vlm.load import Loaded, ModelFolder
from qatbench.vlm.packed import affine_state

Told = Callable[[str, int, int], None]


@dataclass
class _State:
    cache: Cache
    token: Tensor
    left: int  # tokens that can still be told
    room: int = 0  # of the step: tokens that it can tell
    step: Step | None = None
    rope: tuple[Tensor, Tensor] | None = None


class FastRunner(Direct):
    """See `runner.Runner`. Fused kernels on CUDA in bf16, else the model's own linears."""

    engine = "qatbench"

    def __init__(
        self, loaded: Loaded, packed: dict[str, Affine] | None = None,
        progress: Told | None = None, *, kernels: bool = True,
    ) -> None:  # fmt: skip
        """Take over a model; linears in `packed` are INT4. Without `kernels`: the torch step."""
        self.loaded = loaded
        self.decoder = Decoder(loaded)
        self.progress = progress
        self.fused: Fused | None = None
        self.chosen: dict[str, Chosen] = {}  # by rows that share forms
        self.last: Tensor | None = None  # logits of the last step in torch
        bf16 = arithmetic(loaded.model) == torch.bfloat16
        if kernels and loaded.device.type == "cuda" and bf16:
            self.fused = Fused(self.decoder, packed or {})
        elif packed:
            raise UsageError("packed weights are for CUDA in bfloat16", hint="--dtype bfloat16")
        # A graph is captured for its rows: fewer rows are worth another when half have ended.
        self.at_once, self.shrinks_at = (8, 0.5) if self.fused else (1, 1.0)
        self.kernel = models.kernel_name(loaded)
        self.attention = "sdpa, filled part"
        if self.fused:
            names = self.fused.names()
            self.kernel, self.attention = names["linear"], names["attention"]

    @torch.inference_mode()
    def start(self, prompts: Sequence[Encoded], room: int) -> Started:
        """Read a batch of prompts, pictures included, and make room for `room` tokens a row."""
        length, rows = max(map(len, prompts)), len(prompts)
        batch = begin(self.loaded, prompts, room)
        first = tell(self.loaded, batch)
        places = batch.positions[..., length].reshape(-1, rows)[0]  # text: alike on all axes
        cache = self.decoder.cache(rows, length + room, batch.cache.layers[0].keys.dtype)
        for i, layer in enumerate(batch.cache.layers):
            cache.keys[i, :, :, :length], cache.values[i, :, :, :length] = layer.keys, layer.values
            layer.keys = layer.values = None
        cache.filled += length
        cache.start.copy_(torch.tensor([length - len(prompt) for prompt in prompts]))
        cache.turned.copy_(places)
        state = _State(cache, first.clone(), room - 1)
        self._prepare(state)
        return Started(first, room, state)

    def _prepare(self, state: _State) -> None:
        """What a step takes beside cache and token: made anew for other rows and other room."""
        state.room = state.left
        if not self.fused:
            state.rope = self.decoder.rope(state.cache.length + 1)
            return
        rows = len(state.token)
        alike = shared_by(rows)
        chosen = self.chosen.get(alike)
        state.step = Step(self.fused, state.cache, state.token, state.room, chosen)
        if not chosen:
            self.chosen[alike] = forms.choose(state.step, functools.partial(self._measuring, rows))

    def _measuring(self, rows: int, done: int, total: int) -> None:
        if self.progress:
            doing = "Measuring" if total else "Compiling"
            self.progress(f"{doing} kernels for {rows} rows", done, total)

    @torch.inference_mode()
    def step(self, started: Started, count: int) -> Tensor:
        """The next tokens, (rows, count). Raises: UsageError beyond the room."""
        state: _State = started.state
        if count > state.left:
            raise UsageError(f"{count} tokens asked for, there is room for {state.left}")
        told = state.room - state.left
        state.left -= count
        if state.step:
            state.step.replay(count)
            return state.step.told[:, told : told + count].clone()
        assert state.rope is not None
        found = []
        for _ in range(count):
            logits = torch_step(self.decoder, state.cache, state.rope, state.token)
            self.last = logits
            state.token = logits.float().argmax(-1)
            found.append(state.token)
        return torch.stack(found, 1) if found else started.first.new_empty(len(state.token), 0)

    @torch.inference_mode()
    def keep(self, started: Started, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone."""
        state: _State = started.state
        chosen = torch.tensor(rows, device=self.loaded.device)
        state.cache.keep(chosen)
        state.token = state.token[chosen]
        self._prepare(state)

    @torch.inference_mode()
    def grow(self, started: Started, more: int) -> None:
        """Make room for more tokens a row: the cache is copied."""
        state: _State = started.state
        state.cache.grow(more)
        state.left += more
        started.room += more
        self._prepare(state)

    def weight_bytes(self) -> int:
        """Bytes of all weights on the device; the room for dense products is not one."""
        return held_bytes(self.loaded.model) + (self.fused.packed_bytes() if self.fused else 0)

    def head_bytes(self, rows: int) -> int | None:
        """Bytes of the screen, where a step of so many rows was faster with it."""
        chosen = self.chosen.get(shared_by(rows))
        if not self.fused or not chosen or not chosen.screened:
            return None
        return self.fused.screen.product.bytes()

    def cache_bytes(self, started: Started) -> int:
        """Bytes of keys and values, room included."""
        state: _State = started.state
        return state.cache.bytes()


def load(
    folder: ModelFolder, *, device: str, dtype: torch.dtype, progress: Told | None = None
) -> FastRunner:
    """Load a model into the engine: on CUDA a 16-bit one or packed ones of 4 bits, else any.

    On CUDA packed weights stay packed and bf16 is what runs. Elsewhere the model's own linears run,
    those of a packed checkpoint as `pick_kernel` says; `kernel` names their class.

    Raises: as `vlm.load.load`; UsageError for what the engine does not run, and on CUDA
        PrerequisiteError where kernels cannot be compiled, both before any weight is loaded there.
    """
    if device.startswith("cuda"):
        _check(folder, device, dtype)
        if folder.quantization:
            rest, packed = affine_state(folder.path, folder.quantization, folder.arch, device)
            return FastRunner(load_around(folder, rest, packed, device, dtype), packed, progress)
    kernel = pick_kernel(folder, device, dtype)
    loaded = models.load(folder, device=device, dtype=dtype, kernel=kernel)
    return FastRunner(loaded, None, progress)


def _check(folder: ModelFolder, device: str, dtype: torch.dtype) -> None:
    """Refuse what the kernels do not run, before any weight is loaded."""
    bits = (folder.quantization or {}).get("bits", 4)
    if bits != 4:
        raise UsageError(f"{folder.path}: the engine runs 16 and 4 bits on CUDA, not {bits}",
                         hint="--engine transformers")  # fmt: skip
    if dtype != torch.bfloat16:
        raise UsageError(f"the engine runs bfloat16 on CUDA, not {dtype}",
                         hint="--dtype bfloat16, or --engine transformers")  # fmt: skip
    cuda.check(device)
    hollow = Loaded(folder, hollow_model(folder), None, None, "none")
    check(Decoder(hollow), (folder.quantization or {}).get("group_size"))
