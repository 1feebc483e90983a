"""AutoRound: this project's way of driving auto-round against the library called directly.

Both tune the same decoder layers (random weights of LLaVA-1.5-7B's shapes) on the same samples,
each with an image (576 visual tokens) and a text of its own length, or of one length (`--equal`),
which is what the library needs to put samples together. The library's own run includes its
calibration, ours the capture of layer inputs; neither packs or saves. The error is that of the last
layer's output on all samples, squared, relative to the layers' whole update. The time of all 32
layers is an extrapolation, and too long: what both compile at first is in it.

    python benchmarks/autoround_time.py [--layers 4] [--samples 32] [--iters 200] [--equal] [--tiny]
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from train_step import LLAVA, PATCHES, TINY, build, llava_config

from qatbench.quant import autoround, layer_tuning
from qatbench.quant.backends import quiet
from qatbench.quant.grid import Grid
from qatbench.vlm import layout

LAYERS = "model.language_model.layers"
Batches = list[dict[str, Tensor]]


def samples(count: int, equal: bool, words: int, side: int, device: str) -> Batches:
    """Model inputs: an image token for every patch, then 24 to 152 random words."""
    rng = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        length = 88 if equal else 24 + index * 128 // max(1, count - 1)
        text = torch.randint(2, words, (1, length), generator=rng)
        ids = torch.cat([torch.ones(1, PATCHES**2, dtype=torch.long), text], 1)
        pixels = torch.randn(1, 3, side, side, generator=rng)
        made.append({"input_ids": ids, "pixel_values": pixels})
    return [{k: v.to(device) for k, v in sample.items()} for sample in made]


@torch.no_grad()
def outputs(model: Any, batches: Batches) -> tuple[list[Tensor], list[Tensor]]:
    """(what the layers make of a sample, what they add to it)."""
    layers = model.get_submodule(LAYERS)
    entered: list[Tensor] = []
    left: list[Tensor] = []
    hooks = [
        layers[0].register_forward_pre_hook(
            lambda m, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        layers[-1].register_forward_hook(
            lambda m, args, out: left.append(out[0] if isinstance(out, tuple) else out)
        ),
    ]
    for batch in batches:
        pixels = batch["pixel_values"].to(model.dtype)
        model(**(batch | {"pixel_values": pixels}), use_cache=False)
    for hook in hooks:
        hook.remove()
    return left, [b - a for a, b in zip(entered, left, strict=True)]


def measured(what: Callable[[], Any], device: str) -> tuple[Any, dict[str, float]]:
    """Result, seconds and peak memory."""
    gc.collect()
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    result = what()
    if cuda:
        torch.cuda.synchronize()
    figures = {"seconds": round(time.monotonic() - started, 1)}
    if cuda:
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return result, figures


def library_alone(model: nn.Module, batches: Batches, given: argparse.Namespace) -> nn.Module:
    """auto-round's own run with its defaults, on the samples as they are."""
    together = 8 if given.equal else 1
    with quiet():
        session = layer_tuning.load().AutoRound(
            model, tokenizer="", processor=SimpleNamespace(chat_template=None),
            bits=given.bits, group_size=given.group_size, sym=True,
            iters=given.iters, dataset=batches, nsamples=len(batches), seqlen=1,
            batch_size=together, gradient_accumulate_steps=8 // together,
            device_map=given.device, amp=given.dtype != "float32",
        )  # fmt: skip
        tuned: nn.Module = session.quantize()[0]
    return tuned.to(given.device)


def ours(model: nn.Module, batches: Batches, given: argparse.Namespace) -> Mapping[str, Tensor]:
    """This project's: dense weights of the integers."""
    names = list(layout.linear_shapes(model.config.to_dict()))
    found = autoround.solve(
        model, names, Grid(given.bits, given.group_size), batches, iterations=given.iters,
        device=given.device, dtype=getattr(torch, given.dtype),
        progress=lambda done, total: None,
    )  # fmt: skip
    return found.weights()


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--equal", action="store_true", help="texts of one length")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU tunes in seconds")
    given = parser.parse_args()
    sizes = (TINY["student"] if given.tiny else LLAVA["7B"])[:2]
    rest = (TINY["student"] if given.tiny else LLAVA["7B"])[3:]
    config = llava_config((*sizes, given.layers, *rest), given.tiny)
    model = build(config, torch.device(given.device)).to(getattr(torch, given.dtype)).eval()
    words = config.text_config.vocab_size
    batches = samples(given.samples, given.equal, words, 14 * PATCHES, given.device)
    batches = [b | {"pixel_values": b["pixel_values"].to(model.dtype)} for b in batches]
    wanted, update = outputs(model, batches)
    size = sum(value.double().square().sum() for value in update)

    def error(tuned: nn.Module) -> float:
        got, _ = outputs(tuned, batches)
        wrong = sum(
            (a.double() - b.double()).square().sum() for a, b in zip(got, wanted, strict=True)
        )
        return float(f"{(wrong / size).item():.4g}")

    figures: dict[str, Any] = vars(given) | {"torch": torch.__version__}
    weights, figures["ours"] = measured(lambda: ours(model, batches, given), given.device)
    tuned = copy.deepcopy(model)
    tuned.load_state_dict({k: v.to(model.dtype) for k, v in weights.items()}, strict=False)
    figures["ours"]["error"] = error(tuned)
    print(json.dumps(figures["ours"]), file=sys.stderr, flush=True)
    del tuned, weights
    tuned, figures["library"] = measured(lambda: library_alone(model, batches, given), given.device)
    figures["library"]["error"] = error(tuned)
    figures["ours_over_library"] = round(
        figures["ours"]["seconds"] / figures["library"]["seconds"], 2
    )
    minutes = figures["ours"]["seconds"] / given.layers * LLAVA["7B"][2] / 60
    figures["extrapolated_whole_model_minutes"] = round(minutes, 1)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
