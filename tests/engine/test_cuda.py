"""What NVRTC does not compile is told, and what it compiled is kept: the cache of machine code."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from machine_code import needs_nvrtc

from qatbench.engine import cuda
from qatbench.engine.products import LOGITS, STORE
from qatbench.errors import PrerequisiteError

AMPERE, HOPPER = (8, 0), (9, 0)


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the sources that a test may spoil."""
    folder = Path(shutil.copytree(cuda.SOURCES, tmp_path / "sources"))
    monkeypatch.setattr(cuda, "SOURCES", folder)
    return folder


@needs_nvrtc
def test_a_wrong_source_is_told_in_the_compilers_words(sources: Path, cache: Path) -> None:
    (sources / "wrong.cu").write_text('extern "C" __global__ void f() { nonsense(); }\n')
    with pytest.raises(PrerequisiteError, match=r"NVRTC does not compile wrong.cu with -DA=1") as e:
        cuda.binary("wrong.cu", {"A": 1}, AMPERE)
    assert 'wrong.cu(1): error: identifier "nonsense" is undefined' in str(e.value)
    assert "\0" not in str(e.value)  # NVRTC's log ends with one
    assert e.value.hint == "--engine transformers"
    assert not list(cache.glob("*"))


def test_without_nvrtc_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Any:
        raise RuntimeError("Failure finding libnvrtc.so")  # as cuda.pathfinder puts it

    monkeypatch.setattr(cuda, "_binding", lambda name: SimpleNamespace(nvrtcVersion=gone))
    with pytest.raises(PrerequisiteError, match=r"NVRTC.*Failure finding libnvrtc\.so") as error:
        cuda.binary("small.cu", {}, AMPERE)
    assert "torch" in str(error.value.hint)


def test_without_bindings_the_error_says_what_to_install() -> None:
    with pytest.raises(PrerequisiteError, match=r"need cuda\.bindings\.no_such_part") as error:
        cuda._binding("no_such_part")
    assert str(error.value.hint).startswith("pip install cuda-bindings")


@needs_nvrtc
def test_what_was_compiled_is_read_the_second_time(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = cuda.binary("small.cu", {"EPILOGUE": STORE}, AMPERE)
    (file,) = cache.glob("small-*.cubin")
    assert file.read_bytes() == image
    compiled: list[str] = []

    def compile_again(nvrtc: Any, source: str, *rest: Any) -> bytes:
        compiled.append(source)
        return b"anew"

    monkeypatch.setattr(cuda, "_compiled", compile_again)
    assert cuda.binary("small.cu", {"EPILOGUE": STORE}, AMPERE) == image
    assert not compiled
    others: list[tuple[dict[str, int], tuple[int, int]]] = [
        ({"EPILOGUE": LOGITS}, AMPERE), ({"EPILOGUE": STORE}, HOPPER), ({}, AMPERE),
    ]  # fmt: skip
    for defines, card in others:
        assert cuda.binary("small.cu", defines, card) == b"anew"
    for changed in ("small.cu", "common.cuh"):  # and what it includes
        (sources / changed).write_bytes((sources / changed).read_bytes() + b"\n")
        assert cuda.binary("small.cu", {"EPILOGUE": STORE}, AMPERE) == b"anew"
    assert len(compiled) == 5
    assert len(list(cache.glob("*"))) == 6


@needs_nvrtc
def test_a_torn_write_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            cuda.binary("small.cu", {}, AMPERE)
        assert not list(cache.glob("*"))
    image = cuda.binary("small.cu", {}, AMPERE)
    assert [file.read_bytes() for file in cache.glob("*")] == [image]


@needs_nvrtc
def test_a_digest_is_of_a_source_with_what_it_includes(sources: Path) -> None:
    before = cuda.digest("linear.cu")
    assert len(before) == 8
    assert before != cuda.digest("attention.cu")
    common = sources / "common.cuh"
    common.write_bytes(common.read_bytes() + b"\n")
    assert cuda.digest("linear.cu") != before
