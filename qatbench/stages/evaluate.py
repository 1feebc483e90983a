"""eval: a model and questions -> predictions.jsonl and metrics.json.

Questions are put into batches by length before any of them runs; each finished batch is appended
to `predictions.partial.jsonl`. A resumed run forms the same batches (`batching.json` holds the size
that was found) and repeats those that are not whole in that file, so it ends with the predictions
of an uninterrupted one; so do worker processes that each answer some of the batches.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qatbench import store
from qatbench.errors import ArtifactError, UsageError
from qatbench.records import Question
from qatbench.stages.answerer import answerer, check_engine
from qatbench.stages.answering import (
    PARTIAL,
    Batching,
    answer_all,
    collected,
    found_tokens,
)
from qatbench.stages.common import Progress
from qatbench.stages.metrics import summarize
from qatbench.stages.predictions import check_errors, write_predictions
from qatbench.stages.workers import Job, run_jobs
from qatbench.tasks import selector
from qatbench.tasks.controls import Images, with_images
from qatbench.tasks.selector import Selector
from qatbench.vlm import load as models
from qatbench.vlm.batch import Encoder
from qatbench.vlm.load import ModelFolder

BATCHING, LOGS = "batching.json", "logs"


@dataclass(frozen=True)
class EvalSettings:
    """What is asked, how it is put, and on what it runs."""

    selectors: tuple[Selector, ...]
    protocol: Mapping[str, str]  # task -> protocol name
    mode: Literal["options", "generate"] = "options"
    dtype: str | None = None
    kernel: Literal["auto", "library", "dense"] = "auto"
    engine: Literal["auto", "transformers", "qatbench"] = "auto"
    limit: int | None = None
    images: Images = "shown"
    seed: int = 0
    device: str | None = None
    batch_size: int | None = None
    max_errors: float = 0.01

    def spec(self, model: str, asked: Mapping[str, Sequence[Question]]) -> dict[str, Any]:
        """What decides the predictions: not the device, nor how questions are batched.

        `model` is its fingerprint. Images that are not there are named: see `run_folder`.
        """
        missing = [q.id for rows in asked.values() for q in rows if _image_missing(q)]
        return (
            {
                "model": model,
                "tasks": {name: selector.digest(rows) for name, rows in asked.items()},
                "protocol": dict(sorted(self.protocol.items())),
                "mode": self.mode,
                "dtype": self.dtype,
                "kernel": self.kernel,
                "limit": self.limit,
                "seed": self.seed if self.limit else None,
            }
            | ({"engine": self.engine} if self.engine != "auto" else {})
            | ({"missing_images": missing} if missing else {})
            | self._control()
        )

    def _control(self) -> dict[str, Any]:
        if self.images == "shown":
            return {}
        return {"images": self.images} | ({"seed": self.seed} if self.images == "shuffled" else {})


def questions_of(
    selectors: Iterable[Selector], paths: Mapping[str, str], limit: int | None, seed: int
) -> dict[str, list[Question]]:
    """Load what the selectors name; `limit` questions of each in a seeded order.

    Raises: UsageError when a selector picks nothing, or two pick the same question.
    """
    asked: dict[str, list[Question]] = {}
    for chosen in selectors:
        rows = selector.load(chosen, paths)
        if not rows:
            raise UsageError(f"no questions in {chosen}")
        asked[str(chosen)] = selector.limit(rows, limit, seed) if limit else rows
    keys = [(q.task, q.id) for rows in asked.values() for q in rows]
    if len(set(keys)) < len(keys):
        raise UsageError(
            f"{len(keys) - len(set(keys))} questions are asked twice: {', '.join(asked)}",
            hint="name parts that do not overlap",
        )
    return asked


def evaluate(
    model: ModelFolder,
    settings: EvalSettings,
    paths: Mapping[str, str],
    out: Path,
    *,
    resume: bool,
    progress: Progress,
    jobs: Sequence[Job] = (),
) -> dict[str, Any]:
    """Answer every question and write the run folder; returns its provenance.

    `jobs` are worker processes, each of which answers a part (`evaluate_part`).

    Raises: ArtifactError (no metrics.json is written) when more than `max_errors` of the
        questions ended in an error; UsageError for an image question and a text model.
    """
    started = time.monotonic()
    asked = _asked(model, settings, paths)
    device = models.pick_device(settings.device)
    dtype = models.pick_dtype(settings.dtype, device)
    folder = run_folder(out, settings, model.fingerprint(), asked)
    if folder.begin(resume=resume) is store.State.DONE:
        return _finished(out)
    batching = _batching(model, settings, out, device, dtype, max(1, len(jobs)))
    answered = time.monotonic()
    if jobs:
        run_jobs(jobs, len(jobs), out / LOGS, progress)
    progress("Loading the model", 0, 0)
    teller = answerer(settings, model, device, dtype, progress)
    loaded = teller.loaded
    answered = answered if jobs else time.monotonic()
    rows, now = answer_all(
        loaded, asked, settings.protocol, settings.mode, out / PARTIAL, progress, batching,
        teller.write,
    )  # fmt: skip
    seconds = time.monotonic() - answered
    write_predictions(rows, out, paths)
    check_errors(rows, settings.max_errors)
    names = {task: settings.protocol[task] for task in {row.task for row in rows}}
    timed = len(rows) if jobs else now
    metrics = summarize(rows, protocols=names, mode=settings.mode, seconds=seconds, timed=timed)
    store.write_json(out / "metrics.json", metrics.model_dump(mode="json"))
    record = folder.finish(
        inputs={"model": _model_record(model), "data": folder.spec["tasks"]},
        seconds=time.monotonic() - started,
        machine=models.machine(device),
        figures={
            **teller.record,
            "prompt_form": Encoder(loaded).form,
            "dtype": str(dtype).removeprefix("torch."),
            "batch_size": settings.batch_size or f"{batching.tokens} padded tokens",
            "data": {task: selector.place(task, paths) for task in names},
        }
        | ({"processes": len(jobs)} if jobs else {}),
    )
    _tidy(out)
    return record


def evaluate_part(
    model: ModelFolder,
    settings: EvalSettings,
    paths: Mapping[str, str],
    out: Path,
    part: tuple[int, int],
    progress: Progress,
) -> None:
    """Answer part k of n of an evaluation that another process has begun in `out`.

    Raises: UsageError when nothing was begun there; ArtifactError when it has other settings.
    """
    asked = _asked(model, settings, paths)
    folder = run_folder(out, settings, model.fingerprint(), asked)
    if folder.state() is not store.State.RESUME:
        raise UsageError(f"{out} holds no evaluation that was begun", hint="--jobs starts parts")
    device = models.pick_device(settings.device)
    if device == "cuda" and torch.cuda.device_count() > 1:
        device = f"cuda:{part[0] % torch.cuda.device_count()}"
    dtype = models.pick_dtype(settings.dtype, device)
    tokens = int(store.read_json(out / BATCHING)["tokens"])
    teller = answerer(settings, model, device, dtype, progress)
    batching = Batching(settings.batch_size, tokens, part)
    answer_all(
        teller.loaded, asked, settings.protocol, settings.mode, out / PARTIAL, progress, batching,
        teller.write,
    )  # fmt: skip


def _asked(
    model: ModelFolder, settings: EvalSettings, paths: Mapping[str, str]
) -> dict[str, list[Question]]:
    """What is asked, pictures as the control wants them."""
    check_engine(settings)
    asked = questions_of(settings.selectors, paths, settings.limit, settings.seed)
    asked = {
        name: with_images(rows, settings.images, settings.seed) for name, rows in asked.items()
    }
    refuse_images(model, asked)
    return asked


def _batching(
    model: ModelFolder, settings: EvalSettings, out: Path, device: str, dtype: torch.dtype, n: int
) -> Batching:
    """The size that was found when the folder was begun, for one that goes on too."""
    if not (out / BATCHING).exists():
        tokens = found_tokens(model, device, dtype, settings.mode, n)
        store.write_json(out / BATCHING, {"tokens": tokens})
    return Batching(settings.batch_size, int(store.read_json(out / BATCHING)["tokens"]))


def _tidy(out: Path) -> None:
    """Remove what an unfinished evaluation needs."""
    for file in (*collected(out / PARTIAL), out / BATCHING):
        file.unlink(missing_ok=True)
    shutil.rmtree(out / LOGS, ignore_errors=True)


def run_folder(
    out: Path, settings: EvalSettings, model: str, asked: Mapping[str, Sequence[Question]]
) -> store.RunFolder:
    """The folder of an evaluation; `model` is its fingerprint.

    An unfinished folder whose missing images have come since goes on as the same evaluation: only
    rows of those images were errors, and errors are tried again.
    """
    folder = store.RunFolder(out, "eval", settings.spec(model, asked))
    if (out / store.PROVENANCE).exists() or not (out / store.UNFINISHED).exists():
        return folder
    spec = store.read_json(out / store.UNFINISHED).get("spec", {})
    absent = set(spec.get("missing_images", ()))
    before = {name: [_absent(q) if q.id in absent else q for q in asked[name]] for name in asked}
    if absent and settings.spec(model, before) == spec and spec != folder.spec:
        store.write_json(
            out / store.UNFINISHED,
            {"stage": folder.stage, "fingerprint": folder.fingerprint, "spec": folder.spec},
        )
    return folder


def _image_missing(question: Question) -> bool:
    return isinstance(question.image, Path) and not question.image.is_file()


def _absent(question: Question) -> Question:
    """The question as it was when its image file was not there."""
    if not isinstance(question.image, Path):
        return question
    nowhere = Path("/nonexistent").joinpath(*question.image.parts[-3:])
    return question.model_copy(update={"image": nowhere})


def _finished(out: Path) -> dict[str, Any]:
    """Provenance of a finished folder, once its files are known to be whole."""
    predictions = store.predictions_file(out)
    for file in (predictions, out / "metrics.json"):
        if not file.exists():
            raise ArtifactError(f"{file} is gone", hint="delete the folder, evaluate again")
    store.read_predictions(predictions)
    return store.read_json(out / store.PROVENANCE)


def refuse_images(model: ModelFolder, asked: Mapping[str, Sequence[Question]]) -> None:
    """Refuse to ask a text model about pictures.

    Raises: UsageError.
    """
    for name, rows in asked.items():
        if not model.arch.is_vlm and any(question.has_image for question in rows):
            task = name.split(":")[0]
            text = f"{task}:test:text" if task in selector.TASKS else "FILE:text"
            raise UsageError(
                f"{model.name} is a text model, but {name} holds questions with images",
                hint=f"pick the text subset, e.g. {text}",
            )


def _model_record(model: ModelFolder) -> dict[str, Any]:
    known = model.figures
    return {
        "name": known.get("name", Path(model.name).name),
        "fingerprint": model.fingerprint(),
        "checkpoint_bytes": model.weight_bytes(),
        "bits_per_weight": known.get("bits_per_weight", 16.0),
        **{key: value for key, value in known.items() if key not in ("reload", "layers", "origin")},
    }
