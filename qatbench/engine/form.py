"""How a product of a decoding step on CUDA is launched, and what of a device decides it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from qatbench.engine.cuda import OVERLAPS


@dataclass(frozen=True)
class Card:
    """What of a device decides how products are launched."""

    multiprocessors: int
    shared: int  # bytes of shared memory of each
    clusters: bool = True  # whether blocks can write into each other's shared memory

    @staticmethod
    @functools.cache
    def current() -> Card:
        """The device that torch uses."""
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Card(
            device.multi_processor_count, device.shared_memory_per_multiprocessor,
            torch.cuda.get_device_capability() >= OVERLAPS,
        )  # fmt: skip


@dataclass(frozen=True)
class Form:
    """How a product is built and launched."""

    warps: int
    tiles: int  # that a warp works on at once: a unit
    depth: int  # spans on their way a warp
    blocks: int  # that fit into a multiprocessor
    span: int  # inputs that a warp takes at once
    lead: int = 0  # spans that a warp has left when the next kernel may start; or as below
    held_back: int = 0  # spans of the first `depth` that a warp asks for only after the input
    kept: int = 0  # spans of the input that a warp keeps in registers; 0: none
    splits: int = 1  # blocks of a cluster, which share its inputs out

    @property
    def source(self) -> str:
        """File of the kernel `linear`."""
        return "kept.cu" if self.kept else "linear.cu"


WITH_INPUT, AT_ONCE = 0, -1
"""Leads: the next kernel may start when this one's input is there, or with this one."""
LIBRARY = Form(0, 0, 0, 0, 0)
"""torch's dense product, with a launch of its own for what comes after."""
