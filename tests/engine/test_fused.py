"""The CUDA kernels against fp64 products, and their steps against the step in torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_models import FAMILIES, affine, cases, dense, error, int4, loaded_of, prompts

from qatbench import store
from qatbench.engine import forms, products
from qatbench.engine.attention import attentions
from qatbench.engine.decoder import torch_step
from qatbench.engine.fast import FastRunner
from qatbench.engine.form import LIBRARY, Card, Form
from qatbench.engine.forms import choose
from qatbench.engine.products import RESIDUAL, Product
from qatbench.engine.step import Step
from qatbench.engine.weights import pack
from qatbench.vlm.batch import Encoded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [(512, 1024, 128), (576, 576, 64), (256, 256, 32), (1536, 8960, 128), (640, 1536, 512)]
LARGE = [(6144, 512, 128), (20480, 1024, 64)]  # several units a block, more than it has sums for


def some(every: list[Form]) -> list[Form]:
    """The library's, and forms from both ends and between."""
    return [
        *(form for form in every if form == LIBRARY),
        *every[:: max(1, len(every) // 3)],
        every[-1],
    ]


def cases_of_products() -> list[Any]:
    """Shape, zero points, columns and bits."""
    small = [
        (*shape, zeros, columns, int4)
        for shape in SHAPES
        for columns in (1, 3, 20, 64)
        for zeros, int4 in ((False, True), (True, True), (False, False))
    ]
    return small + [(*shape, False, columns, True) for shape in LARGE for columns in (1, 8, 20)]


@pytest.mark.parametrize(
    ("out", "width", "group", "zeros", "columns", "int4"), cases_of_products(), ids=str
)
def test_products(out: int, width: int, group: int, zeros: bool, columns: int, int4: bool) -> None:
    every, card = cases(out, width, group, zeros, columns, int4, "cuda"), Card.current()
    built = [(c.product, form) for c in every for form in c.product.forms(columns, card)]
    products.compile_all(built, columns)
    for case in every:
        for i, form in enumerate(case.product.forms(columns, card)):
            if form != LIBRARY:
                lead, held_back = (0, 1, form.depth, 1000)[i % 4], (0, form.depth, 1)[i % 3]
                form = replace(form, lead=lead, held_back=held_back)
            got, after = case.multiply(form)
            most = 2**-6 if form == LIBRARY else case.bound
            assert error(got, case.want) < most, (case.product.kind(columns), form)
            if case.product.epilogue == RESIDUAL:
                assert torch.equal(after.scaled, (got.float() * case.norm.float()).bfloat16())
                found = got.double().square().sum(-1)
                torch.testing.assert_close(after.squares, found, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("out", "width", "group"), SHAPES)
@pytest.mark.parametrize("paired", [False, True])
def test_dequantizing_rounds_once(out: int, width: int, group: int, paired: bool) -> None:
    a = affine(out, width, group, zeros=True, device="cuda")
    room = torch.zeros(out, width, dtype=torch.bfloat16, device="cuda")
    products.dequantize(pack(a, paired=paired), room)
    assert torch.equal(room, dense(a).float().bfloat16())


@pytest.fixture(autouse=True)
def few_forms(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of its own for all tests, and few forms; steps take the first that they think of."""
    root = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(root))
    products_forms, attention_forms = Product.forms, forms.attentions

    def few(self: Product, columns: int, card: Card) -> list[Form]:
        return some(products_forms(self, columns, card))

    monkeypatch.setattr(Product, "forms", few)
    monkeypatch.setattr(forms, "attentions", lambda *given: attention_forms(*given)[:2])
    monkeypatch.setattr(forms, "choose", lambda step, progress: step.chosen)


@torch.inference_mode()
def compare_steps(fast: FastRunner, slow: FastRunner, asked: list[Encoded]) -> None:
    """Logits within a bound; where a token differs, its two best are closer than the error."""
    a, b = fast.start(asked, 24), slow.start(asked, 24)
    state = b.state
    token = a.first
    for _ in range(20):
        want = torch_step(slow.decoder, state.cache, state.rope, token).float()
        following = fast.step(a, 1)[:, 0]
        got = a.state.step.logits[:, : want.shape[1]]
        worst = (got - want).abs().max().item()
        assert worst < 0.15 * want.std().item()
        best = want.topk(2).values
        differs = following != want.argmax(-1)
        assert bool(((best[:, 0] - best[:, 1])[differs] <= 2 * worst).all())
        assert torch.equal(following, got.argmax(-1))
        token = following


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("lengths", [(40,), (700,), (33, 64, 7)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "int4"])
def test_steps_are_those_of_torch(family: str, lengths: tuple[int, ...], packed: bool) -> None:
    reference = loaded_of(family, "cuda")
    weights = int4(reference) if packed else None
    fast = FastRunner(loaded_of(family, "cuda"), weights)
    compare_steps(fast, FastRunner(reference, kernels=False), prompts(*lengths))


@pytest.mark.parametrize("family", ["llama-128", "qwen2"])
def test_attention_is_the_same_in_all_forms(family: str) -> None:
    fast = FastRunner(loaded_of(family, "cuda"))
    started = fast.start(prompts(700, 90, 333), 24)
    step = started.state.step
    found = []
    every = attentions(fast.fused, 3)
    for form in [*every, replace(every[0], late=True)]:
        if not step.attention_kernel(form, False).fits:
            continue
        step.chosen.attention = form
        step.launch_layers(range(3))
        found.append(step.logits.clone())
    assert len(found) > 7
    for logits in found[1:]:
        assert (logits - found[0]).abs().max() < 0.05 * found[0].std()


@pytest.mark.parametrize("family", ["llama-128", "qwen2"])
@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "int4"])
def test_it_does_not_matter_when_the_next_kernel_starts(family: str, packed: bool) -> None:
    reference = loaded_of(family, "cuda")
    fast = FastRunner(loaded_of(family, "cuda"), int4(reference) if packed else None)
    step = fast.start(prompts(700), 24).state.step
    products = {id(p): p for alike in step.fused.kinds(1).values() for p in alike}
    chosen, first = dict(step.chosen.products), step.chosen.attention
    found = []
    starts = ((0, False, 0), (-1, False, 16), (-1, True, 2), (1, True, 0), (99, False, 4))
    for lead, late, near in starts:
        for key, form in chosen.items():
            own = max(lead, products[key].leads)
            held = form.depth * (near > 0)
            moved = replace(form, lead=own, held_back=held)
            step.chosen.products[key] = form if form == LIBRARY else moved
        step.chosen.attention = replace(first, late=late, near=near)
        for _ in range(5):  # one after the other, as in a graph
            step.launch_layers(range(3))
        found.append(step.logits.clone())
    for logits in found[1:]:
        assert (logits - found[0]).abs().max() < 1e-3 * found[0].std()


def test_forms_are_measured_once_and_change_no_state(
    monkeypatch: pytest.MonkeyPatch, few_forms: None
) -> None:
    reference = loaded_of("llama", "cuda")
    fast = FastRunner(loaded_of("llama", "cuda"), int4(reference))
    step = fast.start(prompts(40, 8), 24).state.step
    assert isinstance(step, Step)
    before = [t.clone() for t in (step.token, step.count, step.cache.filled, step.cache.turned)]
    told: list[tuple[int, int]] = []
    chosen = choose(step, lambda done, total: told.append((done, total)))
    after = (step.token, step.count, step.cache.filled, step.cache.turned)
    assert all(map(torch.equal, before, after))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[0] == (0, 0)
    assert told[-1][0] == told[-1][1]
    (file,) = (store.cache_folder() / "kernels").glob("forms-*.json")
    monkeypatch.setattr(forms, "_seconds", lambda *given: pytest.fail("measured again"))
    again = Step(fast.fused, step.cache, step.token, 8)
    assert choose(again) == chosen
    assert len(store.read_json(file)) == 1
    compare_steps(fast, FastRunner(reference, kernels=False), prompts(40, 8))


@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "int4"])
def test_a_screened_head_tells_the_same_tokens(packed: bool) -> None:
    reference = loaded_of("qwen2", "cuda")
    fast = FastRunner(loaded_of("qwen2", "cuda"), int4(reference) if packed else None)
    whole = fast.weight_bytes()
    told = []
    for screened in (True, False):
        started = fast.start(prompts(90), 40)
        started.state.step.chosen.screened = screened
        told.append(fast.step(started, 32))
    assert torch.equal(*told)
    screen = fast.fused.screen
    assert fast.weight_bytes() == whole + screen.bytes()
    rows, width = fast.fused.head.weight.shape
    assert (
        screen.bytes() == rows * width + rows * width // screen.product.weight.group * 2 + 4 * rows
    )
    fast.chosen["1"] = started.state.step.chosen
    assert fast.head_bytes(1) is None
    started.state.step.chosen.screened = True
    assert fast.head_bytes(1) == screen.product.bytes()


@pytest.mark.parametrize("screened", [True, False])
def test_steps_of_one_row_are_the_same_after_those_of_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, screened: bool
) -> None:
    monkeypatch.setattr(forms, "choose", choose)
    monkeypatch.setattr(forms, "_file", lambda: tmp_path / "forms.json")
    monkeypatch.setattr(forms, "_seconds", lambda step, _: step.chosen.screened != screened)
    fast = FastRunner(loaded_of("qwen2", "cuda"))
    before = fast.step(fast.start(prompts(90), 24), 8)
    fast.step(fast.start(prompts(40, 8), 24), 8)
    again = fast.start(prompts(90), 24)
    assert again.state.step.chosen.screened == screened
    assert torch.equal(fast.step(again, 8), before)


def test_steps_of_one_call_and_of_several_are_the_same() -> None:
    fast = FastRunner(loaded_of("llama", "cuda"))
    a = fast.start(prompts(40, 8), 24)
    together = fast.step(a, 20)
    b = fast.start(prompts(40, 8), 24)
    apart = torch.cat([fast.step(b, n) for n in (1, 3, 16)], 1)
    assert torch.equal(together, apart)
