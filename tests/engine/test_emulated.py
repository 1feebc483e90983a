"""The CUDA kernels themselves, thread by thread on a CPU, against torch: see `emulation.py`."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from fused_models import EPS, Case, affine, cases, dense, error, int4, loaded_of, prompts
from torch import Tensor

from qatbench.engine import cuda
from qatbench.engine.arguments import Row, Top, address
from qatbench.engine.attention import Attention, Later, attentions
from qatbench.engine.decoder import torch_step
from qatbench.engine.fast import FastRunner
from qatbench.engine.form import Card, Form
from qatbench.engine.fused import Fused
from qatbench.engine.products import LOGITS, RESIDUAL, STORE, SWIGLU, Product, dequantize
from qatbench.engine.screen import Screen, screen
from qatbench.engine.step import Step
from qatbench.engine.weights import Packed, pack
from qatbench.quant.packing import Affine

Break = Callable[[str, dict[str, str]], None]
pytestmark = pytest.mark.skipif(not emulation.COMPILER, reason="needs g++")


@dataclass
class Device:
    """What kernels run on here."""

    folder: Path
    late: list[Tensor] = field(default_factory=list)
    lazy: bool = True

    def kernel(self, source: str, name: str, *, shared: int = 0, **defines: int) -> Any:
        return emulation.kernel(
            source, name, folder=self.folder, shared=shared, lazy=self.lazy, late=self.late,
            **defines,
        )  # fmt: skip


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Device:
    """A device of three multiprocessors."""
    folder = tmp_path_factory.getbasetemp() / "emulated"
    folder.mkdir(exist_ok=True)
    made = Device(folder)
    monkeypatch.setattr(cuda, "kernel", made.kernel)
    monkeypatch.setattr(Card, "current", lambda: Card(3, 228 << 10))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *given: (9, 0))
    return made


def logits(
    device: Device, a: Affine, x: Tensor, form: Form, squares: Tensor | None = None
) -> Tensor:
    """W x, fp32, with squares of a norm's input divided by its root."""
    device.late = [part for part in (x, squares) if part is not None]
    out = torch.zeros(len(x), len(a.fields))
    Product(pack(a), LOGITS)(form, x, out, squares=squares, eps=EPS)
    return out


def check_products(device: Device, some: list[Case], forms: dict[int, Form]) -> None:
    """Each in the form of its epilogue, against fp64; they are compiled side by side."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda c: c.product.build(forms[c.product.epilogue], len(c.x)), some))
    for case in some:
        device.late = [part for part in (case.x, case.squares) if part is not None]
        got, after = case.multiply(forms[case.product.epilogue])
        assert error(got, case.want) < case.bound, case.product.kind(len(case.x))
        if case.product.epilogue == RESIDUAL:
            assert torch.equal(after.scaled, (got.float() * case.norm.float()).bfloat16())
            assert error(after.squares, got.double().square().sum(-1)) < 1e-6


@pytest.mark.parametrize("lazy", [True, False], ids=["late", "at once"])
@pytest.mark.parametrize(
    ("shape", "zeros", "columns", "bits"),
    [
        ((96, 512, 128), False, 1, 4), ((160, 256, 32), True, 1, 4), ((96, 384, 64), True, 3, 4),
        ((96, 512, 256), False, 9, 4), ((160, 256, 32), False, 1, 16),
        ((160, 256, 32), False, 9, 16),
    ],
    ids=str,
)  # fmt: skip
def test_products(
    device: Device, shape: tuple[int, int, int], zeros: bool, columns: int, bits: int, lazy: bool
) -> None:
    device.lazy, span = lazy, max(shape[2], 64) if bits == 4 else 64
    forms = {
        STORE: Form(8, 1, 2, 2, span, held_back=2), RESIDUAL: Form(12, 2, 3, 1, span, held_back=1),
        LOGITS: Form(16, 1, 2, 2, span, held_back=2 * lazy), SWIGLU: Form(8, 2, 2, 2, span, 2),
    }  # fmt: skip
    check_products(device, cases(*shape, zeros, columns, bits == 4, "cpu"), forms)


@pytest.mark.parametrize("lazy", [True, False], ids=["late", "at once"])
@pytest.mark.parametrize(
    ("shape", "zeros", "columns", "bits", "splits"),
    [
        ((96, 1024, 128), False, 8, 4, 1), ((160, 1024, 64), True, 3, 4, 2),
        ((96, 1024, 128), True, 9, 4, 1), ((160, 1024, 32), False, 5, 16, 2),
        ((96, 1024, 128), False, 1, 4, 2), ((160, 1152, 32), True, 1, 4, 1),
        ((160, 1152, 64), False, 1, 16, 1), ((96, 1152, 128), True, 6, 4, 2),
    ],
    ids=str,
)  # fmt: skip
def test_products_that_keep_the_input(
    device: Device,
    shape: tuple[int, int, int],
    zeros: bool,
    columns: int,
    bits: int,
    splits: int,
    lazy: bool,
) -> None:
    device.lazy, span = lazy, max(shape[2], 64) if bits == 4 else 64
    forms = {
        STORE: Form(8, 1, 2, 2, span, held_back=2), RESIDUAL: Form(8, 2, 3, 1, span, held_back=1),
        LOGITS: Form(16 * 64 // span, 1, 2, 2, span, -1), SWIGLU: Form(8, 2, 2, 2, span, 2),
    }  # fmt: skip
    for epilogue, form in forms.items():
        warps = max(4, form.warps // splits)
        kept = -(-(shape[1] // span) // (warps * splits))
        forms[epilogue] = replace(form, kept=kept, splits=splits, warps=warps)
    check_products(device, cases(*shape, zeros, columns, bits == 4, "cpu"), forms)


def test_a_block_with_more_units_than_it_has_sums_for(device: Device) -> None:
    torch.manual_seed(0)
    a = affine(1536, 128, 32, True, "cpu")
    x, squares = torch.randn(2, 128).bfloat16(), torch.full((2,), 128.0, dtype=torch.float64)
    product, form = Product(pack(a), LOGITS), Form(8, 1, 2, 2, 64)
    units = -(-product.rows // (16 * 3))
    assert 1 < product._round(form, 2, Card.current()) < units
    got = logits(device, a, x, form, squares)
    assert error(got, x.double() @ dense(a).T * (1 + EPS) ** -0.5) < 3e-5


KEEPING = Form(8, 1, 2, 2, 64, kept=1)


def test_a_block_that_keeps_the_input_adds_up_round_by_round(device: Device) -> None:
    """Each second round has sums of its own; one warp is far behind, or ahead."""
    torch.manual_seed(0)
    a, x = affine(1536, 512, 32, True, "cpu"), torch.randn(5, 512).bfloat16()
    product = Product(pack(a), LOGITS)
    units, card = -(-product.rows // (16 * 3)), Card.current()
    assert 2 < -(-units // product._round(KEEPING, 5, card)) < units
    assert error(logits(device, a, x, KEEPING), x.double() @ dense(a).T) < 3e-5


@pytest.mark.parametrize(
    ("form", "columns", "most"),
    [(Form(8, 1, 2, 2, 64), 1, 3e-5), (KEEPING, 1, 3e-5), (KEEPING, 8, 2e-4)],
    ids=["one column", "one that is kept", "eight that are kept"],
)
def test_digits_keep_a_column_of_any_size(
    device: Device, form: Form, columns: int, most: float
) -> None:
    """Groups from 2^-100 to where sums still have a place, and one of zeros, each by itself."""
    torch.manual_seed(0)
    a = affine(32, 512, 64, True, "cpu")
    x = torch.randn(columns, 512)
    for i, power in enumerate((-100, -90, -40, 0, 14, 100, 120)):
        only = torch.zeros_like(x)
        only[:, i * 64 : i * 64 + 64] = x[:, i * 64 : i * 64 + 64]
        column = (only.double() * 2.0**power).bfloat16()
        assert error(logits(device, a, column, form), column.double() @ dense(a).T) < most, power
    assert not logits(device, a, torch.zeros_like(column), form).any()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("form", "columns", "lost"),
    [(Form(8, 1, 2, 2, 64), 1, 2**-23), (KEEPING, 1, 2**-23), (KEEPING, 8, 2**-15)],
    ids=["one column", "one that is kept", "eight that are kept"],
)
def test_digits_are_off_by_no_more_than_they_say(
    device: Device, form: Form, columns: int, lost: float, zeros: bool
) -> None:
    """A number in each group is far larger than the others, as activations have them."""
    torch.manual_seed(0)
    a = affine(64, 512, 64, zeros, "cpu")
    x = torch.randn(columns, 512)
    x[:, 5::64] *= 1000
    x = x.bfloat16()
    want, weights = x.double() @ dense(a).T, dense(a).abs().view(64, -1, 64).sum(-1)
    largest = x.double().abs().view(columns, -1, 64).amax(-1)
    off = (logits(device, a, x, form) - want).abs()
    sums = 8 * 2**-24 * (x.double().abs() @ dense(a).abs().T)  # of eight groups, in fp32
    assert bool((off <= lost * largest @ weights.T + sums).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("form", [Form(8, 1, 2, 2, 64), KEEPING], ids=["read", "kept"])
@pytest.mark.parametrize("columns", [1, 8])
def test_what_is_no_number_stays_that(
    device: Device, form: Form, columns: int, value: float
) -> None:
    torch.manual_seed(0)
    a, x = affine(32, 512, 64, False, "cpu"), torch.randn(columns, 512).bfloat16()
    x[-1, 70] = value
    got = logits(device, a, x, form)
    assert not got[-1].isfinite().any()
    assert bool(got[:-1].isfinite().all())


SCREENED = {  # rows, inputs, tokens, form
    "groups of 128": (64, 512, 64, Form(8, 1, 3, 2, 128, held_back=1)),
    "groups of 32": (160, 96 * 2, 149, Form(12, 2, 2, 1, 64)),
}


def chosen_by(
    device: Device, head: Tensor, x: Tensor, tokens: int, form: Form
) -> tuple[int, Tensor]:
    """The token and the logits of a step's end, of one row."""
    made, width = screen(head, False), head.shape[1]
    squares = (x.double() ** 2).sum().view(1)
    out, top = torch.zeros(1, len(head)), torch.zeros(1, dtype=torch.int64)
    device.late = [x, squares]
    at = Top(top, tokens)
    made.product(form, x, out, squares=squares, eps=EPS, top=at)
    long = functools.partial(torch.zeros, 1, dtype=torch.int64)
    best, token, told = long(), long(), long()
    ints = [torch.zeros(1, dtype=torch.int32) for _ in range(4)]
    row = Row(*map(address, (best, ints[0], token, told, *ints[1:])), 1)
    device.late = [x, squares, out, top]
    cuda.kernel("small.cu", "decide", shared=2 * width)(
        (2,), 256, out, ctypes.c_int(tokens), top, made.errors, ctypes.c_float(made.most), head, x,
        ctypes.c_int(width // 8), squares, ctypes.c_float(EPS), row,
    )  # fmt: skip
    assert (best.item(), ints[0].item()) == (0, 0)  # for the next step
    assert [v.item() for v in ints[1:]] == [1, 1, 1]
    assert told.item() == token.item()
    return int(token.item()), out[0, :tokens]


def test_a_row_of_a_large_norm_does_not_make_all_uncertain(device: Device) -> None:
    *_, tokens, form = SCREENED["groups of 32"]
    head, x, _ = nearly_alike("groups of 32", 0)
    head[3] = head[3].abs() * -100 * x[0].sign()
    token, got = chosen_by(device, head, x, tokens, form)
    factor = torch.rsqrt((x.double() ** 2).mean() + EPS)
    want = (x.double() @ head.double().T)[0, :tokens] * factor
    assert token == want.argmax() != 3
    assert int(((got - want).abs() < 1e-6 * x.norm()).sum()) < 0.3 * tokens


def test_a_screened_head_says_something_where_nothing_is_a_number(device: Device) -> None:
    head = torch.randn(64, 128).bfloat16()
    x = torch.full((1, 128), math.nan).bfloat16()
    token, got = chosen_by(device, head, x, 50, Form(8, 1, 2, 2, 128))
    assert 0 <= token < 50
    assert got.isnan().all()


@pytest.mark.parametrize("times", [1e-9, 1e-5, 1.0, 1e4])
def test_what_rounding_takes_is_known(times: float) -> None:
    torch.manual_seed(0)
    head = (torch.randn(64, 256) * times).bfloat16()
    head[7] = 0
    head[8, :128] *= 1e-6  # a group whose scale is no number of 16 bits
    made = screen(head, False)
    lost = (head.double() - dequantized(made)).norm(dim=1)
    assert bool((lost <= made.errors).all())
    assert made.errors[7] == 0
    if times > 1e-9:
        assert bool((made.errors[9:] < 0.01 * head[9:].double().norm(dim=1)).all())


def dequantized(made: Screen) -> Tensor:
    """fp32 weights of a screen, undone as the kernel reads them: PTX ISA, `mma.m16n8k32`."""
    w = made.product.weight
    assert isinstance(w, Packed)
    codes = w.words.contiguous().view(torch.int8).view(-1, w.width // 32, 8, 4, 2, 2, 4)
    order = codes[..., [0, 2, 1, 3]]  # tile, 32 inputs, g, t, i, half, within
    codes = order.permute(0, 5, 2, 1, 3, 4, 6).reshape(w.rows, w.width).float()
    scales = w.scales.contiguous().view(torch.float16).view(w.rows // 16, -1, 8, 2)
    scales = scales.permute(0, 3, 2, 1).reshape(w.rows, -1).float() / 16
    return codes * scales.repeat_interleave(w.group, 1)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("paired", [False, True])
def test_packed_weights_are_written_out(device: Device, zeros: bool, paired: bool) -> None:
    a = affine(64, 256, 64, zeros, "cpu")
    out = torch.empty(64, 256, dtype=torch.bfloat16)
    assert torch.equal(dequantize(pack(a, paired=paired), out), dense(a).bfloat16())


CASES = [("llama", (200,), False), ("llama-128", (33, 7), True), ("qwen2", (70,), True),
         ("qwen3", (20, 35, 6), False)]  # fmt: skip


def begun(
    family: str, lengths: tuple[int, ...], packed: bool = False
) -> tuple[FastRunner, Any, Step]:
    """A runner in torch, what it knows after the prompts, and a step that goes on from there."""
    reference, model = loaded_of(family, "cpu"), loaded_of(family, "cpu")
    slow = FastRunner(reference, kernels=False)
    weights = int4(reference) if packed else {}
    started = slow.start(prompts(*lengths), 8)
    cache = started.state.cache
    fused = Fused(FastRunner(model, kernels=False).decoder, dict(weights))
    copied = {f.name: getattr(cache, f.name).clone() for f in dataclasses.fields(cache)}
    step = Step(fused, type(cache)(**copied), started.first.clone(), 8)
    return slow, started.state, step


def keep_the_input(step: Step) -> None:
    """In products of which a form does."""
    rows, kept = len(step.token), 0
    for alike in step.fused.kinds(rows).values():
        if forms := [form for form in alike[0].forms(rows, Card.current()) if form.kept]:
            step.chosen.products |= dict.fromkeys(map(id, alike), forms[-1])
            kept += forms[-1].splits
    assert kept


@pytest.mark.parametrize(("family", "lengths", "packed"), CASES, ids=str)
@torch.inference_mode()
def test_steps_are_those_of_torch(
    device: Device, family: str, lengths: tuple[int, ...], packed: bool
) -> None:
    slow, state, step = begun(family, lengths, packed)
    every = attentions(step.fused, len(lengths))
    wider = [form for form in every if form.heads > 1 and not form.warps] or every
    grouped = [form for form in every if form.warps]
    assert bool(grouped) == (step.fused.decoder.sizes.group > 1)
    if grouped:  # several turns, with and without tiles of the next ones on their way
        wider = [replace(grouped[0], warps=4), wider[0], grouped[-1]]
    for i in range(3):
        form = (every[0], wider[-1], wider[0])[i]
        step.chosen.attention = replace(form, splits=(1, 2, 4)[i], near=i, late=bool(i % 2))
        if i == 2:
            keep_the_input(step)
        for key, chosen in step.chosen.products.items():
            step.chosen.products[key] = replace(chosen, held_back=min(i, chosen.depth))
        device.late = [
            step.scaled, step.qkv, step.seen, step.inner, step.squares, step.logits, step.top,
        ]  # fmt: skip
        want = torch_step(slow.decoder, state.cache, state.rope, step.token.clone()).float()
        step.launch()
        got = step.logits[:, : want.shape[1]]
        worst = (got - want).abs().max().item()
        assert worst < 0.15 * want.std().item()
        assert torch.equal(step.token, got.argmax(-1))
        assert torch.equal(step.told[:, i], step.token)
        assert torch.equal(step.cache.filled, state.cache.filled)
        assert (step.cache.keys.float() - state.cache.keys.float()).abs().max() < 0.1
    assert step.count.tolist() == [3] * len(lengths)


WAITS = "            wait_for_prior();\n"
ENDS = "        if (begin + round < end) __syncthreads();  // sums were read\n"
MEETING = "        __syncthreads();\n        for (int e"
FROM = "&slot.w[m][i][lane], "
BROKEN: dict[str, tuple[dict[str, str], str]] = {  # what is replaced; what a failure says, if one
    "reads before copies have come": ({"wait_for_copies<DEPTH - 1>": "wait_for_copies<DEPTH>"}, ""),
    "reads x before it waits": ({WAITS: "", ENDS: "        wait_for_prior();\n" + ENDS}, ""),
    "forgets what it held back": ({"                ask(asked, DEPTH);\n": ""}, ""),
    "adds before all have left sums": ({MEETING: MEETING.partition("\n")[2]}, ""),
    "never waits": ({WAITS: ""}, "a kernel ends without having waited"),
    "copies from an odd place": ({FROM + "s.words": FROM + "1 + (char*)s.words"}, "not aligned"),
    "waits for a warp that has gone on": (
        {ENDS: "        if (warp == 0) __syncthreads();\n"}, "threads wait for ever"),
}  # fmt: skip


@pytest.fixture
def break_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Break]:
    """Kernels come from another folder then, one of them changed."""

    def changed(name: str, replaced: dict[str, str]) -> None:
        for file in cuda.SOURCES.iterdir():
            (tmp_path / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
        for old, new in replaced.items():
            own = [tmp_path / name, tmp_path / "product.cuh"]
            (file,) = (f for f in own if old in f.read_text(encoding="utf-8"))
            text = file.read_text(encoding="utf-8")
            assert text.count(old) == 1
            file.write_text(text.replace(old, new), encoding="utf-8")
        monkeypatch.setattr(cuda, "SOURCES", tmp_path)
        emulation._library.cache_clear()

    yield changed
    emulation._library.cache_clear()


def nearly_alike(case: str, seed: int, below: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """A head, an input, and the logits: the likeliest lie closer than rounding to 8 bits is off."""
    rows, width, tokens, _ = SCREENED[case]
    torch.manual_seed(seed)
    head = torch.randn(rows, width).bfloat16() / 16
    x = torch.randn(1, width).bfloat16()
    if below:  # all logits are below zero: those of rows that fill up are above them
        head = -head.abs() * x.sign()
    head[tokens:] = 0
    near, way = torch.randperm(tokens)[:16], x / (-1024 if below else 16)
    head[near] = (way + torch.randn(16, width) / 8192).bfloat16()
    factor = torch.rsqrt((x.double() ** 2).mean() + EPS)
    return head, x, (x.double() @ head.double().T)[0, :tokens] * factor


@pytest.mark.parametrize("case", list(SCREENED))
def test_a_screened_head_chooses_what_16_bits_do(device: Device, case: str) -> None:
    *_, tokens, form = SCREENED[case]
    for seed, below in ((0, False), (1, False), (2, False), (3, True)):
        head, x, want = nearly_alike(case, seed, below)
        token, got = chosen_by(device, head, x, tokens, form)
        assert token == want.argmax()
        made = screen(head, False)
        norm = x.double().norm() * torch.rsqrt((x.double() ** 2).mean() + EPS)
        assert bool(((got - want).abs() / norm <= made.errors[:tokens]).all())
        exact = head[:tokens].double() - dequantized(made)[:tokens]
        assert bool((exact.norm(dim=1) <= made.errors[:tokens]).all())
        assert made.errors.max() == made.most
        again = (got - want).abs() < 1e-6 * x.norm()
        assert 1 <= int(again.sum()) < 0.5 * tokens  # computed anew


@pytest.mark.parametrize("case", list(SCREENED))
def test_a_screen_that_trusts_itself_is_noticed(
    device: Device, case: str, break_source: Break
) -> None:
    *_, tokens, form = SCREENED[case]
    break_source(
        "small.cu", {"!(v + errors[i] * norm < least)": "!(v < of_order((u32)(top[0] >> 32)))"}
    )
    others = 0
    for seed in range(3):
        head, x, want = nearly_alike(case, seed)
        others += chosen_by(device, head, x, tokens, form)[0] != want.argmax()
    assert others


def check_is_noticed(
    device: Device, a: Affine, x: Tensor, form: Form, change: Callable[[], None], told: str
) -> None:
    """W x is right, and after the change it is wrong, or fails with what is told."""
    want = x.double() @ dense(a).T

    def wrong() -> float:
        return error(logits(device, a, x, form).nan_to_num(1e9), want)

    assert wrong() < 3e-5
    change()
    if told:
        with pytest.raises(AssertionError, match=told):
            wrong()
    else:
        assert wrong() > 0.01


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_broken_kernel_is_noticed(device: Device, what: str, break_source: Break) -> None:
    torch.manual_seed(0)
    a = affine(96, 512, 128, False, "cpu")
    x, form = torch.randn(1, 512).bfloat16(), Form(8, 1, 2, 2, 128, held_back=1)
    replaced, told = BROKEN[what]
    check_is_noticed(device, a, x, form, lambda: break_source("linear.cu", replaced), told)


MEETS = "        wait_for_gifts(&gifts);\n"
OWN = " + (from + s) * (SPAN / 8)"
BROKEN_KEEPING: dict[str, tuple[dict[str, str], str]] = {
    "reads before copies have come": ({"wait_for_copies<DEPTH - 1>": "wait_for_copies<DEPTH>"}, ""),
    "adds before all have left sums": ({MEETS: ""}, ""),
    "keeps another warp's input": ({OWN: OWN.replace("from", "from ^ 1")}, ""),
    "leaves sums where the last ones are": ({"other = own * SHARERS - other": "other = 0"}, ""),
    "forgets what it held back": ({"        ask(DEPTH - held_back, DEPTH);\n": ""}, ""),
    "goes on at the wrong unit": ({"jump_of(W.K, mine)": "jump_of(W.K, mine + 1)"}, ""),
    "expects more": ({"* MT * lanes * 16": "* MT * lanes * 32"}, "threads wait for ever"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(BROKEN_KEEPING))
def test_a_broken_kernel_that_keeps_the_input_is_noticed(
    device: Device, what: str, break_source: Break
) -> None:
    torch.manual_seed(0)
    replaced, told = BROKEN_KEEPING[what]
    form = replace(KEEPING, held_back=1, splits=2 if told else 1, warps=4 if told else 8)
    a = affine(96 if told else 768, 512, 64, False, "cpu")
    x = torch.randn(4, 512).bfloat16()
    check_is_noticed(device, a, x, form, lambda: break_source("kept.cu", replaced), told)


EXPECTS_MORE = {
    "attention.cu": ("SPLITS * (PIECE + 2 * G)", "SPLITS * (PIECE + 3 * G)"),
    "grouped.cu": ("+ G * sizeof(float2)", "+ G * sizeof(float4)"),
}


@pytest.mark.parametrize("source", list(EXPECTS_MORE))
@pytest.mark.parametrize(
    ("nothing", "told"),
    [(False, "threads wait for ever"), (True, "a block gets what it does not expect")],
    ids=["expects more", "expects nothing"],
)
@torch.inference_mode()
def test_attention_that_expects_something_else_is_noticed(
    device: Device, source: str, nothing: bool, told: str, break_source: Break
) -> None:
    _, _, step = begun("qwen2", (40,))
    form = next(one for one in attentions(step.fused, 1) if one.source[0] == source)
    step.chosen.attention = replace(form, splits=2)
    step.launch_layers(range(1))
    old, new = EXPECTS_MORE[source]
    if nothing:
        old, new = "    if (threadIdx.x == 0) expect(", "    if (threadIdx.x == ~0u) expect("
    break_source(source, {old: new})
    with pytest.raises(AssertionError, match=told):
        step.launch_layers(range(1))


def turned(x: Tensor, norm: Tensor | None, by: Tensor) -> Tensor:
    """A head, normalised and rotated as a model does, rounded to bf16; fp64."""
    x = x.double()
    if norm is not None:
        x = x * torch.rsqrt((x**2).mean() + EPS) * norm.double()
    cos, sin = by.double().unbind(-1)
    a, b = x.chunk(2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin)).bfloat16().double()


# Head size, query heads of a block and a key-value head, warps, tiles, splits, norms; of each row
# how many keys and the first that is no padding.
GROUPED = [
    (64, 2, 4, 8, 1, 16, True, ((260, 0), (17, 5))), (64, 7, 7, 4, 2, 2, False, ((400, 3),)),
    (64, 5, 5, 4, 1, 8, True, ((0, 0), (63, 63))), (128, 6, 12, 8, 1, 8, False, ((150, 75),)),
    (128, 3, 3, 4, 2, 1, True, ((128, 0), (127, 1))), (128, 8, 8, 8, 2, 16, False, ((300, 0),)),
    (256, 8, 16, 8, 1, 4, True, ((65, 0),)), (256, 3, 6, 4, 1, 16, False, ((100, 0), (1, 0))),
]  # fmt: skip


@pytest.mark.parametrize("lazy", [True, False], ids=["late", "at once"])
@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_grouped_attention(device: Device, case: tuple[Any, ...], lazy: bool) -> None:
    d, heads, group, warps, staged, splits, norms, rows = case
    torch.manual_seed(0)
    device.lazy, own, length = lazy, 2, max(end for end, _ in rows) + 2
    qkv = torch.randn(len(rows), (own * group + 2 * own) * d).bfloat16()
    # What lies outside is no number: whoever reads it has none to tell.
    cache = torch.full((2, len(rows), own, length, d), math.nan).bfloat16()
    for r, (end, start) in enumerate(rows):
        cache[:, r, :, start:end] = torch.randn(2, own, end - start, d).bfloat16()
    angles = torch.rand(length + 1, d // 2) * 6
    rope = torch.stack((angles.cos(), angles.sin()), -1)
    q_norm, k_norm = (torch.rand(d).add(0.5).bfloat16() if norms else None for _ in range(2))
    out = torch.full((len(rows), own * group * d), math.nan).bfloat16()
    want, fresh = torch.empty(out.shape, dtype=torch.double).view(len(rows), -1, d), []
    for r, (end, start) in enumerate(rows):
        parts = qkv[r].view(-1, d)
        for h in range(own):
            key = turned(parts[own * group + h], k_norm, rope[end - start])
            value = parts[own * group + own + h].double()
            fresh.append((key, value))
            keys, values = (cache[i, r, h, start:end].double() for i in range(2))
            keys, values = torch.cat((keys, key[None])), torch.cat((values, value[None]))
            for i in range(h * group, (h + 1) * group):
                query = turned(parts[i], q_norm, rope[end - start])
                want[r, i] = torch.softmax(keys @ query / math.sqrt(d), 0) @ values
    form = Attention(splits, heads, 1, staged, 1, warps=warps, rest=1000 * lazy, near=2)
    far, before = torch.zeros(64 << 10, dtype=torch.uint8), cache.clone()
    device.late = [qkv, out]
    filled, start = (torch.tensor(part, dtype=torch.int32) for part in zip(*rows, strict=True))
    source, name = form.source
    cuda.kernel(source, name, shared=form.shared(d), **form.defines(group, d, norms))(
        (splits, own * group // heads, len(rows)), 32 * warps, qkv, cache[0], cache[1], rope,
        filled, start, filled - start, q_norm, k_norm, ctypes.c_float(EPS), out,
        ctypes.c_int(length), ctypes.c_float(math.log2(math.e) / math.sqrt(d)), ctypes.c_int(lazy),
        Later(far.data_ptr(), 4, 2 << 10), ctypes.c_uint(form.rest),
    )  # fmt: skip
    assert error(out, want.flatten(1)) < 0.01
    for (r, h), (key, value) in zip(
        itertools.product(range(len(rows)), range(own)), fresh, strict=True
    ):
        new = cache[:, r, h, rows[r][0]]
        assert error(new[0], key) < 0.01
        assert torch.equal(new[1].double(), value)
        before[:, r, h, rows[r][0]] = new
    assert torch.equal(before.view(torch.int16), cache.view(torch.int16))  # nothing else is written


MANY = "        __syncthreads();\n#pragma unroll\n        for (int m = 0; m < OWN"
BROKEN_GROUPS: dict[str, tuple[bool, dict[str, str]]] = {  # whether copies come late
    "multiplies by weights before all are written": (True, {MANY: MANY.partition("\n")[2]}),
    "overwrites what others still read": (
        False, {"            __syncthreads();  // all have read\n": ""}),
    "forgets the new key": (True, {"if (newest && tile == new_tile)": "if (false)"}),
    "forgets to shrink what it has": (True, {"        if (first) {\n": "        if (false) {\n"}),
    "reads before copies have come": (True, {"wait_for_copies<STAGED - 1>": "wait_for_copies<9>"}),
    "sees padding": (True, {"share_of(first_key, end, split)": "share_of(0, end, split)"}),
    "keeps what two turns have in one place": (True, {"if (++stage == STAGED)": "if (true)"}),
}  # fmt: skip


@pytest.mark.parametrize("what", list(BROKEN_GROUPS))
@torch.inference_mode()
def test_broken_attention_of_groups_is_noticed(
    device: Device, what: str, break_source: Break
) -> None:
    late, replaced = BROKEN_GROUPS[what]
    device.lazy, lengths = late, (330, 200)
    _, _, step = begun("qwen2", lengths)
    own = [form for form in attentions(step.fused, 2) if form.warps == 4 and form.staged == 2]
    # Three turns of four warps for the longer row, of which two are on their way.
    step.chosen.attention = replace(own[0], splits=2)
    device.late = [step.scaled, step.qkv, step.inner, step.squares]
    found = []
    for broken in (False, True):
        if broken:
            break_source("grouped.cu", replaced)
        step.launch_layers(range(1))
        found.append(step.seen.float().nan_to_num(1e9))
    assert error(found[1], found[0].double()) > 0.05


def test_functions_in_assembly_are_left_out() -> None:
    source = (
        "__device__ int a() { return 1; }\n"
        '__device__ int b() {\n    asm("");\n    return 2;\n}\n'
        'template <int N>\n__device__ int c() {\n    asm("");\n}\n'
        "__device__ int d(\n    int v) {\n    return v;\n}\n"
    )
    kept = emulation.without_assembly(source)
    assert [name for name in "abcd" if f"int {name}(" in kept] == ["a", "d"]
    assert "template" not in kept
