"""The fastest forms of a step's kernels on the device at hand: measured where they run.

How fast a kernel is depends on its neighbours: it starts while the one before it ends, in what room
that one leaves, and reads at its cost. So forms are compared in a step of the model itself, one
kind of kernel after the other: all, then the best with more or less of a lead for the next kernel
or held back (attention also with more or less brought near), then the best of these. What is found
is kept in the cache folder by device name.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from qatbench import store
from qatbench.engine import cuda
from qatbench.engine.attention import RESTS, Attention, attentions
from qatbench.engine.form import LIBRARY, Card, Form
from qatbench.engine.products import Product, compile_all, shared_by
from qatbench.engine.step import Chosen, Step

LAYERS = 12  # of a step that is timed
STEPS, REPEATS = 8, 3
AGAIN = 4  # of each kind, that are compared again
NEAR = (0, 2, 4, 8)  # KB, see `Attention`
FEW = 16  # bytes a thread that may lie outside registers
_SOURCES = ("linear.cu", "kept.cu", "attention.cu", "grouped.cu", "small.cu")


def choose(step: Step, progress: Callable[[int, int], None] | None = None) -> Chosen:
    """The forms for a step: from the cache, or measured in it. The step goes no further.

    Raises: PrerequisiteError where a kernel does not compile.
    """
    chosen = _chosen(step, progress)
    if len(step.token) == 1 and not chosen.screened:  # more rows never have it
        step.fused.drop_screen()
    return chosen


def _chosen(step: Step, progress: Callable[[int, int], None] | None) -> Chosen:
    file, key = _file(), _key(step)
    known = store.read_json(file) if file.exists() else {}
    if key not in known:
        _measure(step, progress or (lambda done, total: None))
        known = store.read_json(file) if file.exists() else {}  # of other processes
        store.write_json(file, known | {key: _told(step)})
        return step.chosen
    kept = known[key]
    products = {
        id(product): Form(**kept["products"][kind])
        for kind, alike in step.fused.kinds(len(step.token)).items()
        for product in alike
    }
    step.chosen = Chosen(products, Attention(**kept["attention"]), kept["screened"])
    return step.chosen


def _file() -> Any:
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    digests = "-".join(cuda.digest(source) for source in _SOURCES)
    return store.cache_folder() / "kernels" / f"forms-{name}-{digests}.json"


def _key(step: Step) -> str:
    s, rows = step.fused.decoder.sizes, len(step.token)
    heads = f"{s.kv_heads} x {s.group} heads of {s.head}, columns {shared_by(rows)}"
    return "; ".join([*step.fused.kinds(rows), heads])


def _told(step: Step) -> dict[str, Any]:
    kinds = step.fused.kinds(len(step.token)).items()
    products = {kind: asdict(step.chosen.products[id(alike[0])]) for kind, alike in kinds}
    chosen = step.chosen
    return {
        "products": products, "attention": asdict(chosen.attention), "screened": chosen.screened,
    }  # fmt: skip


def _measure(step: Step, progress: Callable[[int, int], None]) -> None:
    progress(0, 0)  # kernels are compiled first
    rows, layers = len(step.token), range(min(LAYERS, step.fused.decoder.sizes.layers))
    kinds = [_products(step, alike) for alike in step.fused.kinds(rows).values()]
    if rows == 1:
        kinds[-2:] = [_either(step, *kinds[-2:])]
    forms = _attentions_without_spills(step, rows)
    kinds.insert(1, _Kind(functools.partial(_take_attention, step), forms, _nearer))
    done, total = 0, sum(map(_most, kinds))
    for turn in (lambda kind: kind.forms, _Kind.varied, lambda kind: kind.forms):
        for kind in kinds:
            times = {}
            for form in turn(kind):
                progress(done, total)
                done += 1
                kind.take(form)
                times[form] = _seconds(step, layers)
            best = sorted(times, key=lambda form: times[form])
            kind.take(best[0])
            kind.forms = best[:AGAIN]
    progress(total, total)


def _products(step: Step, alike: list[Product]) -> _Kind:
    return _Kind(
        functools.partial(_take_form, step, alike),
        [one for form in _without_spills(alike[0], len(step.token)) for one in _held(form)],
        functools.partial(_led, earliest=alike[0].leads),
    )


def _either(step: Step, head: _Kind, screen: _Kind) -> _Kind:
    """A head or its screen: forms have beside them which of them they are of."""
    of = {False: head, True: screen}

    def take(form: tuple[bool, Form]) -> None:
        step.chosen.screened = form[0]
        of[form[0]].take(form[1])

    forms = [(which, form) for which in of for form in of[which].forms]
    return _Kind(take, forms, lambda form: [(form[0], one) for one in of[form[0]].vary(form[1])])


@dataclass
class _Kind:
    """Kernels that share a form."""

    take: Callable[[Any], None]
    forms: list[Any]  # that are compared
    vary: Callable[[Any], list[Any]]  # a form, and with other starts of it and the next kernel

    def varied(self) -> list[Any]:
        return [one for form in self.forms for one in self.vary(form)]


def _most(kind: _Kind) -> int:
    """Measurements in all turns; some fewer where the best forms vary less than others."""
    kept = min(len(kind.forms), AGAIN)
    return len(kind.forms) + kept * max(len(kind.vary(form)) for form in kind.forms) + AGAIN


def _led(form: Form, earliest: int) -> list[Form]:
    """Every lead, and half of the first spans held back."""
    if form == LIBRARY:
        return [form]
    leads = {*range(earliest, 2), form.depth // 2, form.depth, 2 * form.depth}
    led = [replace(form, lead=lead) for lead in sorted(leads)]
    return [*led, replace(form, held_back=form.depth // 2)]


def _held(form: Form) -> list[Form]:
    """Nothing or all of its first spans held back."""
    return [form] if form == LIBRARY else [form, replace(form, held_back=form.depth)]


def _nearer(form: Attention) -> list[Attention]:
    rests = RESTS if form.warps and form.splits > 1 else (0,)
    every = itertools.product((False, True), NEAR, rests)
    return [replace(form, late=late, near=near, rest=rest) for late, near, rest in every]


def _take_form(step: Step, alike: list[Product], form: Form) -> None:
    step.chosen.products |= {id(product): form for product in alike}


def _take_attention(step: Step, form: Attention) -> None:
    step.chosen.attention = form


def _seconds(step: Step, layers: range) -> float:
    """Of one step after another, as it will be: the fastest of some."""
    graph = cuda.captured(lambda: step.launch_for_nothing(layers))
    return min(cuda.seconds_of(graph, STEPS) for _ in range(REPEATS))


def _without_spills(product: Product, rows: int) -> list[Form]:
    """Forms whose registers suffice, almost, or those that lack the fewest where none's do."""
    every = product.forms(rows, Card.current())
    own = [form for form in every if form != LIBRARY]
    compile_all([(product, form) for form in own], rows)
    kernels = {form: product.build(form, rows) for form in own}
    return [form for form in every if form == LIBRARY] + _with_room(kernels)


def _attentions_without_spills(step: Step, rows: int) -> list[Attention]:
    every = attentions(step.fused, rows)
    norms = step.fused.layers[0].q_norm is not None
    sizes = step.fused.decoder.sizes
    cuda.compile_all(
        (form.source[0], form.defines(sizes.group, sizes.head, norms)) for form in every
    )
    kernels = {form: step.attention_kernel(form, norms) for form in every}
    return _with_room(kernels)


def _with_room(kernels: Mapping[Any, cuda.Kernel]) -> list[Any]:
    """Forms that the device takes and whose registers suffice, almost, or lack the fewest."""
    spilled = {form: kernel.spilled for form, kernel in kernels.items() if kernel.fits}
    most = max(FEW, min(spilled.values(), default=0))
    return [form for form in spilled if spilled[form] <= most]
