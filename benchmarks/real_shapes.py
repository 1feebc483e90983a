"""Checkpoints at true sizes: time and memory of quantizing, and one whole model end to end.

ptq    4 of the 32 layers of LLaVA-1.5-7B, random weights: seconds and peak GPU memory of each PTQ
       method by `qatbench quantize` and by its library called directly on the same samples, side
       by side, in turns; and, marked so, the whole model by extrapolation (times 32 / 4). Both ran
       once before on one layer, where much is imported and made ready. Two ratios of medians:
       solving (ours: load, calibrate, solve; the library's: load, calibrate, solve, pack), and the
       whole verb, with layer errors and the reload proof, over the library's way, with saving.
       Host memory is written to once before: a machine that gives memory at its first use would
       charge it to whichever way asks for it first. `loading_seconds` is the part of solving that
       the library takes to read the model, the same call in both.
whole  LLaVA-1.5-7B and Qwen2-VL-2B, random weights: RTN, export with its reload proof, reload with
       plain transformers on the GPU, an answer about an image; memory of weights, INT4 and bf16.

AutoRound against its library: benchmarks/autoround_time.py. `--backend` is the library's kernel for
the INT4 checkpoint on a GPU: left to itself it may want to download or compile another for minutes.

    python benchmarks/real_shapes.py [ptq] [whole] [--method M ...] [--model M ...] [--samples 128]
        [--rounds 3] [--tiny] [--backend gptq_triton] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import tiny  # noqa: E402
import train_step  # noqa: E402
from kept import show  # noqa: E402
from solving import Phases, measured, touch, watched  # noqa: E402

from qatbench.quant import backends  # noqa: E402
from qatbench.quant.grid import Grid  # noqa: E402
from qatbench.stages import quantize as stage  # noqa: E402
from qatbench.tasks import selector  # noqa: E402
from qatbench.vlm import load as models  # noqa: E402
from qatbench.vlm.batch import Encoder  # noqa: E402
from qatbench.vlm.load import ModelFolder  # noqa: E402

LAYERS, LLAVA_LAYERS = 4, 32
TOUCHED = 40  # GB of host memory
MODELS = ("llava", "qwen2_vl")
GROUP = {False: 128, True: 64}  # by --tiny
QUESTION = "What is in the picture?"


def build(kind: str, folder: Path, small: bool, layers: int | None, device: str) -> ModelFolder:
    """A model of random bf16 weights with a processor, as a folder."""
    import transformers

    qwen = kind == "qwen2_vl"
    sizes = list(train_step.QWEN["2B"] if qwen else train_step.LLAVA["7B"])
    sizes = list(train_step.TINY["student"]) if small else sizes
    if layers:
        sizes[2] = layers
    family = train_step.qwen_config if qwen else train_step.llava_config
    config = family(tuple(sizes), small)
    words = tiny.tokenizer(image_token=not qwen, turns=qwen)
    if qwen:
        for key, value in tiny._marks(words).items():
            setattr(config, key, value)
        grid = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
        processor: Any = transformers.Qwen2VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(**grid), tokenizer=words,
            video_processor=transformers.Qwen2VLVideoProcessor(**grid),
            chat_template=tiny.QWEN_TEMPLATE,
        )  # fmt: skip
    else:
        config.image_token_id = words.convert_tokens_to_ids("<image>")
        side = {"height": 14 * train_step.PATCHES, "width": 14 * train_step.PATCHES}
        processor = transformers.LlavaProcessor(
            image_processor=transformers.CLIPImageProcessor(
                size={"shortest_edge": side["width"]}, crop_size=side
            ),
            tokenizer=words, patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=tiny.TEMPLATE,
        )  # fmt: skip
    model = train_step.build(config, torch.device(device))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return models.find(str(folder))


# --- four layers, every PTQ method ----------------------------------------------------------------


def directly(
    method: str, folder: ModelFolder, batches: list[dict[str, Any]], grid: Grid, device: str
) -> float:
    """The library's own way: load, quantize, pack, save. The samples are the same.

    Returns: the seconds before saving.
    """
    started = time.monotonic()
    with (
        backends._elsewhere(), backends.quiet(), backends._failing_softly(),
        tempfile.TemporaryDirectory() as out,
    ):  # fmt: skip
        model = backends._load(
            method, folder.path, grid, device, torch.bfloat16, symmetric=method == "gptq"
        )
        backends._tidy_table(model)
        model.prepare_dataset = lambda *args, **kwargs: [dict(batch) for batch in batches]
        # The plain kernel's packing: others are compiled for minutes, or downloaded, at first use.
        backend = getattr(backends._library().BACKEND, f"{method.upper()}_TORCH")
        model.quantize([{"input_ids": [0]}] * len(batches), batch_size=1, backend=backend)
        seconds = time.monotonic() - started
        model.save(out)
    return seconds


DIRECTLY: dict[str, Callable[..., float]] = {"gptq": directly, "awq": directly}


@dataclass
class Setup:
    """What both ways quantize, on what."""

    folder: ModelFolder
    settings: stage.QuantizeSettings
    data: dict[str, str]
    device: str

    def ours(self, out: Path) -> dict[str, Any]:
        """By the verb: seconds of all and of solving, peak memory, phases."""
        found: dict[str, Any] = {}
        phases = Phases()
        with measured(found), watched(found):
            record = stage.quantize(
                self.folder, self.settings, self.data, out, resume=False, progress=phases
            )
        solving = record["figures"]["calibration_seconds"]
        return found | {"solving_seconds": solving, "phases": phases.seconds()}

    def library(self) -> dict[str, Any]:
        """By the library called directly."""
        loaded = models.load(self.folder, device="cpu", dtype=torch.float32)
        questions = stage.calibration_questions(self.settings, self.data)
        batches = stage.calibration_batches(loaded, questions, self.settings.protocol)
        del loaded
        method, grid = self.settings.method, Grid(4, self.settings.group_size)
        found: dict[str, Any] = {}
        with measured(found), watched(found):
            solving = DIRECTLY[method](method, self.folder, batches, grid, self.device)
        return found | {"solving_seconds": round(solving, 1)}


def ptq(
    methods: list[str], samples: int, small: bool, device: str, rounds: int, layers: int = LAYERS
) -> list[dict[str, Any]]:
    """Ours and the library's in turn, each first in every other round; ratios of medians."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        folder = build("llava", root / "model", small, None if small else layers, device)
        data = {"scienceqa": str(tiny.save_questions(root / "data", text=0, images=samples))}
        chosen = selector.parse("scienceqa:train")
        for method in methods:
            settings = stage.QuantizeSettings(
                method, 4, GROUP[small], chosen, samples, device=device,  # type: ignore[arg-type]
                dtype="bfloat16",
            )  # fmt: skip
            setup = Setup(folder, settings, data, device)
            ways = ["ours", "library"] if method in DIRECTLY else ["ours"]
            found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
            first = -1 if method in DIRECTLY else 0  # before the rounds, to make all ready
            for at in range(first, rounds):
                for way in ways[:: 1 if at % 2 == 0 else -1]:
                    out = root / f"{method}-{at}"
                    run = setup.ours(out) if way == "ours" else setup.library()
                    told = way if at >= 0 else f"{way}, before the rounds"
                    print(told, json.dumps(run), file=sys.stderr, flush=True)
                    if at >= 0:
                        found[way].append(run)
            rows.append({"method": method} | found | _summary(found, layers))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _summary(found: dict[str, list[dict[str, Any]]], layers: int) -> dict[str, Any]:
    def middle(way: str, figure: str) -> float:
        return statistics.median(run[figure] for run in found[way])

    minutes = middle("ours", "solving_seconds") * LLAVA_LAYERS / layers / 60
    summary = {"extrapolated_whole_model_minutes": round(minutes, 2)}
    if "library" in found:
        for name, figure in (("solving", "solving_seconds"), ("verb", "seconds")):
            ratio = middle("ours", figure) / middle("library", figure)
            summary[f"{name}_over_library"] = round(ratio, 2)
    for way, runs in found.items():
        if names := runs[0].get("regions"):
            summary[f"regions_{way}"] = {
                name: round(statistics.median(run["regions"].get(name, 0.0) for run in runs), 2)
                for name in names
            }
    return summary


# --- whole models ---------------------------------------------------------------------------------


def plainly(path: Path, device: str, dtype: torch.dtype, backend: str) -> Any:
    """A folder as plain transformers loads it, packed linears with the named kernel."""
    import transformers

    folder = models.find(str(path))
    how: dict[str, Any] = {}
    if folder.quantization and device == "cuda":
        how["quantization_config"] = transformers.GPTQConfig(bits=4, backend=backend)
    backends.prepare_import()
    with backends.quiet():
        model, info = getattr(transformers, folder.arch.auto_class).from_pretrained(
            path, dtype=dtype, device_map=device, output_loading_info=True, **how
        )
    models.check_loading_info(path, info)
    return models.Loaded(folder, model.eval(), *models.load_tokenizer(folder), "library")


def whole(kind: str, small: bool, device: str, backend: str) -> dict[str, Any]:
    """RTN, export, proof, reload on the device, an answer about an image."""
    found: dict[str, Any] = {"model": kind}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        folder = build(kind, root / "model", small, None, device)
        settings = stage.QuantizeSettings("rtn", 4, GROUP[small], device=device)
        phases = Phases()
        with measured(found.setdefault("quantize", {})):
            record = stage.quantize(
                folder, settings, {}, root / "out", resume=False, progress=phases
            )
        found["quantize"]["phases"] = phases.seconds()
        found["reload"] = record["figures"]["reload"]
        print(json.dumps(found), file=sys.stderr, flush=True)
        found["checkpoint_gb"] = models.find(str(root / "out")).weight_bytes() / 1e9
        picture = next(tiny.save_questions(root / "data").glob("images/**/*.png"))
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        for name, path in (("bf16", folder.path), ("int4", root / "out")):
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            with measured(found.setdefault(name, {})):
                loaded = plainly(path, device, dtype, backend)
            after = torch.cuda.memory_allocated() if device == "cuda" else 0
            found[name] |= {"weights_gb": (after - before) / 1e9,
                            "kernel": models.kernel_name(loaded)}  # fmt: skip
            prompt = Encoder(loaded).prompt(QUESTION, picture)
            inputs = {key: value.to(device) for key, value in prompt.inputs().items()}
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
            with torch.inference_mode():
                tokens = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
            found[name]["answer"] = tokens[0, inputs["input_ids"].shape[1] :].tolist()
            del loaded, tokens
    return found


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", help="ptq, whole; default both")
    parser.add_argument("--method", nargs="+", default=["gptq", "awq", "autoround"])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS, help="of `whole`")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="of `ptq`, in turns")
    parser.add_argument("--backend", default="gptq_triton", help="kernel of the INT4 checkpoint")
    parser.add_argument("--tiny", action="store_true", help="a smoke test of small sizes, any CPU")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    wanted = given.what or ["ptq", "whole"]
    if unknown := set(wanted) - {"ptq", "whole"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    cuda = torch.cuda.is_available()
    if not cuda and not given.tiny:
        parser.error("true sizes need a CUDA device; --tiny runs anywhere")
    device = "cuda" if cuda else "cpu"
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if cuda else "cpu",
                             "torch": torch.__version__}  # fmt: skip
    if "ptq" in wanted:
        if not given.tiny:
            touch(TOUCHED)
            uncompared = [method for method in given.method if method not in DIRECTLY]
            ptq(uncompared, 4, False, device, 1, layers=1)
        found["ptq"] = ptq(given.method, given.samples, given.tiny, device, given.rounds)
    if "whole" in wanted:
        kinds = given.model
        found["whole"] = [whole(kind, given.tiny, device, given.backend) for kind in kinds]
    show(found, given.json)


if __name__ == "__main__":
    main()
