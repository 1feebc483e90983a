"""A head in 8 bits that says which tokens may be the likeliest; the choice stays that of 16 bits.

Of two vectors the product is at most that of their norms (Cauchy and Schwarz). So a logit that is
computed with rounded weights is off by no more than the norm of what rounding took from its row,
times that of the input: every token whose logit could reach what the first one has at least is
computed anew from the 16-bit row (`decide` in `kernels/small.cu`), as a rule a few. A step reads
half of the head's bytes, and chooses what it would have chosen, up to how sums of fp32 are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qatbench.engine.products import SCREEN, Product
from qatbench.engine.weights import TILE, Packed, by_twos, tiled

_AT_ONCE = 8192  # rows
_MOST = 127  # of a code
_TIMES = 16  # kernels divide by it, as 4-bit fields come as 16 times what they are
_SLACK, _ROUNDING = 1e-3, 1e-5  # of errors; of norms, for the input's digits and sums in fp32
_ORDER = (
    0,
    2,
    1,
    3,
)  # in which a word has four inputs: that of the input's digits, see `weights.py`


@dataclass(frozen=True)
class Screen:
    """A head of one column.

    product: 8-bit codes. errors: (rows,) fp32, how far a logit is off at most, per norm of the
    input; most: the largest of them.
    """

    product: Product
    errors: Tensor
    most: float

    def bytes(self) -> int:
        """Of codes, scales and errors."""
        return self.product.bytes() + self.errors.numel() * 4


def screen(head: Tensor, alone: bool) -> Screen:
    """Round a head (rows, width) bf16, rows a multiple of 16, width of 32."""
    rows, width = head.shape
    group = next(size for size in (128, 64, 32) if width % size == 0)
    parts = [_rounded(some, group) for some in torch.split(head, _AT_ONCE)]
    words, scales, errors = (torch.cat(some) for some in zip(*parts, strict=True))
    packed = Packed(words, scales, None, rows, width, group, bits=8)
    return Screen(Product(packed, SCREEN, None, alone), errors, errors.max().item())


def _rounded(head: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scales and errors of some rows."""
    rows, width = head.shape
    weight = head.float().view(rows, -1, group)
    scales = (weight.abs().amax(-1) * (_TIMES / _MOST)).half()
    step = (scales.float() / _TIMES).unsqueeze(-1)
    codes = (weight / step).nan_to_num(0.0).round().clamp(-_MOST, _MOST)
    lost = (weight - codes * step).flatten(1).norm(dim=1)
    errors = lost * (1 + _SLACK) + weight.flatten(1).norm(dim=1) * _ROUNDING
    # tile, output: (half, g), input: (of 32, t, i, within)
    split = codes.to(torch.int8).view(rows // TILE, 2, 8, width // 32, 4, 2, 4)[..., list(_ORDER)]
    bytes_ = split.permute(0, 3, 2, 4, 5, 1, 6).contiguous()
    words = bytes_.view(torch.int32).view(rows // TILE, width // 32, 32, 4)
    return words, by_twos(tiled(scales)), errors
