"""Decoding and prefill of INT4 against bf16, at true sizes with random weights, on one GPU.

Three ways of running one model, side by side in one run and in turns: plain transformers in bf16
(eager, DynamicCache), this project's engine in bf16, and the engine with INT4 weights (group 128,
symmetric). Ratios are of medians of seconds. Prompts are 656 tokens, of which 576 are a picture.

decode   seconds a token at each batch, by the wall clock, over 64 tokens a repeat
prefill  seconds from prompts to the first token, batch 8, pictures included
memory   of weights, with the language model's share and what the vision part takes
linears  every product of a step by itself, the engine's kernel and torch's: what is picked and why
error    of the INT4 step's logits against the same weights multiplied out in bf16 by torch

    python benchmarks/engine.py [llava] [qwen] [--batch 1 8 32] [--repeats 5] [--tiny] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

import train_step  # noqa: E402
from kept import show  # noqa: E402

from qatbench.engine import cuda  # noqa: E402
from qatbench.engine.arguments import NextNorm, Top  # noqa: E402
from qatbench.engine.fast import FastRunner  # noqa: E402
from qatbench.engine.form import LIBRARY, Card, Form  # noqa: E402
from qatbench.engine.plain import PlainRunner  # noqa: E402
from qatbench.engine.products import (  # noqa: E402
    LOGITS,
    RESIDUAL,
    SCREEN,
    Product,
    shared_by,
)
from qatbench.engine.runner import Runner  # noqa: E402
from qatbench.quant.grid import Grid, quantize, round_scales  # noqa: E402
from qatbench.quant.packing import Affine  # noqa: E402
from qatbench.vlm import layout  # noqa: E402
from qatbench.vlm.batch import Encoded, backbone  # noqa: E402
from qatbench.vlm.load import Loaded, ModelFolder  # noqa: E402

GRID = Grid(4, 128)
PROMPT, TOLD, PREFILL_ROWS = 656, 64, 8  # tokens, tokens, rows


def model(kind: str, tiny: bool) -> Loaded:
    """Random bf16 weights of the true shapes."""
    sizes = train_step.LLAVA["7B"] if kind == "llava" else train_step.QWEN["2B"]
    sizes = (256, 512, 2, 4, 4, 512) if tiny else sizes
    family = train_step.llava_config if kind == "llava" else train_step.qwen_config
    config = family(sizes, tiny)
    torch.manual_seed(0)
    built = train_step.build(config, torch.device("cuda")).eval()
    folder = ModelFolder(kind, Path(), config.to_dict(), {})
    return Loaded(folder, built, SimpleNamespace(pad_token_id=0), None, "dense")


def rounded(loaded: Loaded) -> dict[str, Affine]:
    """Every linear of the language model to 4 bits; its bf16 weight is let go."""
    found = {}
    for name in layout.linear_shapes(loaded.folder.config):
        module = loaded.model.get_submodule(name)
        weight = module.weight.data.float()
        groups = weight.view(len(weight), -1, GRID.group_size)
        scales = round_scales(groups.abs().amax(-1) / -GRID.qmin, GRID)
        codes = quantize(weight, scales, GRID)
        fields = (codes.to(torch.int16) - GRID.qmin).to(torch.uint8)
        zeros = torch.full_like(scales, -GRID.qmin, dtype=torch.uint8)
        found[name] = Affine(fields, zeros, scales.half())
        module.weight.data = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    return found


def prompts(loaded: Loaded, rows: int, tiny: bool) -> list[Encoded]:
    """A picture and random words, all prompts of one length."""
    config = loaded.folder.config
    words = layout.text_sizes(config)["vocab_size"]
    image, visual = 1, 576
    seed = torch.Generator().manual_seed(0)
    found = []
    for _ in range(rows):
        text = torch.randint(5, words, (PROMPT - visual,), generator=seed).tolist()
        if loaded.arch.mrope:
            pixels = {"pixel_values": torch.randn(4 * visual, 1176, generator=seed),
                      "image_grid_thw": torch.tensor([[1, 48, 48]])}  # fmt: skip
            ids = [3, *[image] * visual, 4, *text[2:]]
            kinds = torch.tensor([int(token == image) for token in ids])
            places, _ = backbone(loaded.model).get_rope_index(
                torch.tensor([ids]), mm_token_type_ids=kinds[None],
                image_grid_thw=pixels["image_grid_thw"],
            )  # fmt: skip
            found.append(Encoded(ids, "", pixels, places[:, 0], kinds))
        else:
            side = 14 * train_step.PATCHES
            pixels = {"pixel_values": torch.randn(1, 3, side, side, generator=seed)}
            found.append(Encoded([*text[:1], *[image] * visual, *text[1:]], "", pixels))
    return found


def seconds(work: Callable[[], Any]) -> float:
    """By the wall clock, the device's work included."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def spread(times: list[float]) -> dict[str, float]:
    """Median, fastest and slowest, in milliseconds."""
    middle = statistics.median(times)
    return {"ms": middle * 1e3, "min": min(times) * 1e3, "max": max(times) * 1e3}


def decode(ways: dict[str, Runner], rows: int, repeats: int, tiny: bool) -> dict[str, Any]:
    """Milliseconds a token of each way, in turns."""
    begun = {}
    for name, runner in ways.items():
        room = TOLD * (repeats + 1) + 2
        begun[name] = runner.start(prompts(runner.loaded, rows, tiny), room)
        runner.step(begun[name], 8)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, runner in ways.items():
            one = seconds(lambda r=runner, b=begun[name]: r.step(b, TOLD))  # type: ignore[misc]
            times[name].append(one / TOLD)
    found: dict[str, Any] = {name: spread(some) for name, some in times.items()}
    for name, some in found.items():
        some["tokens_per_second"] = rows / some["ms"] * 1e3
        some["cache_gb"] = ways[name].cache_bytes(begun[name]) / 1e9
    return found


def prefill(ways: dict[str, Runner], repeats: int, tiny: bool) -> dict[str, Any]:
    """Milliseconds from a batch of prompts to its first tokens."""
    asked = {name: prompts(runner.loaded, PREFILL_ROWS, tiny) for name, runner in ways.items()}
    for name, runner in ways.items():
        runner.start(asked[name], 2)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, runner in ways.items():
            times[name].append(seconds(lambda r=runner, a=asked[name]: r.start(a, 2)))  # type: ignore[misc]
    return {name: spread(some) for name, some in times.items()}


def linears(fast: FastRunner, rows: int) -> list[dict[str, Any]]:
    """Each kind of product: the form of a step and torch's, microseconds and bytes a second."""
    assert fast.fused
    found = []
    forms_of = fast.chosen[shared_by(rows)].products
    for kind, products in fast.fused.kinds(rows).items():
        if id(products[0]) not in forms_of:
            continue  # a screen that was dropped: the whole head was faster
        form, size = forms_of[id(products[0])], products[0].bytes()
        taken = by_itself(products, form, rows)
        forms = products[0].forms(rows, Card.current())
        one = {"kind": kind, "us": taken * 1e6, "gb_per_second": size / taken / 1e9,
               "form": vars(form), "forms": len(forms)}  # fmt: skip
        if LIBRARY in forms:
            one["torch_us"] = by_itself(products, LIBRARY, rows) * 1e6
        found.append(one)
    return found


def by_itself(products: Sequence[Product], form: Form, columns: int) -> float:
    """Seconds a product, in a graph of all layers' one after the other: none is in a cache."""
    first = products[0]
    x = torch.randn(columns, first.width, device="cuda").bfloat16()
    dtype = torch.float32 if first.epilogue in (LOGITS, SCREEN) else torch.bfloat16
    out = torch.zeros(columns, first.outputs, device="cuda", dtype=dtype)
    squares = torch.ones(columns, device="cuda", dtype=torch.float64)
    after = None
    if first.epilogue == RESIDUAL:
        after = NextNorm(torch.ones_like(out[0]), torch.empty_like(out), torch.zeros_like(squares))

    top = None
    if first.epilogue == SCREEN:
        top = Top(torch.zeros(1, dtype=torch.int64, device="cuda"), first.outputs)

    def run() -> None:
        for product in products:
            product(form, x, out, squares=squares, eps=1e-6, after=after, top=top)

    graph = cuda.captured(run)
    return min(cuda.seconds_of(graph) for _ in range(3)) / len(products)


@torch.inference_mode()
def error(fast: FastRunner, tiny: bool) -> dict[str, float]:
    """Of the logits of fused steps against the step in torch on the same weights."""
    slow = FastRunner(fast.loaded, kernels=False)
    asked = prompts(fast.loaded, 1, tiny)
    a, b = fast.start(asked, 18), slow.start(asked, 18)
    worst, spreads, differing, beyond = 0.0, [], 0, 0
    for _ in range(16):
        told = slow.step(b, 1)
        fast.step(a, 1)
        want, got = slow.last.float(), a.state.step.logits
        gap = (got - want).abs().max().item()
        worst, best = max(worst, gap), want.topk(2).values[0]
        spreads.append(want.std().item())
        if got.argmax() != want.argmax():
            differing += 1
            beyond += int((best[0] - best[1]).item() > 2 * gap)
        a.state.step.token.copy_(told[:, 0])
    return {
        "largest_over_spread": worst / statistics.mean(spreads), "steps": 16,
        "tokens_that_differ": differing, "of_them_with_a_gap_beyond_the_error": beyond,
    }  # fmt: skip


def whole(kind: str, batches: list[int], repeats: int, tiny: bool) -> dict[str, Any]:
    """All figures of one model."""
    loaded = model(kind, tiny)
    packed = rounded(other := model(kind, tiny))
    plain: Runner = PlainRunner(loaded)
    bf16, int4 = FastRunner(loaded), FastRunner(other, packed)
    gc.collect()
    torch.cuda.empty_cache()
    ways: dict[str, Runner] = {"transformers bf16": plain, "engine bf16": bf16, "engine int4": int4}
    found: dict[str, Any] = {"model": kind, "decode": {}}
    found["kernels"] = {name: runner.kernel for name, runner in ways.items()}
    for rows in batches:
        one = decode(ways, rows, repeats, tiny)
        one["int4_over_bf16"] = one["engine bf16"]["ms"] / one["engine int4"]["ms"]
        one["int4_over_transformers"] = one["transformers bf16"]["ms"] / one["engine int4"]["ms"]
        found["decode"][rows] = one
        print(rows, one, file=sys.stderr, flush=True)
    found["weights_gb"] = {name: runner.weight_bytes() / 1e9 for name, runner in ways.items()}
    found["prefill"] = prefill(ways, repeats, tiny)
    ms = {name: some["ms"] for name, some in found["prefill"].items()}
    found["prefill"]["int4_over_bf16"] = ms["engine bf16"] / ms["engine int4"]
    found["prefill"]["int4_over_transformers"] = ms["transformers bf16"] / ms["engine int4"]
    found["error"] = error(int4, tiny)
    print(found["prefill"], found["error"], file=sys.stderr, flush=True)
    found["linears"] = {rows: [linears(run, rows) for run in (bf16, int4)] for rows in batches[:2]}
    return found


def bandwidth() -> float:
    """Bytes a second that a large copy moves, read and written."""
    a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * a.numel() / min(seconds(lambda: b.copy_(a)) for _ in range(5))


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="*", help="llava, qwen; default both")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a smoke test of small sizes")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    kinds = given.model or ["llava", "qwen"]
    if unknown := set(kinds) - {"llava", "qwen"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("the kernels need a CUDA device")
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                             "copy_gb_per_second": bandwidth() / 1e9}  # fmt: skip
    found["models"] = []
    for kind in kinds:
        found["models"].append(whole(kind, given.batch, given.repeats, given.tiny))
        gc.collect()
        torch.cuda.empty_cache()
        show(found, given.json)  # a run that is cut off has the models that were measured


if __name__ == "__main__":
    main()
