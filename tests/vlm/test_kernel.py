"""Which kernel an evaluation takes where nobody said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qatbench.vlm import kernel
from qatbench.vlm.kernel import pick_kernel
from qatbench.vlm.load import ModelFolder

GB = 10**9
FP32, BF16 = torch.float32, torch.bfloat16


class Folder(ModelFolder):
    def weight_bytes(self) -> int:
        return GB


def folder(bits: int | None) -> ModelFolder:
    config = {"quantization_config": {"bits": bits}} if bits else {}
    return Folder("m", Path("m"), config, {})


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_memory", lambda: 50 * GB)


@pytest.mark.parametrize(
    ("bits", "device", "dtype", "expected"),
    [
        (4, "cpu", FP32, "dense"),
        (4, "cpu", BF16, "library"),
        (4, "cuda", FP32, "library"),
        (4, "cuda:1", BF16, "library"),
        (8, "cpu", FP32, "library"),
        (8, "cuda", BF16, "library"),
        (3, "cpu", BF16, "dense"),
        (3, "cuda", FP32, "dense"),
        (2, "cuda", BF16, "dense"),
    ],
)
def test_nobody_said(bits: int, device: str, dtype: torch.dtype, expected: str) -> None:
    assert pick_kernel(folder(bits), device, dtype) == expected


def test_a_model_that_is_too_large_unpacked_stays_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for memory in (47, 49):
        monkeypatch.setattr(kernel, "_memory", lambda memory=memory: memory * GB)
        found.append((pick_kernel(folder(4), "cpu", FP32), pick_kernel(folder(3), "cpu", FP32)))
    assert found == [("library", "dense"), ("dense", "dense")]


def test_the_memory_of_this_machine_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 10**8 < kernel._memory() < 10**14
