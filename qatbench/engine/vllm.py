"""vLLM as an engine, where it is installed: its scheduler's steps in this process, one by one.

Written against the interface of vLLM 0.33.0 (`LLM.llm_engine`: `add_request`, `step`). There a
step tells each running row one token once its prompt was read, and with a budget of tokens that
holds all prompts of a batch they are read in one step. A batch that is told otherwise is refused.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatbench.engine.plain import held_bytes
from qatbench.engine.runner import Room, Started
from qatbench.errors import PrerequisiteError, UsageError
from qatbench.tasks.images import open_rgb
from qatbench.vlm.batch import Encoded
from qatbench.vlm.counts import cached_bytes
from qatbench.vlm.hollow import load_hollow
from qatbench.vlm.layout import image_token
from qatbench.vlm.load import Loaded, ModelFolder

ENGINE = "vllm"
WRITTEN_FOR = "0.33"
NOTE = (
    "engine vllm: its cache is taken at loading, for the largest case, so that no case has a peak"
    " of its own; cache is the blocks that the rows of a case fill"
)
_ELSEWHERE = "pip install vllm, in an environment without gptqmodel: docs/speed.md says how"
_BLOCK = 256  # tokens: no block of its caches is larger, so room in these is room enough
# `step` of this process, not of another one; tables on stdout alone, nothing sent to its makers.
_FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}


def require(device: str) -> dict[str, str]:
    """Its version by its name, once it is known to run on the device.

    Raises: PrerequisiteError where it is not installed, cannot be imported or is for another
        device.
    """
    os.environ.update(_FORCED)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        vllm = importlib.import_module("vllm")
        _ = vllm.LLM, vllm.SamplingParams  # imported when they are asked for
        built_for = str(importlib.import_module("vllm.platforms").current_platform.device_type)
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise PrerequisiteError(_first("vLLM lacks a package", error)) from error
        raise PrerequisiteError("vLLM is not installed", hint=_ELSEWHERE) from error
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise PrerequisiteError(
            _first("vLLM cannot be imported", error), hint=_ELSEWHERE
        ) from error
    here = torch.device(device)
    if here.type != built_for:
        raise PrerequisiteError(
            f"this vLLM runs on {built_for or 'no device of this machine'}, not on {here.type}",
            hint="--engine transformers, or --device",
        )
    if here.index:
        raise PrerequisiteError(
            f"vLLM runs on the first visible GPU, not on {device}",
            hint=f"CUDA_VISIBLE_DEVICES={here.index}, without --device",
        )
    return {"vllm": str(vllm.__version__)}


@dataclass
class _Batch:
    names: list[str]  # of the requests, in the order of the rows
    told: dict[str, list[int]]  # tokens, by request
    given: int  # tokens told to whoever asked
    length: int  # of the longest prompt


class VllmRunner:
    """An `LLM` of vLLM, asked greedily, with no end of text, no detokenizing, no shared prefixes.

    Tokens that it tells lie on the host. Its pictures go through its own processor, before the
    clock, and anew for each batch: none is known from before.
    """

    engine = ENGINE
    at_once, shrinks_at = 1, 1.0
    reserves = True

    def __init__(self, loaded: Loaded, llm: Any, dtype: torch.dtype) -> None:
        """Take over an `LLM` that holds the weights of `loaded.folder`."""
        self.loaded, self.llm = loaded, llm
        settings = llm.llm_engine.vllm_config
        self.ahead = bool(settings.scheduler_config.async_scheduling)
        ((self.kernel, self.attention),) = llm.apply_model(_names)
        if method := settings.model_config.quantization:
            self.kernel = f"{method}/{self.kernel}"
        (self._weights,) = llm.apply_model(held_bytes)
        self._block = int(settings.cache_config.block_size)
        self._blocks = int(settings.cache_config.num_gpu_blocks) - 1  # the first one is its own
        self._token = cached_bytes(loaded.folder.config, dtype.itemsize)
        self._mark = image_token(loaded.folder.config) or 0  # 0: of a text model, which has none
        self._rendered: list[tuple[Encoded, Any]] = []
        self._batches = 0
        self._running: _Batch | None = None

    def prepare(self, prompts: Sequence[Encoded]) -> None:
        """Have its processor read the pictures, and see that its tokens are those of the prompts.

        Raises: PrerequisiteError where they are others.
        """
        self._end()
        inputs = self.llm.renderer.render_cmpl([self._prompt(prompt) for prompt in prompts])
        for prompt, made in zip(prompts, inputs, strict=True):
            ids = list(made["prompt_token_ids"])
            if ids != prompt.ids:
                others = "others" if len(ids) == len(prompt) else str(len(ids))
                raise PrerequisiteError(
                    f"{self.loaded.folder.name}: vLLM makes {others} of a prompt's {len(prompt)}"
                    " tokens",
                    hint="--image none, or --engine transformers",
                )
        self._rendered = list(zip(prompts, inputs, strict=True))

    def _prompt(self, prompt: Encoded) -> dict[str, Any]:
        """What it takes for a prompt: ids, a picture's many marks as one, and the picture."""
        if not prompt.pixels:
            return {"prompt_token_ids": list(prompt.ids)}
        if len(prompt.images) != 1:
            raise UsageError(f"one picture a prompt, not {len(prompt.images)}")
        first = prompt.ids.index(self._mark)
        after = first + prompt.ids.count(self._mark)
        ids = [*prompt.ids[: first + 1], *prompt.ids[after:]]
        picture = open_rgb(prompt.images[0])
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": picture}}

    def start(self, prompts: Sequence[Encoded], room: int) -> Started:
        """Read a batch of prompts, pictures included, and make room for `room` tokens a row.

        Raises: PrerequisiteError where the room taken at loading does not hold the batch; as
            `prepare` where that was not called with these prompts.
        """
        if [id(prompt) for prompt, _ in self._rendered] != [id(prompt) for prompt in prompts]:
            self.prepare(prompts)
        rendered, self._rendered = self._rendered, []
        length = max(map(len, prompts))
        need = sum(-(-(len(prompt) + room) // self._block) for prompt in prompts)
        if need > self._blocks:
            raise PrerequisiteError(
                f"vLLM's cache has {self._blocks} blocks of {self._block} tokens, and"
                f" {len(prompts)} rows of {length + room} need {need}",
                hint="a smaller --batch or --context",
            )
        settings = _sampling(room)
        self._batches += 1
        names = [f"{self._batches}-{row}" for row in range(len(prompts))]
        batch = self._running = _Batch(names, {name: [] for name in names}, 1, length)
        for name, (_, made) in zip(names, rendered, strict=True):
            self.llm.llm_engine.add_request(name, made, settings)
        self._advance(batch, 1)
        return Started(torch.tensor([batch.told[name][0] for name in names]), room, batch)

    def step(self, started: Started, count: int) -> Tensor:
        """The next `count` tokens of every row, ended or not: (B, count) int64 on the host.

        Raises: UsageError beyond the room; PrerequisiteError where the rows are not told alike.
        """
        batch: _Batch = started.state
        left = started.room - batch.given
        if count > left:
            raise UsageError(f"{count} more tokens asked for, and there is room for {left}")
        self._advance(batch, batch.given + count)
        told = [batch.told[name][batch.given : batch.given + count] for name in batch.names]
        batch.given += count
        return torch.tensor(told, dtype=torch.long).reshape(len(told), count)

    def _advance(self, batch: _Batch, wanted: int) -> None:
        """Step until every row has `wanted` tokens.

        Raises: PrerequisiteError when a step tells rows unlike numbers of tokens, or ends them.
        """
        engine = self.llm.llm_engine
        while len(batch.told[batch.names[0]]) < wanted:
            before = len(batch.told[batch.names[0]])
            if not engine.has_unfinished_requests():
                raise PrerequisiteError(f"vLLM ended a batch after {before} of {wanted} tokens")
            for output in engine.step():
                batch.told[output.request_id] += output.outputs[0].token_ids
            counts = {len(batch.told[name]) for name in batch.names}
            if len(counts) > 1 or counts.pop() > before + 1:
                raise PrerequisiteError(
                    f"vLLM does not tell {len(batch.names)} rows of {batch.length} tokens in step:"
                    " reading and telling cannot be timed apart",
                    hint="a smaller --batch or --context",
                )

    def _end(self) -> None:
        """Take back what is left of a batch that was not told to its end."""
        if self._running and self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.abort_request(self._running.names)
        self._running = None

    def grow(self, started: Started, more: int) -> None:
        """Not to be had.

        Raises: UsageError: a request's length is given when it is added.
        """
        raise UsageError("vLLM makes room for a batch once", hint="start it with more room")

    def keep(self, started: Started, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone, in this order."""
        batch: _Batch = started.state
        kept = [batch.names[row] for row in rows]
        self.llm.llm_engine.abort_request([name for name in batch.names if name not in kept])
        batch.names = kept

    def weight_bytes(self) -> int:
        """Bytes of all weights on the device, as vLLM holds them."""
        return int(self._weights)

    def head_bytes(self, rows: int) -> int | None:
        """None: all of it."""

    def cache_bytes(self, started: Started) -> int:
        """Bytes of the cache's blocks that a batch fills when its room is used."""
        batch: _Batch = started.state
        blocks = -(-(batch.length + started.room) // self._block)
        return len(batch.names) * blocks * self._block * self._token

    def close(self) -> None:
        """Give up the model: its engine holds on to it until it is shut down."""
        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None


def _sampling(room: int) -> Any:
    """Greedy, `room` tokens whatever they are, told one by one as ids."""
    vllm = importlib.import_module("vllm")
    kinds = importlib.import_module("vllm.sampling_params").RequestOutputKind
    return vllm.SamplingParams(
        temperature=0.0, max_tokens=room, ignore_eos=True, detokenize=False,
        output_kind=kinds.DELTA,
    )  # fmt: skip


def _names(model: nn.Module) -> tuple[str, str]:
    """What multiplies at decoding, and what attends, in vLLM's words."""
    found = {"mlp.down_proj": "unknown", "self_attn.attn": "unknown"}
    for name, module in model.named_modules():
        match = re.search(r"(?:^|\.)layers\.0\.(mlp\.down_proj|self_attn\.attn)$", name)
        if match and match[1] == "mlp.down_proj":
            method = module.quant_method
            found[match[1]] = type(getattr(method, "kernel", method)).__name__
        elif match:
            found[match[1]] = str(module.get_attn_backend().get_name())
    return found["mlp.down_proj"], found["self_attn.attn"]


def _first(what: str, error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{what}: {lines[0]}"


def load(folder: ModelFolder, *, device: str, dtype: torch.dtype, room: Room) -> VllmRunner:
    """Load a model into vLLM, with a cache for `room`, rounded up, whatever the device has left.

    Everything that is not said is its default: compiled, with CUDA graphs, scheduling ahead.

    Raises: PrerequisiteError as `require`, and where vLLM does not run the model;
        torch.OutOfMemoryError; what loading a tokenizer raises.
    """
    version = require(device)["vllm"]
    length = room.prompt + room.tokens
    blocks = room.rows * -(-length // _BLOCK) + 2  # its own one, and one to spare
    pictures = {
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "mm_processor_cache_gb": 0,  # and no prefixes: every picture is a new one
        "skip_mm_profiling": True,
    }
    loaded = load_hollow(folder)
    try:
        llm = importlib.import_module("vllm").LLM(
            model=str(folder.path),
            dtype=str(dtype).removeprefix("torch."),
            load_format="safetensors",
            max_model_len=length,
            max_num_seqs=room.rows,
            max_num_batched_tokens=max(room.rows * room.prompt, length),
            kv_cache_memory_bytes=blocks * _BLOCK * cached_bytes(folder.config, dtype.itemsize),
            gpu_memory_utilization=0.01,  # not used beside the bytes, but checked to be free
            enable_prefix_caching=False,
            **(pictures if folder.arch.is_vlm else {}),
        )
        return VllmRunner(loaded, llm, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # its checks raise a dozen unrelated types
        said = _first(f"vLLM {version} does not run {folder.name}", error)
        hint = f"--engine transformers; this engine was written for vLLM {WRITTEN_FOR}"
        raise PrerequisiteError(said, hint=hint) from error
