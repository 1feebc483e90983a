"""The part of vLLM 0.33.0 that `qatbench.engine.vllm` asks for, with plain transformers inside.

Names, keyword arguments and the order of events are vLLM's, nothing else is there: a step reads
prompts within the budget of tokens, tells each row that was read one token and, scheduling ahead,
gives the tokens of the step before while the device is at the next one.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from qatbench.engine.plain import PlainRunner
from qatbench.vlm.batch import Encoder
from qatbench.vlm.load import find, load

VERSION = "0.33.0"


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE


@dataclass
class Device:
    """What the fake's steps take, and when what it was given is done."""

    clock: Any = None  # has `seconds`
    free: float = 0.0
    prompt_token: float = 0.0  # seconds
    step: float = 0.0

    def give(self, seconds: float) -> float:
        """When this is done, behind what was given before."""
        now = self.clock.seconds if self.clock else 0.0
        self.free = max(self.free, now) + seconds
        return self.free

    def wait(self, until: float) -> None:
        if self.clock:
            self.clock.seconds = max(self.clock.seconds, until)


@dataclass
class Request:
    name: str
    tokens: list[int]  # that it will be told
    prompt: int
    unread: int
    scheduled: int = 0  # tokens, those on the way included
    told: int = 0


@dataclass
class Engine:
    vllm_config: Any
    budget: int
    rows: int
    tell: Callable[[Any, int], list[int]]
    device: Device
    requests: dict[str, Request] = field(default_factory=dict)
    on_the_way: deque[tuple[float, list[tuple[str, int]]]] = field(default_factory=deque)
    params: list[SamplingParams] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    closed: int = 0

    @property
    def engine_core(self) -> Any:
        return SimpleNamespace(shutdown=self._shutdown)

    def _shutdown(self, timeout: float | None = None) -> None:
        self.closed += 1

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams) -> str:
        assert prompt["type"] in ("token", "multimodal"), "a raw prompt: it has to be rendered"
        assert params.max_tokens is not None
        self.params.append(params)
        told = self.tell(prompt, params.max_tokens)
        length = len(prompt["prompt_token_ids"])
        self.requests[request_id] = Request(request_id, told, length, length)
        return f"{request_id}-0a1b2c3d"

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        for name in request_ids:
            if self.requests.pop(name, None):
                self.aborted.append(name)

    def step(self) -> list[Any]:
        deep = 2 if self.vllm_config.scheduler_config.async_scheduling else 1
        self.on_the_way.append(self._schedule())
        if len(self.on_the_way) < deep:
            return []
        until, told = self.on_the_way.popleft()
        self.device.wait(until)
        outputs = []
        for name, token in told:
            request = self.requests.get(name)
            if request is None:
                continue  # aborted
            request.told += 1
            outputs.append(
                SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=[token])])
            )
            if request.told == len(request.tokens):
                del self.requests[name]
        return outputs

    def _schedule(self) -> tuple[float, list[tuple[str, int]]]:
        budget, told, seconds = self.budget, [], 0.0
        for request in list(self.requests.values())[: self.rows]:
            if request.scheduled == len(request.tokens) or not budget:
                continue
            taken = min(budget, request.unread or 1)
            budget -= taken
            if request.unread:
                request.unread -= taken
                seconds += taken * self.device.prompt_token
            else:
                seconds = max(seconds, self.device.step)
            if not request.unread:
                told.append((request.name, request.tokens[request.scheduled]))
                request.scheduled += 1
        return self.device.give(seconds), told


class _Linear(nn.Module):
    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10, 5), requires_grad=False)
        self.quant_method: Any = UnquantizedLinearMethod()
        if packed:
            self.quant_method = AutoGPTQLinearMethod()


class UnquantizedLinearMethod:
    pass


class MarlinLinearKernel:
    pass


class AutoGPTQLinearMethod:
    def __init__(self) -> None:
        self.kernel = MarlinLinearKernel()


class _Attention(nn.Module):
    def get_attn_backend(self) -> Any:
        return SimpleNamespace(get_name=lambda: "FLASH_ATTN")


def _model(packed: bool) -> nn.Module:
    """Modules where vLLM has them, a vision tower's among them."""
    layer, tower = nn.Module(), nn.Module()
    layer.mlp, layer.self_attn = nn.Module(), nn.Module()
    layer.mlp.down_proj, layer.self_attn.attn = _Linear(packed), _Attention()
    tower.mlp = nn.Module()
    tower.mlp.down_proj = _Linear(False)
    model = nn.Module()
    model.language_model, model.visual = nn.Module(), nn.Module()
    model.visual.blocks = nn.ModuleList([tower])
    model.language_model.layers = nn.ModuleList([layer])
    return model


class LLM:
    made: ClassVar[list[LLM]] = []
    device: ClassVar[Device] = Device()
    ahead: ClassVar[bool] = True
    budget: ClassVar[int | None] = None  # of tokens, instead of what was asked for
    spoils: ClassVar[int] = 0  # tokens that its processor makes of a picture beyond those it has
    fails: ClassVar[Exception | None] = None

    def __init__(
        self, model: str, *, dtype: str, load_format: str, max_model_len: int, max_num_seqs: int,
        max_num_batched_tokens: int, kv_cache_memory_bytes: int, gpu_memory_utilization: float,
        enable_prefix_caching: bool, limit_mm_per_prompt: dict[str, int] | None = None,
        mm_processor_cache_gb: float = 4, skip_mm_profiling: bool = False,
    ) -> None:  # fmt: skip
        if self.fails:
            raise self.fails
        self.asked = dict(locals())
        folder = find(model)
        self.loaded = load(folder, device="cpu", dtype=getattr(torch, dtype))
        self.encoder, self.rendered = Encoder(self.loaded), 0
        text = self.loaded.model.config.get_text_config()
        size = torch.empty((), dtype=getattr(torch, dtype)).element_size()
        head = text.hidden_size // text.num_attention_heads
        head = getattr(text, "head_dim", None) or head
        token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * size
        packed = folder.quantization is not None
        self.model = _model(packed)
        settings = SimpleNamespace(
            scheduler_config=SimpleNamespace(async_scheduling=self.ahead),
            model_config=SimpleNamespace(quantization="auto_gptq" if packed else None),
            cache_config=SimpleNamespace(
                block_size=16, num_gpu_blocks=kv_cache_memory_bytes // (16 * token)
            ),
        )
        budget = self.budget or max_num_batched_tokens
        self.llm_engine = Engine(settings, budget, max_num_seqs, self._tell, self.device)
        self.renderer = SimpleNamespace(render_cmpl=self._render)
        self.made.append(self)

    def apply_model(self, func: Callable[[nn.Module], Any]) -> list[Any]:
        return [func(self.model)]

    def _render(self, prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self._one(prompt) for prompt in prompts]

    def _one(self, prompt: dict[str, Any]) -> dict[str, Any]:
        assert prompt.keys() <= {"prompt_token_ids", "multi_modal_data"}
        ids, shown = prompt["prompt_token_ids"], prompt.get("multi_modal_data")
        if not shown:
            return {"type": "token", "prompt_token_ids": ids}
        self.rendered += 1
        mark, processor = self.encoder.image_token, self.encoder.processor
        assert ids.count(mark) == 1, "a mark of each picture, which is replaced by many"
        text = processor.image_token
        made = processor(text=[text], images=[shown["image"]], return_tensors="pt")
        many = int((made.pop("input_ids") == mark).sum()) + self.spoils
        made.pop("attention_mask")
        made.pop("mm_token_type_ids", None)
        at = ids.index(mark)
        return {
            "type": "multimodal",
            "prompt_token_ids": [*ids[:at], *[mark] * many, *ids[at + 1 :]],
            "mm_kwargs": dict(made),
        }

    def _tell(self, prompt: Any, room: int) -> list[int]:
        ids, pixels = prompt["prompt_token_ids"], prompt.get("mm_kwargs", {})
        runner = PlainRunner(self.loaded)
        started = runner.start([self.encoder._placed(ids, "", pixels)], room)
        return [*started.first.tolist(), *runner.step(started, room - 1)[0].tolist()]


def install(monkeypatch: pytest.MonkeyPatch, device_type: str = "cpu") -> type[LLM]:
    """Put it where `import vllm` finds it, until the test ends."""
    for name in ("ENABLE_V1_MULTIPROCESSING", "NO_USAGE_STATS", "LOGGING_LEVEL", "LOGGING_STREAM"):
        monkeypatch.setenv(f"VLLM_{name}", "1")  # put back after the test
    fresh = {"made": [], "device": Device(), "ahead": True, "budget": None, "spoils": 0}
    llm = type("LLM", (LLM,), fresh | {"fails": None})
    modules = {
        "vllm": {"LLM": llm, "SamplingParams": SamplingParams, "__version__": VERSION},
        "vllm.sampling_params": {"RequestOutputKind": RequestOutputKind},
        "vllm.platforms": {"current_platform": SimpleNamespace(device_type=device_type)},
    }
    for name, held in modules.items():
        module = ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    return llm
