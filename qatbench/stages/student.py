"""The student of a training run: its weights, its fake-quantized layers and where they start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from qatbench.errors import PrerequisiteError, UsageError
from qatbench.quant import grid as grids
from qatbench.quant import lsq
from qatbench.quant.grid import Grid
from qatbench.stages.train_settings import QUANTIZED, TrainSettings
from qatbench.vlm import layout
from qatbench.vlm import load as models
from qatbench.vlm.layout import Architecture
from qatbench.vlm.load import Loaded, ModelFolder

GRAPHS = 64  # of one decoder block's code, before dynamo gives up


@dataclass
class Student:
    """A model ready to be trained, and what a reader must know of how it was made."""

    loaded: Loaded
    notes: list[str]


def prepare(
    settings: TrainSettings,
    folder: ModelFolder,
    init: ModelFolder | None,
    device: str,
    *,
    checkpointing: bool = False,
    kept_blocks: int = 0,
    compile: bool = False,
    compile_blocks: bool = False,
    scales: Mapping[str, Tensor] | None = None,
) -> Student:
    """Load the student, or the packed checkpoint of it to start from, in training mode.

    `scales` (out, groups) by layer are those to start from, instead of packed or searched ones.
    `checkpointing` recomputes the activations of every decoder block but the last `kept_blocks`:
    those are freed before the gradients of the others take their room.

    Raises: UsageError for settings or an `init` that do not fit the model; PrerequisiteError where
        `compile` is asked for and there is no compiler.
    """
    dtype = torch.bfloat16 if settings.weights == "bfloat16" else torch.float32
    made = Student(_weights(folder, init, device, dtype), [])
    model, arch = made.loaded.model, made.loaded.arch
    if settings.projector != "trained" and not arch.projector:
        raise UsageError(
            f"{folder.name} has no projector to be {settings.projector}",
            hint="leave `projector` at trained",
        )
    if settings.method in QUANTIZED:
        made.notes += _fake_quantize(settings, made.loaded, init, scales)
        if compile:
            lsq.compile_layers(model, torch.device(device))
    elif init:
        made.notes.append(f"starts from {Path(init.name).name}")
    still = arch.projector if settings.projector == "frozen" else ()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (arch.frozen(name) or layout.under(name, still)))
    model.train()
    if checkpointing:
        checkpoint_decoder(model, arch, kept_blocks)
    if compile_blocks:
        compile_decoder(model, arch)
        made.notes.append("decoder blocks compiled: their activations are rounded in fewer places")
    return made


def checkpoint_decoder(model: nn.Module, arch: Architecture, kept: int) -> None:
    """Recompute activations in the backward pass, but for those of the last `kept` blocks."""
    model.gradient_checkpointing_enable(  # type: ignore[operator]
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    blocks = list(model.get_submodule(arch.layers).children())
    for block in blocks[max(0, len(blocks) - kept) :]:
        block.gradient_checkpointing = False  # type: ignore[assignment]


def compile_decoder(model: nn.Module, arch: Architecture) -> None:
    """Let every decoder block compute as one compiled graph each way, within its checkpoint.

    Of a block there are some graphs: of student and teacher, with activations kept or not, for the
    first length and for any. Dynamo's limit of 8, beyond which it goes on in eager without an
    error, is lifted for the process.

    Raises: PrerequisiteError where the compiler is switched off.
    """
    if torch._dynamo.config.disable:
        raise PrerequisiteError(
            "compiled blocks need torch.compile, which is switched off",
            hint="unset TORCHDYNAMO_DISABLE, or leave --compile-blocks out",
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in model.get_submodule(arch.layers).children():
        if getattr(block, "gradient_checkpointing", False):
            block._gradient_checkpointing_func = _compiled_checkpoint  # type: ignore[assignment]
        else:
            block.compile()


def _compiled_checkpoint(forward: partial[Any], *inputs: Any) -> Any:
    """What a checkpointed block calls: the checkpoint around the compiled forward, not within it.

    Within it, torch 2.11 left the whole block to eager without a word.
    """
    compiled = partial(_compiled(forward.func), *forward.args, **forward.keywords)
    return torch.utils.checkpoint.checkpoint(compiled, *inputs, use_reentrant=False)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function for all blocks of a kind."""
    made: Callable[..., Any] = torch.compile(function)
    return made


def rebuilt(
    settings: TrainSettings,
    folder: ModelFolder,
    init: ModelFolder | None,
    trained: Mapping[str, Tensor],
) -> Loaded:
    """The student on the CPU, with trained parameters that come from sharded processes."""
    logs = {name: value for name, value in trained.items() if name.endswith(".log_scale")}
    scales = {name.removesuffix(".log_scale"): value.exp() for name, value in logs.items()}
    loaded = prepare(settings, folder, init, "cpu", scales=scales).loaded
    parameters = dict(loaded.model.named_parameters())
    with torch.no_grad():
        for name, value in trained.items():
            parameters[name].copy_(value)
    return loaded


def language_linears(folder: ModelFolder) -> list[str]:
    """Names of the linears that are quantized and packed."""
    return list(layout.linear_shapes(folder.config))


def _fake_quantize(
    settings: TrainSettings,
    loaded: Loaded,
    init: ModelFolder | None,
    scales: Mapping[str, Tensor] | None,
) -> list[str]:
    """Put the layers on the grid; returns notes."""
    grid = Grid(settings.bits, settings.group_size)
    names, notes = language_linears(loaded.folder), []
    if init and scales is None:
        scales = packed_scales(init, loaded, names, grid)
        searched = len(names) - len(scales)
        told = f"searched for {searched} of {len(names)} layers" if searched else "as packed"
        notes.append(f"starts from {Path(init.name).name}, scales {told}")
    if settings.projector == "quantized":
        names += _projector_linears(loaded, grid)
        notes.append(
            f"projector trained on the {settings.bits}-bit grid, stored as rounded 16-bit values"
        )
    for layer in lsq.attach(loaded.model, names, grid, scales).values():
        if settings.scale_gradient == "lsq":
            layer.gradient_factor = lsq.lsq_gradient_factor(grid, layer.in_features)
    return notes


def _projector_linears(loaded: Loaded, grid: Grid) -> list[str]:
    """Names of the projector's linears.

    Raises: UsageError when the group size does not divide one of them.
    """
    found = {
        name: module
        for name, module in loaded.model.named_modules()
        if isinstance(module, nn.Linear) and layout.under(name, loaded.arch.projector)
    }
    for name, module in found.items():
        if grid.group_size != -1 and module.in_features % grid.group_size:
            raise UsageError(
                f"group size {grid.group_size} does not divide the {module.in_features} inputs of "
                f"{name}",
                hint="choose another group size, or a projector that is trained or frozen",
            )
    return list(found)


# --- starting from a packed checkpoint ------------------------------------------------------------


def _weights(
    folder: ModelFolder, init: ModelFolder | None, device: str, dtype: torch.dtype
) -> Loaded:
    """The model of `folder`, with all the weights of `init` where that is given."""
    if init is None:
        return models.load(folder, device=device, dtype=dtype)
    check_init(folder, init)
    start = models.load(init, device=device, dtype=dtype, kernel="dense")
    tokenizer, processor = models.load_tokenizer(folder)
    if tokenizer.get_vocab() != start.tokenizer.get_vocab():
        raise UsageError(f"{init.name} and {folder.name} have different vocabularies")
    ours, theirs = _shapes(folder), {n: tuple(t.shape) for n, t in start.model.state_dict().items()}
    unlike = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    if unlike:
        raise UsageError(
            f"{init.name} is no checkpoint of {folder.name}: {unlike[0]} is "
            f"{theirs.get(unlike[0])} there, {ours.get(unlike[0])} here"
        )
    return dataclasses.replace(start, folder=folder, tokenizer=tokenizer, processor=processor)


def check_init(folder: ModelFolder, init: ModelFolder) -> None:
    """Compare configs: what can be said before anything is loaded.

    Raises: UsageError when `init` is not packed, or of another architecture or other sizes.
    """
    if init.quantization is None:
        raise UsageError(
            f"{init.name} is not a quantized checkpoint", hint="name it as the student instead"
        )
    same_kind = init.config.get("model_type") == folder.config.get("model_type")
    if not same_kind or layout.linear_shapes(init.config) != layout.linear_shapes(folder.config):
        raise UsageError(
            f"{init.name} is no checkpoint of {folder.name}: another architecture or other sizes",
            hint="start from a checkpoint that was made from this very student",
        )


def _shapes(folder: ModelFolder) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights and buffers, from the config alone."""
    config = transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    with torch.device("meta"):
        model = getattr(transformers, folder.arch.model_class)(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def packed_scales(
    init: ModelFolder, loaded: Loaded, names: Sequence[str], grid: Grid
) -> dict[str, Tensor]:
    """Scales (out, groups) of those layers that lie on `grid` just as they are packed.

    A layer has its scales here if codes times scales give its weights in `loaded` back bit for
    bit; one that is asymmetric, reordered or on another grid has none.
    """
    settings = init.quantization or {}
    if (settings.get("bits"), settings.get("group_size")) != (grid.bits, grid.group_size):
        return {}
    stored: dict[str, Tensor] = {}
    for file in sorted(init.path.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            wanted = [key for key in stream.keys() if key.endswith(".scales")]  # noqa: SIM118
            stored |= {key.removesuffix(".scales"): stream.get_tensor(key) for key in wanted}
    found: dict[str, Tensor] = {}
    for name in names:
        value = stored.get(loaded.arch.file_key(name), stored.get(name))
        weight: Tensor = loaded.model.get_submodule(name).weight.detach()
        if value is None or value.shape[0] != grid.groups(weight.shape[1], name):
            continue
        scales = grids.round_scales(value.to(weight.device).float().T.contiguous(), grid)
        codes = grids.quantize(weight, scales, grid, name=name)
        if torch.equal(grids.dequantize(codes, scales, grid).to(weight.dtype), weight):
            found[name] = scales
    return found
