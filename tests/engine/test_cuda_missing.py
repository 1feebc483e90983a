"""What a machine lacks for the kernels is found before anything is loaded or compiled."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qatbench.engine import cuda
from qatbench.errors import PrerequisiteError

ARCHITECTURES = [75, 80, 90, 120]  # of compute capability 7.5 to 12.0


def gone() -> Any:
    raise RuntimeError("Failure finding libnvrtc.so")  # as cuda.pathfinder puts it


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with every part, which nothing is compiled on."""
    found = SimpleNamespace(
        nvrtcVersion=lambda: (0, 13, 2), nvrtcGetSupportedArchs=lambda: (0, ARCHITECTURES)
    )
    monkeypatch.setattr(cuda, "_binding", lambda name: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device}")
    return found


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_devices_that_the_kernels_run_on(
    nvrtc: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", {"cuda:1": capability}.get)
    cuda.check("cuda:1")


@pytest.mark.parametrize("capability", [(7, 5), (8, 9), (12, 1)])
def test_devices_that_are_too_old_or_too_new(
    nvrtc: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", {"cuda:1": capability}.get)
    with pytest.raises(PrerequisiteError, match=r"8\.0 to 12\.0, which NVRTC 13\.2 know") as error:
        cuda.check("cuda:1")
    assert error.value.message.endswith("card cuda:1 has {}.{}".format(*capability))
    assert error.value.hint == "--engine transformers"


def test_nvrtc_that_is_not_there(nvrtc: SimpleNamespace) -> None:
    nvrtc.nvrtcVersion = gone
    with pytest.raises(PrerequisiteError, match=r"need NVRTC: Failure finding libnvrtc\.so"):
        cuda.check("cuda")


@pytest.mark.parametrize("part", ["driver", "nvrtc"])
def test_bindings_that_are_not_there(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda._binding.cache_clear()
    for name in ("driver", "nvrtc"):
        there = None if name == part else SimpleNamespace()  # None: importing it fails
        monkeypatch.setitem(sys.modules, f"cuda.bindings.{name}", there)
    with pytest.raises(PrerequisiteError, match=rf"need cuda\.bindings\.{part}: ") as error:
        cuda.check("cuda")
    assert str(error.value.hint).startswith("pip install cuda-bindings")
    cuda._binding.cache_clear()


def test_the_nvrtc_of_this_machine_names_its_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        cuda._version(cuda._binding("nvrtc"))
    except PrerequisiteError as error:
        pytest.skip(error.message)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda.check("cuda")
