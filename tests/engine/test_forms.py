"""The search for the fastest forms: what it compares, keeps and reads again. No GPU is needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qatbench import store
from qatbench.engine import cuda, forms
from qatbench.engine.attention import Attention, attentions
from qatbench.engine.form import LIBRARY, Card, Form
from qatbench.engine.products import LOGITS, RESIDUAL, SCREEN, STORE, Product, shared_by
from qatbench.engine.step import Chosen, first_guess
from qatbench.engine.weights import Packed

HOPPER = Card(132, 228 << 10)
# Warps, tiles, lead, whether all first spans are held back.
BEST = {
    STORE: (12, 2, 0, False), RESIDUAL: (16, 1, 1, True), LOGITS: (8, 1, 1, False),
    SCREEN: (12, 1, 1, True),
}  # fmt: skip
HEADS = (LOGITS, SCREEN)


def spilled(product: Product, form: Form, columns: int) -> Any:
    lacks = form.warps == 8 and product.epilogue not in HEADS
    return SimpleNamespace(spilled=64 if lacks else 8, fits=form.splits == 1)


class Step:
    """What the search asks of a step; the further its forms are from BEST, the longer it takes."""

    def __init__(self, rows: int) -> None:
        self.token = [0] * rows
        weights: dict[int, Any] = {e: torch.empty(4096, 1024, device="meta") for e in BEST}
        weights[SCREEN] = Packed(torch.empty(0), torch.empty(0), None, 4096, 1024, 128, bits=8)
        heads = HEADS if rows == 1 else HEADS[:1]
        self.products = [Product(weights[e], e) for e in (STORE, RESIDUAL, STORE, *heads)]
        self.dropped: list[bool] = []
        self.slow = 4  # what the head takes that is not the faster one
        self.faster = SCREEN
        self.fused: Any = SimpleNamespace(
            kinds=self.kinds, layers=[SimpleNamespace(q_norm=None)],
            decoder=SimpleNamespace(sizes=SimpleNamespace(layers=3, kv_heads=4, group=2, head=64)),
            drop_screen=lambda: self.dropped.append(True),
        )  # fmt: skip
        self.chosen: Chosen = first_guess(self.fused, rows)
        self.timed: list[tuple[Any, ...]] = []

    def kinds(self, rows: int) -> dict[str, list[Product]]:
        found: dict[str, list[Product]] = {}
        for product in self.products:
            found.setdefault(product.kind(rows), []).append(product)
        return found

    def attention_kernel(self, form: Attention, norms: bool) -> Any:
        assert not norms
        return SimpleNamespace(spilled=400 if form.unroll == 4 else 0, fits=form.splits < 16)

    def seconds(self) -> float:
        taken = 0.0
        head = HEADS[self.chosen.screened]
        taken += self.slow * (head != self.faster)
        for product in self.products:
            if product.epilogue in HEADS and product.epilogue != head:
                continue
            form, best = self.chosen.products[id(product)], BEST[product.epilogue]
            warps, tiles, lead, held = best
            taken += abs(form.warps - warps) + abs(form.tiles - tiles) + abs(form.lead - lead)
            taken += abs(form.held_back - form.depth * held)
            taken += 0 if form != LIBRARY else 50
        attention = self.chosen.attention
        taken += (attention.heads != 2) + 2 * (not attention.late)
        self.timed.append((*(self.chosen.products[id(p)] for p in self.products), attention))
        return taken


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A search without kernels; the file where it keeps what it found."""
    monkeypatch.setattr(Card, "current", lambda: HOPPER)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "binary", lambda source, defines, capability: b"")
    monkeypatch.setattr(Product, "build", spilled)
    monkeypatch.setattr(forms, "_seconds", lambda step, layers: step.seconds())
    monkeypatch.setattr(forms, "_file", lambda: tmp_path / "forms.json")
    return tmp_path / "forms.json"


def test_the_fastest_of_what_does_not_spill_is_found_and_kept(search: Path) -> None:
    step: Any = Step(1)
    told: list[tuple[int, int]] = []
    chosen = forms.choose(step, lambda done, total: told.append((done, total)))
    assert chosen.screened
    assert not step.dropped
    for product in step.products:
        if product.epilogue == LOGITS:
            continue
        form = chosen.products[id(product)]
        held = form.held_back == form.depth
        found = (form.warps, form.tiles, form.lead, held)
        assert found == BEST[product.epilogue], product.kind(1)
    assert (chosen.attention.heads, chosen.attention.late) == (2, True)
    assert not any(isinstance(f, Attention) and f.unroll == 4 for t in step.timed for f in t)
    assert told[0] == (0, 0)  # while they are compiled
    assert len(told) == len(step.timed) + 2
    assert told[-1][0] == told[-1][1] > told[-2][0]
    (kept,) = store.read_json(search).values()
    assert kept["attention"]["late"] is True
    assert set(kept["products"]) == set(step.kinds(1))


def test_the_faster_head_is_taken(search: Path) -> None:
    step: Any = Step(1)
    step.faster, step.slow = LOGITS, 40
    chosen = forms.choose(step)
    assert not chosen.screened
    assert step.dropped
    form = chosen.products[id(step.products[3])]
    assert (form.warps, form.tiles, form.lead) == BEST[LOGITS][:3]
    again: Any = Step(1)
    assert not forms.choose(again).screened  # as it was kept
    assert not again.timed
    wider: Any = Step(5)
    assert not forms.choose(wider).screened
    assert wider.timed
    assert not wider.dropped  # steps of one row may have been measured with it before


def test_what_was_found_is_read_by_another_model_of_these_shapes(search: Path) -> None:
    first: Any = Step(1)
    found = forms.choose(first)
    second: Any = Step(1)
    again = forms.choose(second)
    assert not second.timed
    assert list(again.products.values()) == list(found.products.values())
    assert again.attention == found.attention == second.chosen.attention
    wider: Any = Step(5)
    forms.choose(wider)
    assert wider.timed
    assert len(store.read_json(search)) == 2
    eight: Any = Step(8)  # rows that one kernel serves share its forms
    forms.choose(eight)
    assert not eight.timed


def test_products_of_one_kind_change_together(search: Path) -> None:
    step: Any = Step(1)
    forms.choose(step)
    kinds = {product.kind(1): None for product in step.products}
    assert len(kinds) == 4
    for *found, _ in step.timed:
        assert found[0] == found[2]  # first and third: one kind


@pytest.mark.parametrize(
    ("rows", "alike"),
    [(1, "1"), (2, "8"), (8, "8"), (9, "16"), (33, "64"), (64, "64"), (65, "many")],
)
def test_rows_that_share_forms(rows: int, alike: str) -> None:
    assert shared_by(rows) == alike


def test_the_first_guess_leaves_room_for_the_next_kernel(search: Path) -> None:
    step: Any = Step(1)
    own = [form for form in step.chosen.products.values() if form != LIBRARY]
    assert {(form.warps, form.blocks, form.lead) for form in own} == {(16, 2, 0)}
    assert step.chosen.attention == attentions(step.fused, 1)[0]
    assert step.chosen.attention.blocks == 4
