"""GPTQ and AWQ through gptqmodel.

The library calibrates and solves; this module gives it the calibration batches exactly as the
model will be asked, and takes codes, zero points and scales at the moment when the library would
pack them. Packing is left to this project's exporter, so every method's checkpoint is alike.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatbench.errors import NumericsError, PrerequisiteError, QatbenchError
from qatbench.quant import awq
from qatbench.quant.early import Solved, codes
from qatbench.quant.grid import Grid
from qatbench.quant.result import Quantized, QuantizedLinear, layout_of

PROCESSORS = ("gptqmodel.looper.gptq_processor", "gptqmodel.looper.awq_processor")
CALIBRATION_DTYPE = torch.float32


def solve(
    method: str,
    path: Path,
    names: Sequence[str],
    grid: Grid,
    batches: Sequence[dict[str, Tensor]],
    *,
    device: str,
    layout: str | None = None,
    dtype: torch.dtype = CALIBRATION_DTYPE,
    progress: Callable[[int, int], None],
) -> Quantized:
    """Run the library's GPTQ (symmetric) or AWQ (asymmetric if the layout allows) on a folder.

    Args:
        method: `gptq` or `awq`.
        path: 16-bit model folder.
        names: every linear to quantize, by its name in memory.
        grid: bits and group size.
        batches: model inputs of one or more calibration samples each, padding masked.
        device: torch device name.
        layout: of the checkpoint: gptq (symmetric), gptq_v2 or awq; default the method's own.
        dtype: of weights and activations while calibrating.
        progress: called as (linears done, linears in all).

    Raises: PrerequisiteError when the library is missing or of another build; NumericsError when
        it left a linear out.
    """
    if not batches:
        raise PrerequisiteError("no calibration samples", hint="--calib TASK:SPLIT")
    layout = layout or layout_of("auto", method, grid.bits)
    found: dict[str, QuantizedLinear] = {}
    path = path.resolve()  # before the current folder changes
    solved = Solved(grid)

    def take(name: str, q_scales: Tensor, q_zeros: Tensor, layers: Any, **_: Any) -> str:
        if method == "gptq":
            found[name] = solved.pop(name)
        else:
            weight = layers[name].weight.detach().to(device)  # the library packs on the CPU
            found[name] = codes(weight, q_scales, q_zeros, grid, name).to("cpu")
        progress(len(found), len(names))
        return "handed over"

    with _elsewhere(), quiet(), _hand_over(take, solved), _failing_softly():
        model = _load(method, path, grid, device, dtype, symmetric=layout == "gptq")
        _tidy_table(model)
        if method == "gptq":
            solved.attach(model, device)
        model.prepare_dataset = lambda *args, **kwargs: [dict(batch) for batch in batches]
        model.awq_input_feature_aggregation = awq.token_policy
        # The kernel named here is only validated, never made: the plain one takes all widths.
        backend = getattr(_library().BACKEND, f"{method.upper()}_TORCH")
        model.quantize([{"input_ids": [0]}] * len(batches), batch_size=1, backend=backend)
        others = _norms(model.model, names) if method == "awq" else {}
    missing = sorted(set(names) - set(found))
    if missing or set(found) - set(names):
        raise NumericsError(f"{method} left out {len(missing)} linears, e.g. {missing[:2]}")
    linears = {name: found[name] for name in names}
    return Quantized(method, layout, linears, others)


def _norms(model: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Norms inside the quantized layers, which AWQ changed."""
    layers = names[0].partition(".0.")[0] + "."
    return {
        key: value.detach().cpu()
        for key, value in model.state_dict().items()
        if "norm" in key and key.startswith(layers)
    }


def _load(
    method: str, path: Path, grid: Grid, device: str, dtype: torch.dtype, *, symmetric: bool
) -> Any:
    library = _library()
    kinds = importlib.import_module("gptqmodel.quantization")
    common = {
        "bits": grid.bits,
        "group_size": grid.group_size,
        "desc_act": False,
        "offload_to_disk": False,
    }
    if method == "gptq":
        settings = library.QuantizeConfig(sym=True, **common)
    else:
        settings = library.QuantizeConfig(
            method=kinds.METHOD.AWQ, format=kinds.FORMAT.GEMM, sym=symmetric, **common
        )
    return library.GPTQModel.load(
        str(path), settings, dtype=dtype, device=device, trust_remote_code=False
    )


def _library() -> Any:
    prepare_import()
    try:
        return importlib.import_module("gptqmodel")
    except ImportError as error:
        raise PrerequisiteError(
            f"gptqmodel cannot be imported: {error}", hint="make setup"
        ) from error


def prepare_import() -> None:
    """Size the library's worker pool, which fails on few cores unless told; before its import."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))


def forget_failed_imports() -> None:
    """Let go of what the library's failed imports of optional parts hold on to.

    It keeps the exceptions, and their tracebacks keep every frame that led to its import: the
    caller's model and optimizer would never be freed.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("gptqmodel"):
            for value in list(vars(module).values()):
                if isinstance(value, BaseException):
                    value.__traceback__ = value.__context__ = None


@contextlib.contextmanager
def enough_memory(doing: str) -> Iterator[None]:
    """Raise PrerequisiteError where memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PrerequisiteError(
            f"out of memory while {doing}", hint="lower --samples, or use a larger device"
        ) from error


@contextlib.contextmanager
def _failing_softly() -> Iterator[None]:
    """Turn what fails on a worker thread of the library into an error of ours.

    The library would end the whole process with exit code 1 there and then. Its future carries
    the exception to the main thread as well; without that end it arrives there.

    Raises: PrerequisiteError when memory ran out; NumericsError for anything else.
    """
    worker = importlib.import_module("gptqmodel.utils.threadx")._DeviceWorker
    original = worker._abort_process
    failures: list[BaseException] = []
    worker._abort_process = lambda self, error: failures.append(error)
    try:
        with enough_memory("calibrating"):
            yield
    except QatbenchError:  # ours already, from wherever the library called us
        raise
    except Exception as error:
        if not failures:
            raise
        raise NumericsError(f"gptqmodel failed: {type(error).__name__}: {error}") from error
    finally:
        worker._abort_process = original


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """Work in a folder that goes away: the library writes logs into the current one."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield


@contextlib.contextmanager
def _hand_over(take: Callable[..., str], solved: Solved) -> Iterator[None]:
    """Replace the library's packing step by `take`, and AWQ's clip search, for one run.

    Its packed modules are not made either: they exist for fp16 and bf16 only, while calibration
    here is in fp32 by default. What GPTQ solves goes to `solved`. No bars are drawn, which takes a
    third of a millisecond for each sample and pass even where nobody sees them.

    Raises: PrerequisiteError when this gptqmodel has no such places.
    """
    _library()
    modules = [importlib.import_module(name) for name in PROCESSORS]
    logger = importlib.import_module("gptqmodel.utils.logger")
    packing = {"pack_module": lambda _: take, "create_quant_module": lambda _: lambda **_: None}
    changes: list[tuple[Any, str, dict[str, Callable[[Any], Any]]]] = [
        (modules[0], "", packing),
        (modules[1], "", packing),
        (modules[0], "GPTQ", {"quantize": solved.keeping}),
        (modules[1], "AWQProcessor", {"_compute_best_clip": lambda _: awq.clip_bounds}),
        (logger, "", {"_suppress_live_renderables": lambda _: lambda: True}),
    ]
    with contextlib.ExitStack() as undo:
        for module, kind, instead in changes:
            owner = getattr(module, kind, None) if kind else module
            for attribute, replacement in instead.items():
                original = getattr(owner, attribute, None)
                if original is None:
                    place = ".".join(filter(None, (module.__name__, kind, attribute)))
                    raise PrerequisiteError(
                        f"this gptqmodel has no {place}", hint="install gptqmodel 7.7"
                    )
                setattr(owner, attribute, replacement(original))
                undo.callback(setattr, owner, attribute, original)
        yield


def _tidy_table(model: Any) -> None:
    """Complete the library's table of an architecture for AWQ, as most of its tables have it.

    The norms of a part stand before its linears: AWQ takes what is named last before some linears
    as what feeds them, in Qwen3-VL's table k_norm for o_proj. And o_proj is left alone where
    v_proj has another width (grouped queries), which that table does not say either.
    """

    def ordered(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: ordered(value) for key, value in part.items()}
        if isinstance(part, tuple):
            return tuple(sorted(part, key=lambda name: ":!" not in str(name)))
        return [ordered(value) for value in part] if isinstance(part, list) else part

    freeze = importlib.import_module("gptqmodel.models.base")._freeze_module_tree
    model.effective_module_tree = model.module_tree = freeze(ordered(type(model).module_tree))
    if model.awq_scale_optimize_shape_dependent_modules is None:
        model.awq_scale_optimize_shape_dependent_modules = ["self_attn.o_proj"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's banner, tables and bars off both streams; exceptions come through."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
