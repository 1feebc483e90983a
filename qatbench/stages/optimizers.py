"""The optimizers of training, and their state as plain tensors that a file can hold.

adamw      torch.optim.AdamW, moments in the dtype of the parameters.
adamw8bit  torchao's AdamW with moments of 8 bits in blocks of 256 (arXiv:2110.02861); 16-bit
           weights are rounded stochastically, so that updates below their resolution are not lost.
           The rounding of step n draws from a generator seeded by (seed, n) alone: a resumed run
           draws what an uninterrupted one draws. The scales, a hundredth of all parameters, have
           torch's AdamW: 8 bits would save little, and the host is slow to go through them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qatbench.errors import PrerequisiteError, UsageError
from qatbench.stages import distributed
from qatbench.stages.train_settings import TrainSettings

MOMENTS = ("exp_avg", "exp_avg_sq")
_PARTS = ("codes", "scale", "qmap")  # of a moment of 8 bits


class Together:
    """Optimizers of different parameters as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def of(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        """The one that updates a parameter."""
        for part in self.parts:
            if any(parameter is p for group in part.param_groups for p in group["params"]):
                return part
        raise KeyError("no optimizer has this parameter")


Optimizer = torch.optim.Optimizer | Together


def build(
    settings: TrainSettings, parameters: Mapping[str, nn.Parameter], device: torch.device
) -> Optimizer:
    """The optimizer of `settings`, in groups called "weights" and "scales".

    Parameters that are sharded over processes have groups of their own: no kernel takes both.

    Raises: UsageError for 16-bit weights without stochastic rounding, or 8-bit moments of sharded
        parameters; PrerequisiteError without torchao.
    """
    groups: list[dict[str, Any]] = []
    for name, decay in (("weights", settings.weight_decay), ("scales", 0.0)):
        mine = [p for key, p in parameters.items() if _is_scale(key) == (name == "scales")]
        for part in (False, True):
            chosen = [p for p in mine if distributed.is_sharded(p) == part]
            lr = settings.lr if name == "weights" else settings.scale_lr
            groups.append({"params": chosen, "lr": lr, "weight_decay": decay, "name": name})
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw8bit":
        if any(distributed.is_sharded(p) for p in parameters.values()):
            raise UsageError(
                "8-bit moments of sharded parameters cannot be saved", hint="use optimizer adamw"
            )
        scales = [group for group in groups if group["name"] == "scales"]
        if not scales:
            return _eight_bits(groups, settings)
        weights = [group for group in groups if group["name"] != "scales"]
        return Together(_eight_bits(weights, settings), _full(scales, settings, device))
    if settings.weights == "bfloat16":
        raise UsageError(
            "bfloat16 weights lose small updates when they are rounded to nearest",
            hint="use optimizer adamw8bit, which rounds them stochastically",
        )
    return _full(groups, settings, device)


def _full(
    groups: list[dict[str, Any]], settings: TrainSettings, device: torch.device
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=settings.betas, fused=device.type == "cuda")


def _is_scale(name: str) -> bool:
    return name.endswith("log_scale")


def _eight_bits(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit  # type: ignore[import-untyped]
    except ImportError as error:
        raise PrerequisiteError(
            f"the 8-bit AdamW is torchao's: {error}", hint="pip install 'torchao>=0.17'"
        ) from error
    if torch._dynamo.config.disable:
        raise PrerequisiteError(
            "torchao's 8-bit AdamW is compiled, and torch.compile is switched off",
            hint="unset TORCHDYNAMO_DISABLE, or use optimizer adamw",
        )
    made: torch.optim.Optimizer = AdamW8bit(
        groups, betas=settings.betas, bf16_stochastic_round=settings.weights == "bfloat16"
    )
    return made


def set_rates(optimizer: Optimizer, rates: Mapping[str, float]) -> None:
    """Set the learning rate of each group by its name."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao compiles its step: the tensor stays
            group["lr"].fill_(rates[group["name"]])
        else:
            group["lr"] = rates[group["name"]]


def step(optimizer: Optimizer, seed: int, number: int) -> None:
    """Update the parameters; what is random in it follows from (seed, number).

    Raises: PrerequisiteError when torchao's step cannot be compiled here.
    """
    if isinstance(optimizer, Together):
        for part in optimizer.parts:
            step(part, seed, number)
        return
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.step()
        return
    try:
        with _seeded(seed, number, optimizer):
            optimizer.step()
    except torch._dynamo.exc.TorchDynamoException as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise PrerequisiteError(
            f"torchao's 8-bit AdamW needs a working compiler: {first[:200]}",
            hint="use optimizer adamw; or install a C++ compiler (CPU) or Triton (CUDA)",
        ) from error


@contextlib.contextmanager
def _seeded(seed: int, number: int, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The default generators of (seed, number), and afterwards as they were."""
    device = optimizer.param_groups[0]["params"][0].device
    devices = [device] if device.type == "cuda" else []
    digest = hashlib.sha256(f"{seed}/step-{number}".encode()).digest()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        yield


def tensors_of(optimizer: Optimizer, parameter: nn.Parameter, step: int) -> dict[str, Tensor]:
    """A parameter's state by the name of its part, on the CPU; gathered where it is sharded.

    Moments of 8 bits are taken apart into codes, scales and map. {} for a parameter that never had
    a gradient; `step` is there where the parameter has not seen all `step` steps.
    """
    state = _owner(optimizer, parameter).state.get(parameter) or {}
    found: dict[str, Tensor] = {}
    for moment in MOMENTS if state else ():
        value = state[moment]
        if hasattr(value, "codes"):
            found |= {f"{moment}.{part}": getattr(value, part) for part in _PARTS}
        else:
            found[moment] = distributed.whole(value)
    if state and int(state["step"]) != step:
        found["step"] = state["step"].reshape(1)
    return {key: value.cpu().contiguous() for key, value in found.items()}


def _owner(optimizer: Optimizer, parameter: nn.Parameter) -> torch.optim.Optimizer:
    return optimizer.of(parameter) if isinstance(optimizer, Together) else optimizer


def put_back(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    found: Mapping[str, Tensor],
    step: int,
) -> None:
    """Undo `tensors_of` exactly.

    Raises: KeyError when a part is missing.
    """
    if not found:
        return
    owner = _owner(optimizer, parameter)
    counts = found["step"].reshape(()) if "step" in found else torch.tensor(float(step))
    fused = bool(owner.defaults.get("fused"))
    state: dict[str, Any] = {"step": counts.to(parameter.device if fused else "cpu")}
    for moment in MOMENTS:
        if f"{moment}.codes" in found:
            from torchao.optim.subclass_8bit import OptimState8bit  # type: ignore[import-untyped]

            parts = (found[f"{moment}.{part}"].to(parameter.device) for part in _PARTS)
            state[moment] = OptimState8bit(*parts, moment == "exp_avg", parameter.dtype)
        else:
            state[moment] = distributed.like(found[moment], parameter)
    owner.state[parameter] = state
