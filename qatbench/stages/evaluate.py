"""eval: a model and questions -> predictions.jsonl and metrics.json.

Questions are put into batches by length before any of them runs; each finished batch is appended
to `predictions.partial.jsonl`. A resumed run forms the same batches and repeats those that are
not whole in that file, so it ends with the predictions of an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qatbench import store
from qatbench.errors import ArtifactError, UsageError
from qatbench.records import Prediction, Question
from qatbench.stages.common import Progress
from qatbench.stages.metrics import summarize
from qatbench.tasks import selector
from qatbench.tasks.controls import Images, with_images
from qatbench.tasks.selector import Selector
from qatbench.vlm import answer as answering
from qatbench.vlm import load as models
from qatbench.vlm.answer import Item, Key
from qatbench.vlm.batch import Encoder
from qatbench.vlm.load import Loaded, ModelFolder

PARTIAL = "predictions.partial.jsonl"
TOKEN_BUDGET = {"cpu": 2048, "cuda": 32768}  # padded tokens a batch


@dataclass(frozen=True)
class EvalSettings:
    """What is asked, how it is put, and on what it runs."""

    selectors: tuple[Selector, ...]
    protocol: Mapping[str, str]  # task -> protocol name
    mode: Literal["options", "generate"] = "options"
    dtype: str | None = None
    kernel: Literal["auto", "library", "dense"] = "auto"
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
) -> dict[str, Any]:
    """Answer every question and write the run folder; returns its provenance.

    Raises: ArtifactError (no metrics.json is written) when more than `max_errors` of the
        questions ended in an error; UsageError for an image question and a text model.
    """
    started = time.monotonic()
    asked = questions_of(settings.selectors, paths, settings.limit, settings.seed)
    asked = {
        name: with_images(rows, settings.images, settings.seed) for name, rows in asked.items()
    }
    _refuse_images(model, asked)
    device = models.pick_device(settings.device)
    dtype = models.pick_dtype(settings.dtype, device)
    folder = run_folder(out, settings, model.fingerprint(), asked)
    if folder.begin(resume=resume) is store.State.DONE:
        return _finished(out)
    progress("Loading the model", 0, 0)
    loaded = models.load(model, device=device, dtype=dtype, kernel=_kernel(settings, model))
    answered = time.monotonic()
    rows, now = answer_all(loaded, settings, asked, out / PARTIAL, progress)
    seconds = time.monotonic() - answered
    _check_errors(rows, settings.max_errors)
    _write_predictions(rows, out, paths)
    names = {task: settings.protocol[task] for task in {row.task for row in rows}}
    metrics = summarize(rows, protocols=names, mode=settings.mode, seconds=seconds, timed=now)
    store.write_json(out / "metrics.json", metrics.model_dump(mode="json"))
    record = folder.finish(
        inputs={"model": _model_record(model), "data": folder.spec["tasks"]},
        seconds=time.monotonic() - started,
        machine=models.machine(device),
        figures={
            "kernel": models.kernel_name(loaded),
            "prompt_form": Encoder(loaded).form,
            "dtype": str(dtype).removeprefix("torch."),
            "batch_size": settings.batch_size or f"{_budget(device)} padded tokens",
            "data": {task: selector.place(task, paths) for task in names},
        },
    )
    (out / PARTIAL).unlink(missing_ok=True)
    return record


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


def _kernel(settings: EvalSettings, model: ModelFolder) -> str:
    """`auto` is the library's kernel at 4 and 8 bits, else dense.

    The library has no integer kernel at 3 and 2 bits and would dequantize at every forward.
    """
    if settings.kernel != "auto":
        return settings.kernel
    return "library" if (model.quantization or {}).get("bits", 4) in (4, 8) else "dense"


def _refuse_images(model: ModelFolder, asked: Mapping[str, Sequence[Question]]) -> None:
    for name, rows in asked.items():
        if not model.arch.is_vlm and any(question.has_image for question in rows):
            raise UsageError(
                f"{model.name} is a text model, but {name} holds questions with images",
                hint=f"pick the text subset, e.g. {name.split(':')[0]}:test:text",
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


# --- answering ----------------------------------------------------------------------------------


class Answered(NamedTuple):
    """Predictions in the order asked."""

    rows: list[Prediction]
    now: int  # answered by this run, the others by an earlier one


def answer_all(
    loaded: Loaded,
    settings: EvalSettings,
    asked: Mapping[str, Sequence[Question]],
    partial: Path,
    progress: Progress,
) -> Answered:
    """Answer all questions, batch by batch, appending to `partial`.

    What `partial` holds already is kept; its errors are tried again.
    """
    encoder = Encoder(loaded)
    progress("Reading the questions", 0, 0)
    questions = [question for rows in asked.values() for question in rows]
    items = answering.items_of(encoder, questions, settings.protocol, settings.mode)
    batches = answering.batches(items, settings.batch_size, _budget(loaded.device.type))
    done = _whole_batches(partial, batches)
    kept = len(done)
    store.write_text(partial, _lines(done.values()))
    with partial.open("a", encoding="utf-8") as stream:
        for batch in batches:
            if batch[0].key in done:
                continue
            rows = answering.answer(encoder, batch)
            done |= {(row.task, row.id): row for row in rows}
            stream.write(_lines(rows))
            stream.flush()
            progress("Answering", len(done), len(items))
    return Answered([done[item.key] for item in items], len(items) - kept)


def _whole_batches(partial: Path, batches: Sequence[Sequence[Item]]) -> dict[Key, Prediction]:
    """Rows of batches that were answered as a whole; errors are not answers."""
    if not partial.exists():
        return {}
    rows = store.read_predictions(partial, torn_tail=True)
    found = {(row.task, row.id): row for row in rows if row.status != "error"}
    done: dict[Key, Prediction] = {}
    for batch in batches:
        if all(item.key in found for item in batch):
            done |= {item.key: found[item.key] for item in batch}
    return done


# --- the end ------------------------------------------------------------------------------------


def _check_errors(rows: Sequence[Prediction], allowed: float) -> None:
    failed = [row for row in rows if row.status == "error"]
    if len(failed) > allowed * len(rows):
        raise ArtifactError(
            f"{len(failed)} of {len(rows)} questions ended in an error "
            f"(first: {failed[0].id}, {failed[0].error})",
            hint="complete the data, or allow it with --max-errors; no metrics were written",
        )


def _write_predictions(rows: Sequence[Prediction], out: Path, paths: Mapping[str, str]) -> None:
    """predictions.jsonl; responses to data that may not be passed on go to a file of their own."""
    kept = []
    for row in rows:
        if row.raw is None or selector.shareable(row.task, paths.get(row.task)):
            kept.append(row)
        else:
            kept.append(row.model_copy(update={"raw": None}))
    if kept != list(rows):
        store.write_text(out / "responses.jsonl", _lines(rows))
    store.write_text(out / "predictions.jsonl", _lines(kept))
    (out / "predictions.jsonl.gz").unlink(missing_ok=True)  # of an earlier answer


def _lines(rows: Iterable[Prediction]) -> str:
    return "".join(row.model_dump_json(exclude_none=False) + "\n" for row in rows)


def _budget(device: str) -> int:
    return TOKEN_BUDGET["cpu" if device == "cpu" else "cuda"]
