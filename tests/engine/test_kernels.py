"""The CUDA sources compile, for both kinds of card, without a card, and fit it.

NVRTC needs no GPU. What is compiled covers every pair of what a kernel can be built for, not all
combinations; which of them are right is for a GPU to say (test_fused.py).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from machine_code import FRAME, REGISTERS, attribute, needs_nvrtc

from qatbench.engine import cuda
from qatbench.engine.attention import Attention, attentions
from qatbench.engine.form import LIBRARY, Card, Form
from qatbench.engine.products import LOGITS, RESIDUAL, SCREEN, STORE, SWIGLU, Product
from qatbench.engine.step import Step
from qatbench.engine.weights import Packed

AMPERE, SMALL, HOPPER = (8, 0), (8, 9), (9, 0)
CARDS = {
    AMPERE: Card(108, 164 << 10, False), SMALL: Card(34, 100 << 10, False),
    HOPPER: Card(132, 228 << 10),
}  # fmt: skip
SYSTEM = 1 << 10  # bytes of shared memory a block that CUDA takes
MOST_STACK = 64  # bytes a thread, which spilled registers would take
MEASURED = Path(__file__).resolve().parents[2] / "results" / "engine" / "llava.json"
Case = tuple[str, dict[str, int], tuple[int, int]]  # source, defines, compute capability


pytestmark = pytest.mark.usefixtures("cache")


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
    image = cuda._compiled(cuda._binding("nvrtc"), "f.cu", code, {}, options)
    assert max(attribute(image, FRAME)) == 400
    assert 8 <= max(attribute(image, REGISTERS)) <= 255


def static_shared(image: bytes, name: str, card: tuple[int, int]) -> int:
    """Bytes of shared memory that a kernel asks for itself: the size of a section of the ELF."""
    (start,) = struct.unpack_from("<Q", image, 0x28)
    size, count, names = struct.unpack_from("<HHH", image, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", image, start + i * size) for i in range(count)]
    wanted, texts = f".nv.shared.{name}\0".encode(), sections[names][4]
    (found,) = (s[5] for s in sections if image[texts + s[0] :].startswith(wanted))
    return int(found) - (SYSTEM if card == HOPPER else 0)  # there the section has it too


# --- everything compiles --------------------------------------------------------------------------

GROUPS = (32, 64, 128)
WEIGHTS = [(4, group, zeros) for group in GROUPS for zeros in (False, True)] + [(16, 0, False)]
COLUMNS = (1, 3, 12, 20, 64)
EPILOGUES = (STORE, RESIDUAL, SWIGLU, LOGITS)
SIZES = [(4096, 11008), (22016, 4096), (152064, 3584)]  # of 7B models; the last one's head


def product(
    bits: int, group: int, zeros: bool, epilogue: int, alone: bool = True,
    rows: int = 4096, width: int = 4096,
) -> Product:  # fmt: skip
    """Only shapes matter."""
    empty = torch.empty(0)
    weight: Any = torch.empty(rows, width, device="meta")
    if bits < 16:
        weight = Packed(empty, empty, empty if zeros else None, rows, width, group, bits=bits)
    return Product(weight, epilogue, None, alone)


def own_forms(p: Product, columns: int, card: tuple[int, int]) -> list[Form]:
    return [form for form in p.forms(columns, CARDS[card]) if form != LIBRARY]


def own_shared(defines: dict[str, int]) -> int:
    """Bytes of `factors`, or `gifts`, up to the multiple of 128 where dynamic memory begins."""
    if defines["KEPT"]:
        return 128 if defines["SPLITS"] > 1 else 0
    return max(128, 32 * defines["NT"])


def room(form: Form) -> int:
    """Registers a thread may have, less those that hold sums and words: a rank of forms."""
    return min(255, 65536 // (form.warps * 32 * form.blocks)) - form.tiles * form.span // 8


def linear_cases(roomiest: bool, kept: bool) -> list[Case]:
    """Each weight with each number of columns, epilogues in turn: every pair; both cards.

    Of all forms, that keep inputs or do not, the one with most registers to spare, or with fewest.
    """
    cases: list[Case] = []
    for i, weight in enumerate(WEIGHTS):
        for j, columns in enumerate(COLUMNS):
            card = HOPPER if (i + j + roomiest) % 2 else AMPERE
            p = product(*weight, EPILOGUES[(i + j) % 4])
            forms = [form for form in own_forms(p, columns, card) if bool(form.kept) == kept]
            if forms:
                taken = {form: p._registers(form, columns) * kept for form in forms}
                form = sorted(forms, key=lambda form: room(form) - taken[form])[-roomiest]
                cases.append((form.source, p._defines(form, columns), card))
    return cases


def chosen_cases() -> Iterator[Case]:
    """The forms that were the fastest on an H200, as the committed benchmark has them."""
    (model,) = json.loads(MEASURED.read_text(encoding="utf-8"))["models"]
    for row in itertools.chain.from_iterable(itertools.chain(*model["linears"].values())):
        if "span" not in row["form"]:
            pytest.skip(f"{MEASURED.name} has forms of kernels that are no more: measure them anew")
        kind = re.fullmatch(r"(?:int(\d) g128 )?\d+x\d+ epilogue (\d) columns (\d+)", row["kind"])
        assert kind, row["kind"]
        weight = (int(kind[1]), 128, False) if kind[1] else (16, 0, False)
        form, epilogue, columns = Form(**row["form"]), int(kind[2]), int(kind[3])
        if form != LIBRARY:
            yield form.source, product(*weight, epilogue)._defines(form, columns), HOPPER


def attention_cases(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Case, int]]:
    """Each head size with each group, and the bytes of dynamic shared memory asked for.

    Heads a block, forms, batches and cards in turn; of heads of 128 the whole group, of 8 all.
    """
    monkeypatch.setattr(cuda, "kernel", lambda *names, **asked: asked)
    turn = itertools.count()
    for head, group in itertools.product((64, 128, 256), range(1, 9)):
        sizes = SimpleNamespace(group=group, head=head, kv_heads=4)
        step: Any = object.__new__(Step)
        step.fused = SimpleNamespace(decoder=SimpleNamespace(sizes=sizes))
        card = (AMPERE, HOPPER, HOPPER)[(head // 64 + group) % 3]
        monkeypatch.setattr(Card, "current", lambda card=card: CARDS[card])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card=card: card)
        forms = attentions(step.fused, (1, 16, 40, 64)[(head // 64 + group) % 4])
        forms = [form for form in forms if not form.warps]
        by_heads = itertools.groupby(forms, key=lambda form: form.heads)
        every: list[list[Attention]] = [list(alike) for _, alike in by_heads]
        heads = -1 if head == 128 else (head // 64 + group) % len(every)
        for some, one in zip(every if group == 8 else [every[heads]], turn, strict=False):
            asked: Any = step.attention_kernel(some[one % len(some)], bool(one % 2))
            shared = asked.pop("shared")
            yield ("attention.cu", asked, card), shared


def grouped_cases() -> Iterator[tuple[Case, int]]:
    """Each head size with each group of more than one, forms and cards in turn."""
    turn = itertools.count()
    for head, group in itertools.product((64, 128, 256), (*range(2, 9), 12)):
        for card in (HOPPER, AMPERE):
            sizes = SimpleNamespace(group=group, head=head, kv_heads=4)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Card, "current", lambda card=card: CARDS[card])
                patch.setattr(torch.cuda, "get_device_capability", lambda card=card: card)
                fused: Any = SimpleNamespace(decoder=SimpleNamespace(sizes=sizes))
                some = [form for form in attentions(fused, 1) if form.warps]
            form = some[5 * next(turn) % len(some)]
            defines = form.defines(group, head, bool(group % 2))
            yield (form.source[0], defines, card), form.shared(head)


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
@pytest.mark.parametrize("kept", [False, True], ids=["read", "kept"])
@pytest.mark.parametrize("roomiest", [True, False])
def test_linear_compiles_for_every_weight_epilogue_and_batch(roomiest: bool, kept: bool) -> None:
    cases = linear_cases(roomiest, kept)
    most = len(WEIGHTS) * len(COLUMNS)
    assert len(cases) == most or (kept and most > len(cases) > most / 2)
    images = compile_all(cases)
    check(images, "linear")
    # Forms without room may spill: they are not taken. Beyond 32 columns, or 8, all do.
    for (_, defines, card), (case, image) in zip(cases, images.items(), strict=True):
        assert static_shared(image, "linear", card) == own_shared(defines), case
        if roomiest and defines["NT"] <= (1 if kept else 4):
            assert max(attribute(image, FRAME)) <= MOST_STACK, case


@needs_nvrtc
def test_screens_compile() -> None:
    cases: list[Case] = []
    for group, card in ((128, HOPPER), (64, AMPERE), (32, HOPPER)):
        p = product(8, group, False, SCREEN, rows=32064)
        forms = own_forms(p, 1, card)
        assert len(forms) >= 8
        kept = [form for form in forms if form.kept]
        some = [form for form in forms if not form.kept] + kept[::4]
        cases += [(form.source, p._defines(form, 1), card) for form in some]
    images = compile_all(cases)
    check(images, "linear")
    stacks = [max(attribute(image, FRAME)) for image in images.values()]
    assert 3 * stacks.count(0) >= 2 * len(stacks)


@needs_nvrtc
@pytest.mark.parametrize("columns", [1, 8])
def test_registers_suffice_for_a_third_of_all_forms(columns: int) -> None:
    """What spills is left out by `forms.py`: enough to choose from has to be left."""
    for weight, card in (((4, 128, False), HOPPER), ((16, 0, False), AMPERE)):
        p = product(*weight, RESIDUAL)
        forms = {replace(form, depth=0): form for form in own_forms(p, columns, card)}
        cases = [(form.source, p._defines(form, columns), card) for form in forms.values()]
        stacks = [max(attribute(image, FRAME)) for image in compile_all(cases).values()]
        assert len(stacks) == len(cases) >= 10
        assert 3 * stacks.count(0) >= len(stacks), (weight, stacks)


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
    cases, shared = zip(*attention_cases(monkeypatch), strict=True)
    for key, most in (
        ("D", 3), ("G", 8), ("HEADS", 8), ("SPLITS", 4), ("HEADNORM", 2), ("WARPS", 2),
        ("UNROLL", 3), ("STAGED", 3), ("BLOCKS", 4),
    ):  # fmt: skip
        assert len({defines[key] for _, defines, _ in cases}) == most, key
    assert {defines["SPLITS"] for _, defines, card in cases if card == AMPERE} == {1}
    images = compile_all(cases)
    check(images, "attention")
    for (_, d, card), dynamic, (case, image) in zip(cases, shared, images.items(), strict=True):
        assert dynamic == 2 * 16 * d["STAGED"] * d["WARPS"] * 32, case  # a key, a value a lane
        taken = dynamic + static_shared(image, "attention", card) + SYSTEM
        assert taken * (d["BLOCKS"] if card == HOPPER else 1) <= CARDS[card].shared, case
    # Some of those that shall share a multiprocessor spill, and are not taken.
    stacks = [max(attribute(image, FRAME)) for image in images.values()]
    by_blocks = list(zip((d["BLOCKS"] for _, d, _ in cases), stacks, strict=True))
    assert max(stack for blocks, stack in by_blocks if blocks == 1) <= MOST_STACK, by_blocks
    assert 2 * stacks.count(0) >= len(stacks), by_blocks


@needs_nvrtc
def test_grouped_attention_compiles_for_every_head_and_group() -> None:
    cases, shared = zip(*grouped_cases(), strict=True)
    for key, most in (
        ("D", 3), ("G", 7), ("HEADS", 8), ("HEADNORM", 2), ("WARPS", 2), ("STAGED", 2),
        ("BLOCKS", 2), ("SPLITS", 3),
    ):  # fmt: skip
        assert len({defines[key] for _, defines, _ in cases}) == most, key
    images = compile_all(cases)
    check(images, "grouped")
    stacks = []
    for (_, d, card), dynamic, (case, image) in zip(cases, shared, images.items(), strict=True):
        assert dynamic == d["STAGED"] * d["WARPS"] * 16 * 2 * 2 * d["D"], case  # keys and values
        taken = dynamic + static_shared(image, "grouped", card) + SYSTEM
        assert taken * d["BLOCKS"] <= CARDS[card].shared, case
        stacks.append(max(attribute(image, FRAME)))
    assert max(stacks) <= MOST_STACK, stacks


@needs_nvrtc
def test_small_kernels_compile() -> None:
    images = compile_all(small_cases())
    check(images, "embed", "choose", "decide")
    for case, image in images.items():
        assert (b"dequantize" in image) == ("GROUP" in case)
        assert (b"after" in image) == ("EPILOGUE" in case)


# --- shared memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("card", list(CARDS))
def test_every_form_fits_and_two_kernels_share_a_multiprocessor(card: tuple[int, int]) -> None:
    most, twos = CARDS[card].shared, {True: set[int](), False: set[int]()}
    for weight, columns, (rows, width), alone in itertools.product(
        WEIGHTS, COLUMNS, SIZES, (True, False)
    ):
        p = product(*weight, SWIGLU, alone, rows, width)
        forms = own_forms(p, columns, card)
        assert {form.blocks for form in forms} == {1, 2} or card == SMALL
        for form in forms:
            shared = p.shared(form, columns, CARDS[card])
            assert p._taken(form, columns, CARDS[card]) <= shared
            taken = shared + own_shared(p._defines(form, columns)) + SYSTEM
            assert taken <= most, form
            if form.blocks == 2:
                twos[alone].add(taken)
            assert p._round(form, columns, CARDS[card]) <= form.warps * 32  # a thread a unit
    assert max(twos[True]) + max(twos[False]) <= most
    assert 2 * min(twos[True]) > most


LAID_OUT = {
    "linear.cu": """Slot* ring = (Slot*)memory; Sums* sums = (Sums*)(ring + WARPS * DEPTH);
u32* shared_by = (u32*)(sums + round + WARPS); ... #if SINGLE
uint4* staged = (uint4*)(shared_by + (round + 3) / 4 * 4);
float2* groups = (float2*)(staged + W.K / 16 * BYTES_OF_X);""",
    "kept.cu": """Slot* ring = (Slot*)memory; Sums* sums = (Sums*)(ring + WARPS * DEPTH);
 ... keep(kept, x, sums + rounds * own * SHARERS, ... #if SINGLE && DIGITS
 ... float2* groups = (float2*)((uint4*)staged + K / 16 * BYTES_OF_X)""",
}


def laid_out(p: Product, form: Form, columns: int) -> str:
    """Bytes of a block's shared memory as the kernels lay it out, in their own terms."""
    units, groups = p._round(form, columns, CARDS[HOPPER]), 0
    if isinstance(p.weight, Packed):
        groups = p.width // p.weight.group
    ring = f"{form.warps * form.depth} * sizeof(Slot)"
    x = f"({p.width} * BYTES_OF_X + {groups} * sizeof(float2))"
    if not form.kept:
        sums = f"{units + form.warps} * sizeof(Sums) + {(units + 3) // 4 * 4} * sizeof(u32)"
        return f"{ring} + {sums} + SINGLE * {x}"
    rounds = 1 if units == p._each(form, CARDS[HOPPER]) else 2
    own, sharers = -(-units // form.splits), form.splits * form.warps
    return f"{ring} + {rounds * own * sharers} * sizeof(Sums) + (SINGLE && DIGITS) * {x}"


@needs_nvrtc
@pytest.mark.parametrize("source", list(LAID_OUT))
def test_bytes_of_shared_memory_are_the_kernels_own(source: str) -> None:
    """The compiler adds up what the kernel lays out; the card is Hopper."""
    text = (cuda.SOURCES / source).read_text(encoding="utf-8")
    for passage in LAID_OUT[source].split(" ... "):
        assert " ".join(passage.split()) in " ".join(text.split())
    asserted: dict[str, list[str]] = {}
    both = [*itertools.product(WEIGHTS, COLUMNS), ((8, 128, False), 1), ((8, 32, False), 1)]
    for weight, columns in both:
        p = product(*weight, STORE, rows=22016)
        for form in own_forms(p, columns, HOPPER):
            if form.source != source:
                continue
            defines = p._defines(form, columns) | {"DEPTH": 2, "BLOCKS": 1}
            defines |= {} if form.kept else {"WARPS": 8}
            asserted.setdefault(" ".join(f"-D{k}={v}" for k, v in defines.items()), []).append(
                f"static_assert({laid_out(p, form, columns)} == "
                f'{p._taken(form, columns, CARDS[HOPPER])}, "{form}");'
            )
    nvrtc, common = cuda._binding("nvrtc"), cuda.headers()

    def compiled(options: str) -> bytes:
        code = "\n".join([text.partition('extern "C"')[0], *asserted[options]]).encode()
        target = [*options.split(), "--gpu-architecture=sm_90", "-std=c++17"]
        return cuda._compiled(nvrtc, source, code, common, target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert all(pool.map(compiled, asserted))
