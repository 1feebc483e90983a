from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qatbench.errors import ArtifactError, NumericsError, ShapeError, UsageError
from qatbench.quant.fields import pack_fields, unpack_fields
from qatbench.quant.grid import Grid, dequantize, round_scales
from qatbench.quant.packing import (
    dequantize_awq,
    dequantize_gptq,
    pack_awq,
    pack_gptq,
    unpack_awq,
    unpack_gptq,
)

BITS = (2, 3, 4, 8)
# Odd but legal: several periods, one word, one group a row, groups that are no power of two.
SHAPES = [(32, 64, 32), (96, 160, 32), (32, 96, 48), (64, 224, -1), (32, 32, 8)]


def layer(grid: Grid, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), generator=rng)
    scales = torch.rand(rows, grid.groups(columns), generator=rng) * 0.1 + 1e-3
    return codes.to(torch.int8), round_scales(scales, grid)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_gptq_round_trip_is_exact(bits: int, shape: tuple[int, int, int]) -> None:
    rows, columns, size = shape
    grid = Grid(bits, size)
    codes, scales = layer(grid, rows, columns)

    packed = pack_gptq(codes, scales, grid)

    groups = grid.groups(columns)
    assert {key: (tuple(x.shape), x.dtype) for key, x in packed.items()} == {
        "qweight": ((columns * bits // 32, rows), torch.int32),
        "qzeros": ((groups, rows * bits // 32), torch.int32),
        "scales": ((groups, rows), torch.float16),
        "g_idx": ((columns,), torch.int32),
    }
    assert all(x.is_contiguous() for x in packed.values())  # safetensors refuses others
    got = unpack_gptq(packed, grid)
    assert torch.equal(got[0], codes)
    assert torch.equal(got[1], scales)
    assert got[0].dtype == torch.int8
    weight = dequantize(codes, scales, grid)
    assert torch.equal(dequantize_gptq(packed, bits, size), weight)


@pytest.mark.parametrize("shape", [(8, 8, 8), (24, 40, 8), (8, 511, -1), (136, 96, 48)], ids=str)
def test_awq_round_trip_is_exact(shape: tuple[int, int, int]) -> None:
    rows, columns, size = shape
    grid = Grid(4, size)
    codes, scales = layer(grid, rows, columns)

    packed = pack_awq(codes, scales, grid)

    groups = grid.groups(columns)
    assert {key: (tuple(x.shape), x.dtype) for key, x in packed.items()} == {
        "qweight": ((columns, rows // 8), torch.int32),
        "qzeros": ((groups, rows // 8), torch.int32),
        "scales": ((groups, rows), torch.float16),
    }
    assert all(x.is_contiguous() for x in packed.values())
    got = unpack_awq(packed, grid)
    assert torch.equal(got[0], codes)
    assert torch.equal(got[1], scales)
    assert torch.equal(dequantize_awq(**packed, group_size=size), dequantize(codes, scales, grid))


@pytest.mark.parametrize("bits", BITS)
def test_fields_are_one_little_endian_bit_stream(bits: int) -> None:
    rng = torch.Generator().manual_seed(bits)
    fields = torch.randint(0, 1 << bits, (64, 3), generator=rng)
    fields[-1] = (1 << bits) - 1  # sets the sign bit of the last word

    words = pack_fields(fields, bits)

    for column in range(3):  # Python's big integers as the oracle
        stream = sum(value << (i * bits) for i, value in enumerate(fields[:, column].tolist()))
        stored = words[:, column].contiguous().numpy().astype("<i4").tobytes()
        assert int.from_bytes(stored, "little") == stream
    assert torch.equal(unpack_fields(words, bits).long(), fields)


def test_a_gptq_layer_by_hand() -> None:
    grid = Grid(4, 8)
    codes = torch.zeros(8, 8, dtype=torch.int8)
    codes[0] = torch.arange(-8, 0)  # stored as 0 .. 7, the first input in the lowest nibble
    packed = pack_gptq(codes, torch.full((8, 1), 0.5), grid)
    assert packed["qweight"].tolist() == [[0x76543210] + 7 * [0x88888888 - (1 << 32)]]
    assert packed["qzeros"].tolist() == [[0x77777777]]  # v1: zero point 8 is stored as 7
    assert packed["g_idx"].tolist() == [0] * 8


def test_an_awq_layer_by_hand() -> None:
    codes = torch.arange(-8, 0, dtype=torch.int8)[:, None].expand(8, 8)  # output j has field j
    packed = pack_awq(codes, torch.full((8, 1), 0.5), Grid(4, 8))
    assert packed["qweight"].tolist() == [[0x75316420]] * 8  # nibbles 0 2 4 6 1 3 5 7
    assert packed["qzeros"].tolist() == [[0x88888888 - (1 << 32)]]


@pytest.mark.parametrize("bits", BITS)
def test_shapes_that_fill_no_words_are_refused_by_name(bits: int) -> None:
    grid, step = Grid(bits, -1), 32 if bits == 3 else 32 // bits
    for rows, columns in [(64, 64 + step // 2), (64 + step // 2, 64)]:
        codes, scales = layer(grid, rows, columns)
        with pytest.raises(ShapeError, match=r"layers\.7\.k_proj"):
            pack_gptq(codes, scales, grid, name="layers.7.k_proj")


def test_awq_refuses_what_it_cannot_hold() -> None:
    codes, scales = layer(Grid(4, 8), 12, 16)
    with pytest.raises(ShapeError, match=r"layers\.7\.k_proj: 12 outputs"):
        pack_awq(codes, scales, Grid(4, 8), name="layers.7.k_proj")
    for bits in (2, 3, 8):
        with pytest.raises(UsageError, match="4-bit"):
            pack_awq(codes, scales, Grid(bits, 8))
        with pytest.raises(UsageError, match="4-bit"):
            unpack_awq({}, Grid(bits, 8))


@pytest.mark.parametrize("pack", [pack_gptq, pack_awq])
def test_nothing_is_lost_in_silence(pack: Callable[..., dict[str, Tensor]]) -> None:
    grid = Grid(4, 8)
    codes, scales = layer(grid, 32, 32)
    with pytest.raises(NumericsError, match="fp16"):
        pack(codes, scales * (1 + 2**-13), grid)
    with pytest.raises(NumericsError, match="fp16"):
        pack(codes, torch.full_like(scales, torch.inf), grid)
    for bad in (grid.qmin - 1, grid.qmax + 1):
        off = codes.clone()
        off[3, 5] = bad
        with pytest.raises(NumericsError, match="codes must be"):
            pack(off, scales, grid)
    with pytest.raises(NumericsError, match="codes must be"):
        pack(codes.float(), scales, grid)
    with pytest.raises(ShapeError, match="scales"):
        pack(codes, scales[:, :1], grid)


def test_a_damaged_gptq_layer_is_named() -> None:
    grid = Grid(4, 8)
    packed = pack_gptq(*layer(grid, 32, 32), grid)
    for key in packed:
        with pytest.raises(ArtifactError, match=rf"fc1.*{key}"):
            unpack_gptq({k: x for k, x in packed.items() if k != key}, grid, name="fc1")
    shapes = {
        "qweight": torch.zeros(4, 24, dtype=torch.int32),
        "qzeros": packed["qzeros"][:1],
        "scales": packed["scales"][:, :8],
    }
    for key, tensor in shapes.items():
        with pytest.raises(ShapeError, match="fc1"):
            unpack_gptq({**packed, key: tensor}, grid, name="fc1")
        with pytest.raises(ShapeError, match="fc1"):
            dequantize_gptq({**packed, key: tensor}, 4, 8, name="fc1")
    with pytest.raises(ShapeError, match="int32"):
        unpack_gptq({**packed, "qweight": packed["qweight"].long()}, grid)
    with pytest.raises(ArtifactError, match="g_idx"):
        dequantize_gptq({**packed, "g_idx": packed["g_idx"] + 1}, 4, 8)
    with pytest.raises(ArtifactError, match="g_idx"):
        dequantize_gptq({**packed, "g_idx": packed["g_idx"] - 1}, 4, 8)
    with pytest.raises(ShapeError, match="g_idx"):
        dequantize_gptq({**packed, "g_idx": packed["g_idx"][:-1]}, 4, 8)


def test_only_symmetric_layers_in_order_are_unpacked_to_codes() -> None:
    grid = Grid(4, 8)
    packed = pack_gptq(*layer(grid, 32, 32), grid)
    v2 = {**packed, "qzeros": packed["qzeros"] + 0x11111111}
    with pytest.raises(ArtifactError, match="zero points"):
        unpack_gptq(v2, grid)
    with pytest.raises(ArtifactError, match="g_idx"):
        unpack_gptq({**packed, "g_idx": packed["g_idx"].flip(0)}, grid)
    awq = pack_awq(*layer(grid, 32, 32), grid)
    with pytest.raises(ArtifactError, match="zero points"):
        unpack_awq({**awq, "qzeros": awq["qzeros"] + 1}, grid)


def asymmetric(bits: int, v2: bool) -> tuple[dict[str, Tensor], Tensor]:
    """A GPTQ layer (64, 96), groups of 32 in a shuffled order, and its weights in fp64."""
    rng = torch.Generator().manual_seed(bits)
    fields = torch.randint(0, 1 << bits, (96, 64), generator=rng)
    zeros = torch.randint(0 if v2 else 1, 1 << bits, (3, 64), generator=rng)
    scales = (torch.rand(3, 64, generator=rng) * 0.1).half()
    g_idx = (torch.arange(96) // 32)[torch.randperm(96, generator=rng)]
    tensors = {
        "qweight": pack_fields(fields, bits),
        "qzeros": pack_fields((zeros if v2 else zeros - 1).T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": g_idx.int(),
    }
    return tensors, ((fields - zeros[g_idx]) * scales.double()[g_idx]).T


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_any_zeros_and_any_order_are_dequantized(bits: int, v2: bool) -> None:
    tensors, expected = asymmetric(bits, v2)
    got = dequantize_gptq(tensors, bits, 32, v2=v2)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert torch.equal(got.double(), expected)
    assert not torch.equal(dequantize_gptq(tensors, bits, 32, v2=not v2).double(), expected)


def test_without_g_idx_the_groups_are_in_order() -> None:
    grid = Grid(4, 8)
    codes, scales = layer(grid, 32, 32)
    packed = pack_gptq(codes, scales, grid)
    del packed["g_idx"]
    assert torch.equal(dequantize_gptq(packed, 4, 8), dequantize(codes, scales, grid))


def test_awq_with_any_zeros_is_dequantized() -> None:
    rng = torch.Generator().manual_seed(0)
    fields = torch.randint(0, 16, (96, 24), generator=rng)
    zeros = torch.randint(0, 16, (3, 24), generator=rng)
    scales = torch.rand(3, 24, generator=rng).half()

    def pack(values: Tensor) -> Tensor:
        nibbles = values.view(values.shape[0], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return pack_fields(nibbles.flatten(1).T, 4).T.contiguous()

    got = dequantize_awq(pack(fields), pack(zeros), scales, 32)

    expected = (fields - zeros.repeat_interleave(32, 0)) * scales.repeat_interleave(32, 0).double()
    assert torch.equal(got.double(), expected.T)
    with pytest.raises(ShapeError, match="fc1"):
        dequantize_awq(pack(fields), pack(zeros)[:1], scales, 32, name="fc1")
    with pytest.raises(ShapeError, match="fc1"):
        dequantize_awq(pack(fields), pack(zeros), scales, 64, name="fc1")


@pytest.fixture(scope="module")
def gptq_linear() -> Callable[..., nn.Module]:
    """Make gptqmodel's TorchLinear (bits, groups of 32) holding the given v1 or v2 tensors."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    library = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    conversion = pytest.importorskip("gptqmodel.utils.model")

    def make(tensors: dict[str, Tensor], bits: int, *, v2: bool = False) -> nn.Module:
        module = library.TorchLinear(
            bits=bits,
            group_size=32,
            sym=True,
            desc_act=False,
            in_features=tensors["g_idx"].numel(),
            out_features=tensors["scales"].shape[1],
            register_buffers=True,
        )
        module.load_state_dict(tensors, strict=True)
        if not v2:  # what its loader does after reading a checkpoint in format "gptq"
            conversion.convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
        return module.eval()

    return make


@pytest.mark.parity
@pytest.mark.parametrize("bits", BITS)
def test_gptqmodel_reads_our_layers(bits: int, gptq_linear: Callable[..., nn.Module]) -> None:
    grid = Grid(bits, 32)
    codes, scales = layer(grid, 64, 96)
    weight = dequantize(codes, scales, grid)
    module = gptq_linear(pack_gptq(codes, scales, grid), bits)

    # It multiplies in the dtype of the scales: one fp16 rounding of the exact product, ...
    assert torch.equal(module.dequantize_weight().T, weight.half())
    identity = torch.eye(96).half()  # its product is exact in any order of summation
    assert torch.equal(module(identity).T, weight.half())
    module.scales = module.scales.float()  # ... and none in fp32
    assert torch.equal(module.dequantize_weight().T, weight)
    assert torch.equal(module.train().dequantize_weight().T, weight)  # another code path


@pytest.mark.parity
@pytest.mark.parametrize("bits", BITS)
def test_gptqmodel_packs_the_same_words(bits: int, gptq_linear: Callable[..., nn.Module]) -> None:
    grid = Grid(bits, 32)
    codes, scales = layer(grid, 64, 96)
    ours = pack_gptq(codes, scales, grid)
    module = gptq_linear({k: torch.zeros_like(x) for k, x in ours.items()}, bits, v2=True)
    linear = nn.Linear(96, 64, bias=False)
    linear.weight.data = dequantize(codes, scales, grid)
    zeros = torch.full_like(scales, -grid.qmin)

    module.pack_original(linear, scales, zeros, ours["g_idx"].clone())

    assert torch.equal(module.qweight, ours["qweight"])
    assert torch.equal(module.scales, ours["scales"])
    assert torch.equal(module.g_idx, ours["g_idx"])
    v1 = gptq_linear(ours, bits)
    assert torch.equal(module.qzeros, v1.qzeros)  # its packer writes v2


@pytest.mark.parity
@pytest.mark.parametrize("zeros", ["any", "all ones"])  # all ones + 1 carries or wraps
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_gptqmodel_reads_asymmetric_layers_as_we_do(
    bits: int, v2: bool, zeros: str, gptq_linear: Callable[..., nn.Module]
) -> None:
    tensors, _ = asymmetric(bits, v2=True)
    if zeros == "all ones":
        tensors["qzeros"] = torch.full_like(tensors["qzeros"], -1)
    module = gptq_linear(tensors, bits, v2=v2)
    module.scales = module.scales.float()
    assert torch.equal(module.dequantize_weight().T, dequantize_gptq(tensors, bits, 32, v2=v2))


@pytest.mark.parity
def test_gptqmodel_reads_and_packs_awq_as_we_do() -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    library = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq")
    grid = Grid(4, 32)
    codes, scales = layer(grid, 64, 96)
    weight, ours = dequantize(codes, scales, grid), pack_awq(codes, scales, grid)
    sizes = {"bits": 4, "group_size": 32, "in_features": 96, "out_features": 64}
    module = library.AwqTorchLinear(**sizes, sym=True, desc_act=False, register_buffers=True)
    module.load_state_dict(ours, strict=True)
    module.eval()

    identity = torch.eye(96).half()  # its product is exact in any order of summation
    assert torch.equal(module(identity).T, weight.half())

    linear = nn.Linear(96, 64, bias=False)
    linear.weight.data = weight
    module.pack(linear, scales.half(), torch.full_like(scales, 8))
    assert torch.equal(module.qweight, ours["qweight"])
    assert torch.equal(module.qzeros, ours["qzeros"])
    rng = torch.Generator().manual_seed(0)
    ours["qzeros"] = torch.randint(-(2**31), 2**31, (3, 8), generator=rng).int()
    theirs = library.dequantize_gemm(**{**ours, "scales": scales.T}, bits=4, group_size=32)
    assert torch.equal(theirs.T, dequantize_awq(**ours, group_size=32))
