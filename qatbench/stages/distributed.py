"""Training on several processes: `accelerate launch -m qatbench train-qat ...`.

Every process takes its share of a step's samples; losses are divided by sums over all of them, so
gradients are added up, not averaged, and losses and weights are those of one process but for the
order of sums. The first process alone writes, logs and exports. Processes are found as accelerate
finds them: gloo on the CPU, NCCL on CUDA.

With `--use_fsdp --fsdp_version 2` the decoder blocks of student and teacher are sharded (FSDP2);
all else (embeddings, head, vision, log-scales) is small and lies whole in every process.
"""

from __future__ import annotations

import atexit
import gc
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qatbench import store
from qatbench.errors import QatbenchError, UsageError
from qatbench.vlm.batch import backbone
from qatbench.vlm.load import Loaded

BUCKET = 1 << 25
"""Gradients that are added up at a time, in fp32: 128 MiB."""
PATIENCE = timedelta(hours=6)  # while the first process exports or saves a large model
Item = TypeVar("Item")


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it."""

    rank: int = 0
    size: int = 1
    device: str | None = None  # of this process; None: as asked for
    sharded: bool = False  # FSDP2

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, rows: Sequence[Item]) -> list[Item]:
        """Every size-th row: of rows sorted by length, all processes get like lengths."""
        return list(rows[self.rank :: self.size])

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all processes, in fp64; the same in each of them."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return values.tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        self.sum([0.0])

    def check(self, batch_size: int) -> None:
        """Refuse a step that cannot be shared.

        Raises: UsageError when a process would be without samples, or, sharded, with fewer forward
            passes than the others wait for.
        """
        if batch_size < self.size or (self.sharded and batch_size % self.size):
            what = "a multiple of" if self.sharded else "at least"
            raise UsageError(
                f"batch size {batch_size} for {self.size} processes",
                hint=f"choose {what} the number of processes",
            )

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in place.

        A parameter that no process has used keeps no gradient. FSDP2 has done the sharded ones.
        """
        if self.size == 1:
            return
        plain = [p for p in parameters if not is_sharded(p)]
        used = self.sum([float(p.grad is not None) for p in plain])
        for some in _buckets([p for p, n in zip(plain, used, strict=True) if n]):
            for p in some:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads = [cast(Tensor, p.grad) for p in some]
            flat = torch.cat([grad.reshape(-1).float() for grad in grads])
            dist.all_reduce(flat)
            parts = torch.split(flat, [grad.numel() for grad in grads])
            for grad, part in zip(grads, parts, strict=True):
                grad.copy_(part.view_as(grad))

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor | float:
        """Scale gradients so that their norm over all parameters is at most `limit`.

        Returns: the norm before that.
        """
        if not self.sharded:
            return _clip([p.grad for p in parameters if p.grad is not None], limit)
        pairs = [(p, _local(p.grad)) for p in parameters if p.grad is not None]
        squares = [0.0, 0.0]
        for parameter, grad in pairs:
            squares[is_sharded(parameter)] += grad.float().square().sum().item()
        norm = math.sqrt(squares[0] + self.sum(squares[1:])[0])
        for _, grad in pairs:
            grad.mul_(min(1.0, limit / (norm + 1e-6)))
        return norm


def _clip(gradients: Sequence[Tensor], limit: float) -> Tensor:
    """`World.clip` in one process, without waiting for the device.

    torch's own multiplies gradients of 16 bits one by one with a number of 32, at a third of the
    memory's speed; here the number has their dtype (off by up to 2^-9 where it is not 1).
    """
    norm = nn.utils.get_total_norm(gradients)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    kinds = {(gradient.device, gradient.dtype) for gradient in gradients}
    for device, dtype in sorted(kinds, key=str):
        some = [g for g in gradients if (g.device, g.dtype) == (device, dtype)]
        torch._foreach_mul_(some, factor.to(device, dtype))
    return norm


ALONE = World()


def join(device: str | None) -> World:
    """The processes that a launcher has started, or ALONE.

    Raises: UsageError for a device that is not every process's own, or FSDP version 1.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    from accelerate import PartialState

    # Its functions' defaults are the group of the import: later they would keep the group for good.
    from torch.distributed.nn import functional  # noqa: F401

    if device not in (None, "cpu", "cuda"):
        raise UsageError(
            f"--device {device} for several processes", hint="each takes its own: leave it out"
        )
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("FSDP version 1 is not supported", hint="--fsdp_version 2")
    cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    atexit.unregister(_leave)  # once, however often a process joins
    atexit.register(_leave)
    own = "cpu" if cpu else str(state.device)  # accelerate says cpu:0, which is no other device
    return World(state.process_index, state.num_processes, own, sharded)


def _leave() -> None:
    """End the group while its threads can still be ended.

    A thread that lets go of a tensor while the interpreter ends aborts the process.
    """
    if dist.is_initialized():
        gc.collect()  # sharded modules hold the group, in cycles
        dist.destroy_process_group()


def begin(folder: store.RunFolder, resume: bool, world: World) -> store.State:
    """Enter the folder: the first process does, the others learn what it found.

    Raises: UsageError, ArtifactError as `RunFolder.begin`, in every process.
    """
    states = list(store.State)
    try:
        found = folder.begin(resume=resume) if world.main else None
    except QatbenchError:
        world.sum([-1.0])
        raise
    (number,) = world.sum([float(states.index(found)) if found else 0.0])
    if number < 0:
        raise UsageError("the first process cannot begin", hint="see its message")
    return states[int(number)]


def shard(loaded: Loaded, world: World) -> None:
    """Spread the weights of the decoder blocks over the processes (FSDP2), in place.

    Raises: UsageError for a model whose blocks hold packed weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = loaded.model
    mesh = init_device_mesh(torch.device(world.device or "cpu").type, (world.size,))
    atexit.register(cast(Any, mesh)._pg_registry.clear)  # the mesh stays in caches, with the group
    blocks = model.get_submodule(loaded.arch.layers)
    inside = {p for n, p in blocks.named_parameters() if not n.endswith("log_scale")}
    outside = {p for p in model.parameters() if p not in inside}
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=outside)
    fully_shard(backbone(model), mesh=mesh, ignored_params=outside)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # losses are divided already: sums, not means
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only its part of the tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor; all processes must ask for a sharded one."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def like(whole: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor on the device of `pattern`, sharded as that is."""
    if not is_sharded(pattern):
        return whole.to(pattern.device)
    from torch.distributed.tensor import distribute_tensor

    spread = cast(Any, pattern)
    moved = whole.to(_local(pattern).device)
    return distribute_tensor(moved, spread.device_mesh, spread.placements, src_data_rank=None)


def gather(parameters: Mapping[str, nn.Parameter], world: World) -> dict[str, Tensor]:
    """Whole weights by name on the CPU of the first process, {} in the others; all must call."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        value = whole(parameter.detach())
        if world.main:
            found[name] = value.cpu()
    return found


def _local(tensor: Tensor | None) -> Tensor:
    """This process's part of a tensor that is there."""
    found = cast(Any, tensor)
    return cast(Tensor, found.to_local() if hasattr(found, "to_local") else found)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, at most BUCKET values together (or one that is larger)."""
    some: list[nn.Parameter] = []
    room = BUCKET
    for parameter in parameters:
        if some and parameter.numel() > room:
            yield some
            some, room = [], BUCKET
        some.append(parameter)
        room -= parameter.numel()
    if some:
        yield some
