"""What kernels are launched with: structures as the sources have them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from torch import Tensor


def address(tensor: Tensor | None) -> int | None:
    """Of its memory; None is null."""
    return None if tensor is None else tensor.data_ptr()


class Weights(ctypes.Structure):
    """What `kernels/linear.cu` multiplies with."""

    _fields_ = (
        ("words", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("zeros", ctypes.c_void_p),
        ("rows", ctypes.c_int), ("width", ctypes.c_int),
    )  # fmt: skip


class Output(ctypes.Structure):
    """What becomes of a product: `kernels/common.cuh`."""

    _fields_ = (
        ("out", ctypes.c_void_p), ("squares", ctypes.c_void_p), ("eps", ctypes.c_float),
        ("per_input", ctypes.c_float), ("bias", ctypes.c_void_p), ("weight", ctypes.c_void_p),
        ("scaled", ctypes.c_void_p), ("next", ctypes.c_void_p), ("top", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
    )  # fmt: skip


class Row(ctypes.Structure):
    """Where rows of a batch stand: `kernels/small.cu`."""

    _fields_ = (
        ("best", ctypes.c_void_p), ("counter", ctypes.c_void_p), ("token", ctypes.c_void_p),
        ("told", ctypes.c_void_p), ("count", ctypes.c_void_p), ("filled", ctypes.c_void_p),
        ("turned", ctypes.c_void_p), ("room", ctypes.c_int),
    )  # fmt: skip


@dataclass(frozen=True)
class NextNorm:
    """What a residual product leaves for the norm that follows.

    weight: (rows,) bf16, of that norm; scaled: (columns, rows) bf16, x times it; squares:
    (columns,) fp64, to which the squares of x are added.
    """

    weight: Tensor
    scaled: Tensor
    squares: Tensor

    def addresses(self) -> tuple[int | None, ...]:
        """In the order of `Output`."""
        return address(self.weight), address(self.scaled), address(self.squares)


@dataclass(frozen=True)
class Top:
    """Where a screen tells its largest logit.

    of: (1,) int64, a `key` as `kernels/common.cuh` has it; tokens: rows that are some.
    """

    of: Tensor
    tokens: int

    def arguments(self) -> tuple[int | None, int]:
        """In the order of `Output`."""
        return address(self.of), self.tokens
