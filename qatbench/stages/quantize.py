"""quantize: a 16-bit model -> a packed checkpoint, by any PTQ method, without training."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qatbench import store
from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.quant import autoround, awq, layer_tuning
from qatbench.quant.backends import solve
from qatbench.quant.grid import Grid
from qatbench.quant.result import Layout, Quantized, layout_of
from qatbench.quant.rtn import round_to_nearest
from qatbench.records import Question
from qatbench.stages import card, export
from qatbench.stages.common import Progress
from qatbench.stages.layer_error import compare_layers
from qatbench.tasks import protocols, selector
from qatbench.tasks.selector import Selector
from qatbench.tasks.sources import Item
from qatbench.vlm import layout
from qatbench.vlm import load as models
from qatbench.vlm.batch import Encoder
from qatbench.vlm.load import Loaded, ModelFolder

Method = Literal["rtn", "gptq", "awq", "autoround"]
# Samples put together; AWQ judges the scales before attention on the last batch alone.
CALIBRATION_BATCH = 8


@dataclass(frozen=True)
class QuantizeSettings:
    """Method, grid and calibration."""

    method: Method
    bits: int = 4
    group_size: int = 128
    calibration: Selector | None = None
    samples: int = 128
    protocol: str = "qatbench"
    seed: int = 0
    device: str | None = None
    dtype: str | None = None  # of weights and activations while calibrating; default float32
    batch_size: int = CALIBRATION_BATCH  # samples at once, with images 1; of a step in AutoRound
    layout: Layout = "auto"  # of the checkpoint's tensors
    iters: int = autoround.ITERATIONS  # steps a decoder layer, of AutoRound alone

    def spec(self, model: str, questions: Sequence[Question]) -> dict[str, Any]:
        """What decides the checkpoint; `model` is its fingerprint."""
        spec: dict[str, Any] = {
            "model": model,
            "method": self.method,
            "bits": self.bits,
            "group_size": self.group_size,
        }
        if self.layout != "auto":
            spec["layout"] = self.layout
        if self.method != "rtn":
            spec |= {
                "calibration": selector.digest(questions),
                "protocol": self.protocol,
                "samples": len(questions),
                "batch_size": self.batch_size,
                "dtype": self.dtype or "float32",
            }
        if self.method == "autoround":
            spec["iters"] = self.iters
        return spec


def quantize(
    model: ModelFolder,
    settings: QuantizeSettings,
    paths: Mapping[str, str],
    out: Path,
    *,
    resume: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Quantize the language model's linears and write a proven checkpoint; returns provenance.

    Raises: UsageError for a grid or layout that does not fit, or a model that is quantized already;
        PrerequisiteError without calibration data; NumericsError when the reload proof fails.
    """
    started = time.monotonic()
    check_grid(model, settings.bits, settings.group_size)
    layout_of(settings.layout, settings.method, settings.bits)
    questions = [] if settings.method == "rtn" else calibration_questions(settings, paths)
    _check_images(model, questions)
    device = models.pick_device(settings.device)
    dtype = models.pick_dtype(settings.dtype or "float32", device)
    tuned = settings.method == "autoround"
    if tuned:
        layer_tuning.check(dtype)
    folder = store.RunFolder(out, "quantize", settings.spec(model.fingerprint(), questions))
    if folder.begin(resume=resume) is store.State.DONE:
        return store.read_json(out / store.PROVENANCE)
    grid = Grid(settings.bits, settings.group_size)
    progress("Loading the model", 0, 0)
    loaded = models.load(model, device="cpu", dtype=torch.float32)  # parts visit the device
    names = list(layout.linear_shapes(model.config))
    progress("Encoding calibration samples", 0, len(questions))
    batches = calibration_batches(loaded, questions, settings.protocol)
    pad = loaded.tokenizer.pad_token_id or 0
    grouped = batches if tuned else together(batches, settings.batch_size, pad)
    solving = time.monotonic()
    quantized = _solve(settings, model, loaded, names, grid, grouped, device, dtype, progress)
    solved = time.monotonic() - solving
    figures: dict[str, Any] = {
        "method": settings.method,
        "bits": settings.bits,
        "group_size": settings.group_size,
        "layout": quantized.layout,
        "label": model.figures.get("label"),
        "calibration_seconds": round(solved, 3),
        "samples_seen": len(batches),
        "device": device,
        "notes": notes(model, questions) + _search_note(settings.method, grouped),
    }
    if settings.method != "rtn":
        progress("Comparing layer errors with RTN", 0, 0)
        figures["layers"] = compare_layers(loaded, quantized, grid, batches, device)
    progress("Writing and reloading the checkpoint", 0, 0)
    seed = settings.seed if questions else None
    figures["origin"] = card.origin(model, _data(settings, questions, paths), seed)
    figures |= export.write_packed(model, loaded, quantized, out, figures, device=device)
    figures["making_seconds"] = round(solved, 3)
    inputs = {"model": {"name": Path(model.name).name, "fingerprint": model.fingerprint()}}
    seconds, machine = time.monotonic() - started, models.machine(device)
    return folder.finish(inputs=inputs, seconds=seconds, machine=machine, figures=figures)


def _solve(
    settings: QuantizeSettings,
    model: ModelFolder,
    loaded: Loaded,
    names: Sequence[str],
    grid: Grid,
    batches: Sequence[dict[str, Tensor]],
    device: str,
    dtype: torch.dtype,
    progress: Progress,
) -> Quantized:
    what = f"Quantizing with {settings.method.upper()}"

    def step(done: int, total: int) -> None:
        progress(what, done, total)

    chosen = layout_of(settings.layout, settings.method, settings.bits)
    if settings.method == "rtn":
        return replace(round_to_nearest(loaded.model, names, grid, step, device), layout=chosen)
    if settings.method == "autoround":
        tuned = autoround.solve(
            loaded.model, names, grid, batches, iterations=settings.iters,
            samples_a_step=settings.batch_size, device=device, dtype=dtype, progress=step,
        )  # fmt: skip
        return replace(tuned, layout=chosen)
    return solve(
        settings.method, model.path, names, grid, batches,
        device=device, layout=chosen, dtype=dtype, progress=step,
    )  # fmt: skip


def check_grid(model: ModelFolder, bits: int, group_size: int) -> None:
    """Refuse a grid that does not fit, or a model that is quantized already.

    Raises: UsageError naming the layers.
    """
    if model.quantization:
        raise UsageError(
            f"{model.name} is quantized already", hint="give the 16-bit model it was made from"
        )
    problems = layout.grid_problems(model.config, bits, group_size)
    if problems:
        raise UsageError("; ".join(problems), hint="choose a group size that divides every layer")


def calibration_questions(settings: QuantizeSettings, paths: Mapping[str, str]) -> list[Question]:
    """`samples` questions drawn with the seed from the calibration split.

    Raises: PrerequisiteError when no split is named; UsageError when it is smaller.
    """
    if settings.calibration is None:
        raise PrerequisiteError(
            f"{settings.method} needs calibration data", hint="--calib scienceqa:train"
        )
    rows = selector.load(settings.calibration, paths)
    if len(rows) < settings.samples:
        raise UsageError(
            f"{settings.calibration} has {len(rows)} questions, {settings.samples} are asked for",
            hint="lower --samples",
        )
    return random.Random(settings.seed).sample(rows, settings.samples)


def _check_images(model: ModelFolder, questions: Sequence[Question]) -> None:
    """Find what would stop the calibration before the folder is begun.

    Raises: UsageError for an image question and a text model; PrerequisiteError for a missing file.
    """
    for question in questions:
        if question.image is None:
            continue
        if not model.arch.is_vlm:
            raise UsageError(
                f"{model.name} is a text model, but the calibration data hold images",
                hint="pick the text subset, e.g. scienceqa:train:text",
            )
        if isinstance(question.image, Path) and not question.image.is_file():
            raise PrerequisiteError(
                f"missing image of calibration question {question.id}",
                hint="complete the data, or calibrate on the text subset",
            )


def calibration_batches(
    loaded: Loaded, questions: Sequence[Question], protocol: str
) -> list[dict[str, Tensor]]:
    """Each question with its right answer, in the very form of the evaluation, unpadded.

    Raises: ArtifactError when a question has no gold answer.
    """
    encoder = Encoder(loaded)
    chosen = protocols.get(protocol)
    batches = []
    for question in questions:
        if question.gold is None:
            raise ArtifactError(f"calibration question {question.id} has no answer")
        prompt = encoder.prompt(chosen.prompt(question), question.image)
        answer = encoder.answer(prompt, chosen.continuation(question, question.gold))
        inputs = prompt.inputs(answer)
        if prompt.places is not None:
            # The library keeps a list of positions, which must not miss those of some samples:
            # left to itself, Qwen3-VL hands some down with text only and none with an image.
            inputs["position_ids"] = prompt.positions(len(answer))[:, None]
        batches.append(inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])})
    return batches


def together(batches: Sequence[dict[str, Tensor]], size: int, pad: int) -> list[dict[str, Tensor]]:
    """Put text samples of like length together, padded on the right; the library masks padding.

    The batch of middling length comes last, where AWQ takes whole sequences from. Samples with
    images stay alone: the library calibrates VLMs on unpadded batches of one.
    """
    if any("pixel_values" in batch for batch in batches):
        return list(batches)
    ordered = sorted(batches, key=lambda batch: batch["input_ids"].shape[1])
    groups = [_padded(ordered[i : i + size], pad) for i in range(0, len(ordered), size)]
    middle = len(groups) // 2
    return groups[:middle] + groups[middle + 1 :] + groups[middle : middle + 1]


def _padded(batches: Sequence[dict[str, Tensor]], pad: int) -> dict[str, Tensor]:
    length = max(batch["input_ids"].shape[1] for batch in batches)

    def stack(key: str, value: int) -> Tensor:
        rows = [batch[key] for batch in batches]
        return torch.cat([F.pad(row, (0, length - row.shape[1]), value=value) for row in rows])

    return {"input_ids": stack("input_ids", pad), "attention_mask": stack("attention_mask", 0)}


def _data(
    settings: QuantizeSettings, questions: Sequence[Question], paths: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Name, number and place of the calibration samples, for the record."""
    if settings.calibration is None or not questions:
        return []
    place = selector.place(settings.calibration.task, paths)
    return [{"name": str(settings.calibration), "n": len(questions), "place": place}]


def _search_note(method: str, grouped: Sequence[dict[str, Tensor]]) -> list[str]:
    """What a reader must know of AWQ's searches: no sample is seen whole but the last ones."""
    if method != "awq":
        return []
    seen, whole = sum(len(batch["input_ids"]) for batch in grouped), len(grouped[-1]["input_ids"])
    return [
        f"AWQ: scales before attention from {whole} whole samples, other scales and clips from up "
        f"to {awq.TOKENS} tokens of all {seen}"
    ]


def notes(model: ModelFolder, samples: Sequence[Item]) -> list[str]:
    """What a reader of the report must know about the calibration or training data."""
    if model.arch.is_vlm and samples and not any(map(_has_image, samples)):
        return ["text-only data for a vision-language model"]
    return []


def _has_image(sample: Item) -> bool:
    return sample.has_image if isinstance(sample, Question) else bool(sample.images)
