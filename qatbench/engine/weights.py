"""INT4 weights in the order in which the decoding kernels read them.

A tile is 16 outputs. A lane (g, t) of a warp, g in 0..7 and t in 0..3, holds outputs g and g + 8 of
it, and of every 64 inputs the two runs of eight that begin at 8 t and 32 + 8 t: 32 weights in four
words of one 16-byte read. Word 2 h + i has inputs 32 h + 8 t + 4 i .. + 3, its nibbles paired as
the tensor cores take them: (input 0 low half, input 1 high half) of output g, then of g + 8, then
inputs 2 and 3 of both. PTX ISA, `mma.m16n8k16`: fragments of A. The highest bit of each nibble is
turned over: as a number of two's complement it is the field less 8 (`kernels/common.cuh`).

Kernels have groups of 32, 64 or 128 inputs; larger ones are several that are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qatbench.errors import ShapeError
from qatbench.quant.packing import Affine

TILE, CHUNK = 16, 64  # outputs; inputs of one 16-byte read a lane
SYMMETRIC = 8  # the zero point that costs nothing
OVER = -0x77777778  # the highest bit of each nibble, as int32
RAISED = 128  # what fields and zero points have added as bf16


@dataclass(frozen=True)
class Packed:
    """One linear, or several that share their input, joined along the outputs.

    words: (out / 16, in / 64, 32, 4) int32 (of 8 bits in / 32, see `screen.py`); scales: (out / 16,
    groups, 8) int32, each two fp16, of outputs g and g + 8; zeros: the same, each two bf16 holding
    128 + zero, or None where all are 8.
    `paired`: tiles hold eight outputs of each half (gate and up).
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    rows: int
    width: int
    group: int
    paired: bool = False
    alike: int = 1  # groups in a row that were one
    bits: int = 4

    def bytes(self) -> int:
        """Of words, scales and zero points."""
        held = (self.words, self.scales, *([] if self.zeros is None else [self.zeros]))
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def check_shape(out: int, width: int, group: int, paired: bool) -> None:
    """Refuse what `pack` cannot reorder.

    Raises: ShapeError if out is no multiple of 16 (32 if paired), in none of 64, or the group size
        neither 32 nor a multiple of 64.
    """
    need = 2 * TILE if paired else TILE
    if out % need or width % CHUNK or group % 32 or (group % CHUNK and CHUNK % group):
        raise ShapeError(
            f"the engine's kernels do not take {out} x {width} in groups of {group}",
            hint=f"outputs: a multiple of {need}; inputs: of {CHUNK}; groups: 32 or of {CHUNK}",
        )


def pack(linear: Affine, *, paired: bool = False) -> Packed:
    """Reorder a linear's fields; the values stay what they are.

    Raises: ShapeError as `check_shape`.
    """
    out, width = linear.fields.shape
    groups = linear.scales.shape[1]
    group = width // groups
    check_shape(out, width, group, paired)
    largest = next(size for size in (128, 64, 32) if group % size == 0)
    alike = group // largest
    zero_points, scales = (part.repeat_interleave(alike, 1) for part in linear[1:])
    fields = tiled(linear.fields, paired)
    tiles = fields.shape[0]
    # tile, output: (half, g), input: (chunk, h, t, i, pair, within)
    split = fields.view(tiles, 2, 8, width // CHUNK, 2, 4, 2, 2, 2)
    words = torch.zeros(tiles, width // CHUNK, 8, 4, 2, 2, dtype=torch.int32, device=fields.device)
    for half, pair, within in _NIBBLES:
        nibble = split[:, half, :, :, :, :, :, pair, within].to(torch.int32)
        words |= nibble.permute(0, 2, 1, 4, 3, 5) << _shift(half, pair, within)
    zeros = None
    if not bool((linear.zeros == SYMMETRIC).all()):
        zeros = by_twos(tiled(zero_points.to(torch.bfloat16) + RAISED, paired))
    return Packed(
        words.view(tiles, width // CHUNK, 32, 4) ^ OVER,
        by_twos(tiled(scales.half(), paired)),
        zeros, out, width, largest, paired, alike,
    )  # fmt: skip


def unpack(packed: Packed) -> Affine:
    """Undo `pack` exactly."""
    assert packed.bits == 4
    tiles, chunks = packed.words.shape[:2]
    words = (packed.words ^ OVER).view(tiles, chunks, 8, 4, 2, 2)
    shape = (tiles, 2, 8, chunks, 2, 4, 2, 2, 2)
    fields = torch.empty(shape, dtype=torch.uint8, device=words.device)
    for half, pair, within in _NIBBLES:
        nibble = (words >> _shift(half, pair, within)) & 15
        fields[:, half, :, :, :, :, :, pair, within] = nibble.permute(0, 2, 1, 4, 3, 5).to(
            torch.uint8
        )
    scales = _untwo(packed.scales, torch.float16)
    if packed.zeros is None:
        zeros = torch.full_like(scales, SYMMETRIC, dtype=torch.uint8)
    else:
        zeros = (_untwo(packed.zeros, torch.bfloat16) - RAISED).to(torch.uint8)
    zeros, scales = zeros[..., :: packed.alike], scales[..., :: packed.alike]
    parts = (fields.view(tiles, TILE, packed.width), zeros, scales)
    return Affine(*(_untiled(part, packed.paired) for part in parts))


_NIBBLES = [(half, pair, within) for half in (0, 1) for pair in (0, 1) for within in (0, 1)]


def _shift(half: int, pair: int, within: int) -> int:
    return 4 * (2 * pair + half) + 16 * within


def tiled(rows: Tensor, paired: bool = False) -> Tensor:
    """(out, n) -> (tiles, 16, n); `paired`: eight of each half."""
    if not paired:
        return rows.reshape(-1, TILE, rows.shape[1])
    gate, up = (half.reshape(-1, TILE // 2, rows.shape[1]) for half in rows.chunk(2))
    return torch.cat((gate, up), 1)


def _untiled(tiles: Tensor, paired: bool) -> Tensor:
    if not paired:
        return tiles.flatten(0, 1)
    return torch.cat([half.flatten(0, 1) for half in tiles.chunk(2, 1)])


def by_twos(tiles: Tensor) -> Tensor:
    """(tiles, 16, groups) of 16-bit floats -> (tiles, groups, 8) int32 of (g, g + 8)."""
    twos = tiles.view(tiles.shape[0], 2, 8, -1).permute(0, 3, 2, 1).contiguous()
    return twos.view(torch.int32).squeeze(-1)


def _untwo(twos: Tensor, dtype: torch.dtype) -> Tensor:
    values = twos.unsqueeze(-1).view(dtype)  # (tiles, groups, 8, 2)
    return values.permute(0, 3, 2, 1).reshape(twos.shape[0], TILE, -1)
