"""The CUDA sources compile, for both kinds of card, without a card; the cache of what they become.

NVRTC needs no GPU. What is compiled covers every pair of what a kernel can be built for, not all
combinations; which of them are right is for a GPU to say (test_fused.py).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from machine_code import FRAME, REGISTERS, attribute

from qatbench.engine import cuda
from qatbench.engine.fused import Step
from qatbench.engine.products import LIBRARY, LOGITS, RESIDUAL, STORE, SWIGLU, Form, Product
from qatbench.engine.weights import Packed
from qatbench.errors import PrerequisiteError

AMPERE, HOPPER = (8, 0), (9, 0)
MOST_STACK = 64  # bytes a thread, which spilled registers would take
MEASURED = Path(__file__).resolve().parents[2] / "results" / "engine" / "llava.json"
Case = tuple[str, dict[str, int], tuple[int, int]]  # source, defines, compute capability


def _missing() -> str:
    try:
        cuda._done(cuda._binding("nvrtc").nvrtcVersion())
    except (PrerequisiteError, RuntimeError) as error:  # no bindings; bindings without the library
        return f"NVRTC is not here: {error}"
    return ""


without = _missing()
needs_nvrtc = pytest.mark.skipif(bool(without), reason=without or "NVRTC is here")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache for each test; where the kernels lie in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qatbench" / "kernels"


# --- what a kernel takes of a thread's stack, read from its machine code --------------------------


@needs_nvrtc
@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
def test_stack_and_registers_are_read_from_machine_code(capability: tuple[int, int]) -> None:
    code = b"""extern "C" __global__ void f(int* p, int n) {
        int on_stack[100];
        for (int i = 0; i < n; ++i) on_stack[p[i]] = i;
        p[0] = on_stack[p[n]];
    }"""
    options = ["--gpu-architecture=sm_{}{}".format(*capability)]
    image = cuda._compiled(cuda._binding("nvrtc"), "f.cu", code, b"", options)
    assert max(attribute(image, FRAME)) == 400
    assert 8 <= max(attribute(image, REGISTERS)) <= 255


# --- everything compiles --------------------------------------------------------------------------

GROUPS = (32, 64, 128)
WEIGHTS = [(4, group, zeros) for group in GROUPS for zeros in (False, True)] + [(16, 0, False)]
COLUMNS = (1, 3, 12, 20, 64)
EPILOGUES = (STORE, RESIDUAL, SWIGLU, LOGITS)


def product(bits: int, group: int, zeros: bool, epilogue: int) -> Product:
    """Of a 7B model's sizes; only shapes matter."""
    rows, width = 4096, 4096
    empty = torch.empty(0)
    if bits == 16:
        return Product(torch.empty(rows, width, device="meta"), epilogue)
    packed = Packed(empty, empty, empty if zeros else None, rows, width, group)
    return Product(packed, epilogue)


def room(form: Form) -> int:
    """Registers a thread may have, less those that hold what is on its way: a rank of forms."""
    return 65536 // (form.warps * 32 * form.blocks) - 12 * form.tiles * form.depth


def linear_cases(roomiest: bool) -> list[Case]:
    """Each weight with each number of columns, epilogues in turn: every pair; both cards.

    Of all forms the one with most registers to spare, or with fewest.
    """
    cases: list[Case] = []
    for i, weight in enumerate(WEIGHTS):
        for j, columns in enumerate(COLUMNS):
            p = product(*weight, EPILOGUES[(i + j) % 4])
            forms = sorted((f for f in p.forms(columns) if f != LIBRARY), key=room)
            card = HOPPER if (i + j + roomiest) % 2 else AMPERE
            cases.append(("linear.cu", p._defines(forms[-roomiest], columns), card))
    return cases


def chosen_cases() -> Iterator[Case]:
    """The forms that were the fastest on an H200, as the committed benchmark has them."""
    (model,) = json.loads(MEASURED.read_text(encoding="utf-8"))["models"]
    for row in itertools.chain.from_iterable(itertools.chain(*model["linears"].values())):
        weight = (4, 128, False) if row["kind"].startswith("int4 g128 ") else (16, 0, False)
        epilogue, columns = map(int, re.findall(r"epilogue (\d) columns (\d+)$", row["kind"])[0])
        form = Form(**row["form"])
        if form != LIBRARY:
            yield "linear.cu", product(*weight, epilogue)._defines(form, columns), HOPPER


def attention_defines(
    monkeypatch: pytest.MonkeyPatch, head: int, group: int, splits: int, norms: bool
) -> dict[str, int]:
    """What a step asks for."""
    asked: list[dict[str, int]] = []

    def kernel(source: str, name: str, **defines: int) -> Any:
        assert (source, name) == ("attention.cu", "attention")
        asked.append(defines)
        return lambda *arguments: None

    monkeypatch.setattr(cuda, "kernel", kernel)
    sizes = SimpleNamespace(group=group, head=head, kv_heads=4, eps=1e-6)
    cache = SimpleNamespace(
        keys=[None], values=[None], filled=None, start=None, turned=None, length=8
    )
    step: Any = SimpleNamespace(
        fused=SimpleNamespace(decoder=SimpleNamespace(sizes=sizes)), cache=cache, splits=splits,
        token=[0], qkv=None, rope=None, seen=None,
    )  # fmt: skip
    norm = torch.ones(head) if norms else None
    layer: Any = SimpleNamespace(q_norm=norm, k_norm=norm)
    Step._attend(step, 0, layer)
    return asked[0]


def attention_cases(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Every group at one head size, the least and the most at all; clusters from 9.0 on."""
    heads = (64, 128, 256)
    pairs = {(heads[group % 3], group) for group in range(1, 9)}
    pairs |= {(head, group) for head in heads for group in (1, 8)}
    cases: list[Case] = []
    for i, (head, group) in enumerate(sorted(pairs)):
        splits = (1, 2, 4, 8)[i % 4]
        card = HOPPER if splits > 1 or i % 8 else AMPERE
        defines = attention_defines(monkeypatch, head, group, splits, norms=bool(i % 2))
        cases.append(("attention.cu", defines, card))
        if group == 8:  # most registers: the other card and the other kind of head too
            defines = attention_defines(monkeypatch, head, group, 1, norms=not i % 2)
            cases.append(("attention.cu", defines, AMPERE))
    return cases


def small_cases() -> list[Case]:
    wanted: list[dict[str, int]] = [{}]  # embed, choose
    wanted += [{"EPILOGUE": epilogue} for epilogue in EPILOGUES]
    wanted += [{"GROUP": group, "ZEROS": zeros} for group in GROUPS for zeros in (0, 1)]
    return [("small.cu", defines, card) for defines in wanted for card in (AMPERE, HOPPER)]


def compile_all(cases: Iterable[Case]) -> dict[str, bytes]:
    """Side by side: NVRTC lets other threads run."""
    cases = list(cases)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = pool.map(lambda case: cuda.binary(*case), cases)
        return {str(case): image for case, image in zip(cases, images, strict=True)}


def check(images: dict[str, bytes], *names: str) -> None:
    for case, image in images.items():
        assert image[:4] == b"\x7fELF", case
        assert all(name.encode() in image for name in names), case
        assert attribute(image, FRAME), case


@needs_nvrtc
def test_linear_compiles_for_every_weight_epilogue_and_batch() -> None:
    for roomiest in (True, False):
        cases = linear_cases(roomiest)
        assert len(cases) == len(WEIGHTS) * len(COLUMNS)
        images = compile_all(cases)
        check(images, "linear")
        # Forms without room may spill: they are measured, and lose. Beyond 32 columns all do.
        for (_, defines, _), (case, image) in zip(cases, images.items(), strict=True):
            if roomiest and defines["NT"] <= 4:
                assert max(attribute(image, FRAME)) <= MOST_STACK, case


@needs_nvrtc
@pytest.mark.skipif(not MEASURED.is_file(), reason="results/ is not in this copy")
def test_the_forms_that_were_fastest_on_an_h200_take_little_stack() -> None:
    images = compile_all(chosen_cases())
    assert len(images) >= 10
    check(images, "linear")
    stacks = {case: max(attribute(image, FRAME)) for case, image in images.items()}
    assert max(stacks.values()) <= MOST_STACK, stacks


@needs_nvrtc
def test_attention_compiles_for_every_head_and_group(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = attention_cases(monkeypatch)
    for key, most in (("D", 3), ("G", 8), ("SPLITS", 4), ("HEADNORM", 2), ("WARPS", 2)):
        assert len({defines[key] for _, defines, _ in cases}) == most, key
    images = compile_all(cases)
    check(images, "attention")
    assert max(max(attribute(image, FRAME)) for image in images.values()) <= MOST_STACK


@needs_nvrtc
def test_small_kernels_compile() -> None:
    images = compile_all(small_cases())
    check(images, "embed", "choose")
    for case, image in images.items():
        assert (b"dequantize" in image) == ("GROUP" in case)
        assert (b"after" in image) == ("EPILOGUE" in case)


# --- what goes wrong, and the cache ---------------------------------------------------------------


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
    for changed in ("small.cu", cuda.COMMON):  # and what it includes
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
    common = sources / cuda.COMMON
    common.write_bytes(common.read_bytes() + b"\n")
    assert cuda.digest("linear.cu") != before
