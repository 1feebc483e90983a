"""One decoder layer in the hands of auto-round: its rounding optimisation, and nothing else of it.

A session of the library is made for every layer, as its integration into llm-compressor does. Set
otherwise than by default is `scale_dtype`, fp32 while tuning: a scale's gradient is a small
difference of large terms, which is lost in fp16.

Source: auto-round 0.16.1, `algorithms/composer.py:compress_block` and
`algorithms/quantization/sign_round/quantizer.py`; the tests compare with both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qatbench.errors import NumericsError, PrerequisiteError, UsageError
from qatbench.quant.backends import quiet
from qatbench.quant.grid import SMALLEST_SCALE, Grid
from qatbench.quant.kernels import working
from qatbench.quant.layer_inputs import LayerInputs

VERSION = "0.16"
HINT = "pip install --no-deps auto-round==0.16.1 py-cpuinfo==9.0.0"


class _Holder(nn.Module):
    """A decoder layer as the library expects to find one: in a model's list of layers."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([layer])
        self.dtype, self.device, self.name_or_path = dtype, torch.device(device), ""
        self.config = SimpleNamespace(model_type="", architectures=[])  # no family's special cases


class Tuner:
    """The library with one run's settings: a session of its own for every layer."""

    def __init__(
        self, grid: Grid, iterations: int, step: int, samples: int, device: str, dtype: torch.dtype
    ) -> None:
        library = load()
        self.device, self.dtype = device, dtype
        self._make: Callable[[nn.Module], Any] = lambda holder: library.AutoRound(
            holder,
            tokenizer="",  # none is needed, and only None is refused
            scheme=library.QuantizationScheme(
                bits=grid.bits, group_size=grid.group_size, sym=True, data_type="int", act_bits=16
            ),
            alg_configs=library.SignRoundConfig(iters=iterations, gradient_accumulate_steps=step),
            scale_dtype="fp32",
            dataset=[],
            nsamples=samples,
            batch_size=1,  # unlike lengths cannot be put together: their gradients are added up
            device_map=device,
            enable_torch_compile=_compiles(device),
            amp=dtype != torch.float32,
        )
        self._context = importlib.import_module("auto_round.algorithms.composer").BlockContext
        self._shared = [
            getattr(importlib.import_module(f"auto_round.context.{name}"), owner)
            for name, owner in (("model", "ModelContext"), ("compress", "CompressContext"))
        ]

    def tune(
        self,
        layer: nn.Module,
        index: int,
        exact: Sequence[Tensor],
        rounded: Sequence[Tensor],
        inputs: LayerInputs,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Tune a layer in place, towards its own output on the 16-bit model's inputs (`exact`).

        Returns: its output as it was on `exact`, and tuned on the quantized model's (`rounded`).
        Raises: UsageError for another dtype; NumericsError if no step has a finite loss.
        """
        holder = _Holder(layer, self.dtype, self.device)
        session = self._make(holder)
        if session.model_context.amp_dtype != self.dtype:
            raise UsageError(
                f"auto-round does not tune in {self.dtype} on {self.device}",
                hint="--dtype float32, or bfloat16 where the device has it",
            )
        session.post_init()
        _prepare(session.alg_composer, index)
        name = f"layer {index}"
        with torch.enable_grad():
            tuned, before = session.alg_composer.compress_block(
                layer,
                list(exact),  # the library empties the lists it is given
                inputs.keywords(index),
                self._context(holder, [name], name, index, block_cnt=len(inputs.others)),
                q_inputs=list(rounded) if index else None,
                input_ids=inputs.tokens,
            )
        return before, tuned

    def close(self) -> None:
        """Let go of the last layer, which the library keeps in places of the whole process."""
        for owner in self._shared:
            owner.reset_context()


def _prepare(composer: Any, index: int) -> None:
    """Have the library round once a step, and notice a layer that was rounded without tuning."""
    runner, quantizer = composer.block_forward, composer.block_quantizer
    runner.batch_size = 1
    # What is compiled is the rounding alone: the layer's own forward would be, for every length.
    runner.block_forward = importlib.import_module("auto_round.compressors.utils").block_forward
    wrapper = importlib.import_module("auto_round.wrapper")
    linears = _once_a_step(wrapper.WrapperLinear)
    tune, step = quantizer.quantize_block, quantizer._step

    def with_a_loss(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def with_gradients(*args: Any) -> None:
            for module in block.modules():
                if isinstance(module, linears):
                    module.hand_back()
            step(*args)

        quantizer._step = with_gradients
        best = tune(block, *args, **kwargs)
        if not best:
            raise NumericsError(
                f"autoround: no step of decoder layer {index} had a finite loss",
                hint="look for a damaged weight file, or calibrate with --dtype float32",
            )
        return best

    quantizer.wrapper_block = partial(wrapper.wrapper_block, wrapper_cls=linears)
    quantizer.quantize_block = with_a_loss


def _once_a_step(library: type) -> Any:
    """The library's tuned linear, which rounds its weight once for all samples of a step.

    The library would do it anew for each. Gradients are summed on the rounded weight, in fp32, and
    go through the rounding once: it is the same for all samples, so the sums are the same.
    """

    class Linear(library):  # type: ignore[misc]
        held: tuple[Tensor, Tensor] | None = None  # on the grid, and the leaf that stands for it

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.q_scale_thresh = SMALLEST_SCALE  # below it the packed scale would be another one

        def _qdq_weight(self, *tuned: Tensor) -> tuple[Tensor, Any, Any]:
            if not torch.is_grad_enabled():
                found: tuple[Tensor, Any, Any] = super()._qdq_weight(*tuned)
                return found
            if self.held is None:
                on_grid: Tensor = super()._qdq_weight(*tuned)[0]
                self.held = on_grid, on_grid.detach().float().requires_grad_()
            on_grid, leaf = self.held
            return leaf.to(on_grid.dtype), None, None

        def hand_back(self) -> None:
            if self.held is not None:
                on_grid, leaf = self.held
                torch.autograd.backward(on_grid, leaf.grad)
                self.held = None

    return Linear


def check(dtype: torch.dtype) -> None:
    """Find what would stop the tuning before anything is begun.

    Raises: PrerequisiteError when the library is missing; UsageError for a dtype it refuses.
    """
    load()
    if dtype == torch.float16:
        raise UsageError("auto-round does not tune in float16", hint="--dtype bfloat16 or float32")


def load() -> Any:
    """Import the library; it prints nothing meanwhile.

    Raises: PrerequisiteError when it is missing or of another version.
    """
    try:
        with quiet():
            library = importlib.import_module("auto_round")
    except ImportError as error:
        raise PrerequisiteError(f"auto-round cannot be imported: {error}", hint=HINT) from error
    if not library.__version__.startswith(f"{VERSION}."):
        raise PrerequisiteError(
            f"auto-round {library.__version__} is here, {VERSION} is needed", hint=HINT
        )
    return library


def _compiles(device: str) -> bool:
    """Whether rounding is compiled: on CUDA, unless torch's own switch turns compiling off.

    Raises: PrerequisiteError when there is no compiler.
    """
    if not device.startswith("cuda") or torch._dynamo.config.disable:
        return False
    try:
        working(torch.device(device))
    except PrerequisiteError as error:
        raise PrerequisiteError(
            error.message, hint="TORCH_COMPILE_DISABLE=1; or install Triton and a C compiler"
        ) from error
    return True
