"""The measured table: in which form each product runs.

Which is fastest depends on the shape, the number of columns and the card, so it is measured on the
model's own weights at first use and kept in the cache folder, by the device's name and a digest of
the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from qatbench import store
from qatbench.engine import cuda
from qatbench.engine.products import LIBRARY, LOGITS, RESIDUAL, Form, NextNorm, Product


class Forms:
    """The fastest form of each kind of product on this device, measured when first asked for."""

    def __init__(self) -> None:
        name = torch.cuda.get_device_name().lower().replace(" ", "-")
        file = f"forms-{name}-{cuda.digest('linear.cu')}.json"
        self.file = store.cache_folder() / "kernels" / file
        self.table: dict[str, Any] = store.read_json(self.file) if self.file.exists() else {}

    def of(self, products: Sequence[Product], columns: int) -> Form:
        """For products of one kind, of as many layers as there are.

        What is measured is one after the other, so that no weight is read from a cache.
        """
        kind = products[0].kind(columns)
        if kind not in self.table:
            times = measured(products, columns)
            self.keep(kind, asdict(min(times, key=lambda form: times[form])))
        return Form(**self.table[kind])

    def keep(self, kind: str, form: dict[str, int]) -> None:
        """Note what was measured to be fastest, beside what other processes noted."""
        known = store.read_json(self.file) if self.file.exists() else {}
        self.table = known | self.table | {kind: form}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        store.write_json(self.file, self.table)


def measured(products: Sequence[Product], columns: int, repeats: int = 3) -> dict[Form, float]:
    """Seconds a product of each form, as a graph of all products in turn."""
    first = products[0]
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(columns, first.width, device=device).bfloat16()
    dtype = torch.float32 if first.epilogue == LOGITS else torch.bfloat16
    out = torch.zeros(columns, first.outputs, device=device, dtype=dtype)
    squares = torch.ones(columns, device=device, dtype=torch.float64)
    after = None
    if first.epilogue == RESIDUAL:
        after = NextNorm(torch.ones_like(out[0]), torch.empty_like(out), torch.zeros_like(squares))
    times: dict[Form, float] = {}
    forms = first.forms(columns)
    wanted = [first.built(form, columns) for form in forms if form != LIBRARY]
    cuda.compile_all([("linear.cu", defines) for defines in wanted])
    for form in forms:

        def run(form: Form = form) -> None:
            for product in products:
                product(form, x, out, squares=squares, eps=1e-6, after=after)

        times[form] = graph_seconds(run, repeats) / len(products)
    return times


def graph_seconds(run: Callable[[], None], repeats: int) -> float:
    """Seconds of the fastest of some replays of what a function launches."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    best = float("inf")
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return best
