"""Unsigned fields of a few bits in int32 words, read as one little-endian bit stream."""

from __future__ import annotations

import torch
from torch import Tensor

from qatbench.errors import ShapeError

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Field k of an AWQ word holds output AWQ_ORDER[k] of its eight."""


def pack_fields(fields: Tensor, bits: int, name: str = "") -> Tensor:
    """Unsigned fields (n, m) as a bit stream down dim 0: (n * bits / 32, m) int32.

    Raises: ShapeError if n * bits is no multiple of 32.
    """
    count, columns = fields.shape
    if count * bits % WORD:
        raise ShapeError(
            f"{name.strip() or 'layer'}: {count} fields of {bits} bits do not fill 32-bit words",
            hint=f"make the size a multiple of {_period(bits)}, or leave this layer in 16 bits",
        )
    periods = fields.reshape(-1, _period(bits), columns)
    shape = (periods.shape[0], _period(bits) * bits // WORD, columns)
    words = torch.zeros(shape, dtype=torch.int64, device=fields.device)
    for i in range(_period(bits)):
        word, shift = divmod(i * bits, WORD)
        field = periods[:, i].long()
        words[:, word] |= field << shift
        if shift + bits > WORD:
            words[:, word + 1] |= field >> (WORD - shift)
    low = words.flatten(0, 1) & 0xFFFFFFFF
    return ((low ^ 0x80000000) - 0x80000000).to(torch.int32)  # two's complement, no overflow


def unpack_fields(words: Tensor, bits: int, name: str = "") -> Tensor:
    """Undo `pack_fields`: (n * bits / 32, m) int32 -> (n, m) uint8.

    Raises: ShapeError if the words are not an int32 matrix that holds whole periods.
    """
    stride = _period(bits) * bits // WORD
    if words.ndim != 2 or words.dtype != torch.int32 or words.shape[0] % stride:
        raise ShapeError(
            f"{name.strip() or 'layer'}: {tuple(words.shape)} {words.dtype} is no int32 matrix "
            f"of packed {bits}-bit fields"
        )
    stream = words.reshape(-1, stride, words.shape[1])
    shape = (stream.shape[0], _period(bits), words.shape[1])
    fields = torch.empty(shape, dtype=torch.uint8, device=words.device)
    for i in range(_period(bits)):
        word, shift = divmod(i * bits, WORD)
        field = (stream[:, word].long() & 0xFFFFFFFF) >> shift
        if shift + bits > WORD:
            field |= stream[:, word + 1].long() << (WORD - shift)
        fields[:, i] = (field & ((1 << bits) - 1)).to(torch.uint8)
    return fields.flatten(0, 1)


def _period(bits: int) -> int:
    """Fields after which the stream is at a word boundary again."""
    return WORD // bits if WORD % bits == 0 else WORD


def pack_awq_fields(fields: Tensor, name: str) -> Tensor:
    """Unsigned 4-bit fields (n, out) in the AWQ order: (n, out / 8) int32.

    Raises: ShapeError if out is no multiple of 8.
    """
    if fields.shape[1] % 8:
        raise ShapeError(
            f"{name or 'layer'}: {fields.shape[1]} outputs are not a multiple of 8",
            hint="leave this layer in 16 bits",
        )
    ordered = fields.reshape(fields.shape[0], -1, 8)[:, :, list(AWQ_ORDER)].flatten(1)
    return pack_fields(ordered.T, 4, name).T.contiguous()


def unpack_awq_fields(words: Tensor, name: str) -> Tensor:
    """Undo `pack_awq_fields`: (n, out / 8) int32 -> (n, out) uint8."""
    stored = unpack_fields(words.T, 4, name).T.reshape(words.shape[0], -1, 8)
    fields = torch.empty_like(stored)
    fields[:, :, list(AWQ_ORDER)] = stored
    return fields.flatten(1)
