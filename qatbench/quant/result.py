"""What every quantizer hands over: integer codes, zero points and scales of each linear.

RTN, GPTQ, AWQ, QAT and GRACE all end here, so that one exporter writes all of them alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qatbench.errors import NumericsError, UsageError
from qatbench.quant.fields import pack_awq_fields, pack_fields
from qatbench.quant.grid import Grid, round_scales
from qatbench.quant.packing import pack_gptq

Layout = Literal["auto", "gptq", "awq"]
"""How a user names the tensors of a checkpoint; `auto` is what the method's checkpoints have."""


def layout_of(wanted: Layout, method: str, bits: int) -> str:
    """The layout of a method's checkpoint: gptq, gptq_v2 (any zero points) or awq.

    AWQ below 4 bits is asymmetric and in gptq_v2, which plain transformers load; at 8 bits, and
    where the gptq layout is asked for, it is symmetric, so that vLLM reads it too.

    Raises: UsageError for the awq layout at other widths than 4 bits: it has none.
    """
    if wanted == "awq" and bits != 4:
        raise UsageError(
            f"the awq layout is defined for 4 bits, not {bits}", hint="--layout gptq, or --bits 4"
        )
    if wanted != "auto":
        return wanted
    if method != "awq" or bits == 8:
        return "gptq"
    return "awq" if bits == 4 else "gptq_v2"


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear's weight as weight = (fields - zeros) * scales, group by group.

    Shapes: fields (out, in) uint8 in [0, 2^bits); zeros (out, groups) uint8; scales (out, groups)
    fp32, each value exact in fp16.
    """

    fields: Tensor
    zeros: Tensor
    scales: Tensor
    grid: Grid

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle of the grid."""
        return bool((self.zeros == -self.grid.qmin).all())

    def dense(self) -> Tensor:
        """The weight that these integers stand for: (out, in) fp32."""
        shape = (*self.scales.shape, -1)
        signed = self.fields.reshape(shape).float() - self.zeros.float()[..., None]
        return (signed * self.scales[..., None]).flatten(1)

    def to(self, device: torch.device | str) -> QuantizedLinear:
        """The same integers and scales on a device."""
        fields, zeros, scales = (x.to(device) for x in (self.fields, self.zeros, self.scales))
        return QuantizedLinear(fields, zeros, scales, self.grid)

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, grid: Grid) -> QuantizedLinear:
        """From signed codes (out, in) int8 of the symmetric grid."""
        fields = (codes.to(torch.int16) - grid.qmin).to(torch.uint8)
        zeros = torch.full(scales.shape, -grid.qmin, dtype=torch.uint8, device=scales.device)
        return cls(fields, zeros, scales.float(), grid)

    @classmethod
    def from_affine(
        cls, weight: Tensor, scales: Tensor, zeros: Tensor, grid: Grid, name: str
    ) -> QuantizedLinear:
        """From a weight that lies on the grid already, as the library hands it over.

        Raises: NumericsError if the weight does not lie on the grid, naming the layer: within half
            a percent of a step (the library's own rounding in fp32) and what its own dtype rounds
            a code times its scale by; or if that dtype is too coarse to tell codes apart.
        """
        coarse = 2**grid.bits * torch.finfo(weight.dtype).eps / 2  # of a step, at the largest code
        if coarse > 0.25:
            raise NumericsError(
                f"{name}: {weight.dtype} is too coarse to hold codes of {grid.bits} bits",
                hint="calibrate in float32 (--dtype float32, the default)",
            )
        shape = (*scales.shape, -1)
        exact = weight.float().reshape(shape) / scales.float()[..., None]
        exact += zeros.float()[..., None]
        fields = exact.round()
        least, most = fields.aminmax()
        farthest = exact.sub_(fields).abs_().max()
        off, low, high = torch.stack((farthest, least, most)).tolist()  # waits for the device once
        if not (off <= 5e-3 + coarse and low >= 0 and high < 2**grid.bits):
            raise NumericsError(f"{name}: weights are {off:.3f} of a step off the grid")
        return cls(
            fields.to(torch.uint8).flatten(1),
            zeros.to(torch.uint8),
            round_scales(scales.float(), grid),
            grid,
        )

    def packed(self, layout: str, name: str) -> dict[str, Tensor]:
        """Tensors of the `gptq`, `gptq_v2` (any zero points) or `awq` (4 bits) layout.

        Raises: UsageError for AWQ at other widths; ShapeError where words are not filled.
        """
        grid = self.grid
        if layout == "gptq":
            if not self.symmetric:
                raise UsageError(f"{name}: an asymmetric layer needs the gptq_v2 or awq layout")
            codes = (self.fields.to(torch.int16) + grid.qmin).to(torch.int8)
            return pack_gptq(codes, self.scales, grid, name=name)
        scales = self.scales.to(torch.float16).T.contiguous()
        if layout == "awq":
            if grid.bits != 4:
                raise UsageError(f"{name}: the AWQ layout is defined for 4 bits only")
            return {
                "qweight": pack_awq_fields(self.fields.T, name),
                "qzeros": pack_awq_fields(self.zeros.T, name),
                "scales": scales,
            }
        width = self.fields.shape[1]
        span = width // self.scales.shape[1]
        return {
            "qweight": pack_fields(self.fields.T, grid.bits, f"{name} inputs"),
            "qzeros": pack_fields(self.zeros, grid.bits, f"{name} outputs").T.contiguous(),
            "scales": scales,
            "g_idx": torch.arange(width, dtype=torch.int32, device=scales.device) // span,
        }


@dataclass(frozen=True)
class Quantized:
    """A quantized model: its linears, and other weights that the method changed."""

    method: str
    layout: str  # gptq | gptq_v2 | awq
    linears: Mapping[str, QuantizedLinear]
    changed: Mapping[str, Tensor] = field(default_factory=dict)  # e.g. norms under AWQ

    def weights(self) -> dict[str, Tensor]:
        """Dense weights by parameter name: what a loaded checkpoint must compute with."""
        dense = {f"{name}.weight": linear.dense() for name, linear in self.linears.items()}
        return dense | dict(self.changed)
