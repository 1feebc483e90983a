"""eval: a model and questions -> predictions.jsonl and metrics.json.

Questions are put into batches by length before any of them runs; each finished batch is appended
to `predictions.partial.jsonl`. A resumed run forms the same batches and repeats those that are
not whole in that file, so it ends with the predictions of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qatbench import store
from qatbench.errors import ArtifactError, NumericsError, PrerequisiteError, UsageError
from qatbench.records import Prediction, Question
from qatbench.stages.common import Progress
from qatbench.stages.metrics import summarize
from qatbench.tasks import protocols, selector
from qatbench.tasks.selector import Selector
from qatbench.vlm import load as models
from qatbench.vlm.batch import Encoded, Encoder, OptionRow, generate, score_options
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
    seed: int = 0
    device: str | None = None
    batch_size: int | None = None
    max_errors: float = 0.01

    def spec(self, model: str, asked: Mapping[str, Sequence[Question]]) -> dict[str, Any]:
        """What decides the predictions: not the device, nor how questions are batched.

        `model` is its fingerprint.
        """
        return {
            "model": model,
            "tasks": {name: selector.digest(rows) for name, rows in asked.items()},
            "protocol": dict(sorted(self.protocol.items())),
            "mode": self.mode,
            "dtype": self.dtype,
            "kernel": self.kernel,
            "limit": self.limit,
            "seed": self.seed if self.limit else None,
        }


def questions_of(
    selectors: Iterable[Selector], paths: Mapping[str, str], limit: int | None, seed: int
) -> dict[str, list[Question]]:
    """Load what the selectors name; `limit` questions of each in a seeded order.

    Raises: UsageError when a selector picks nothing.
    """
    asked: dict[str, list[Question]] = {}
    for chosen in selectors:
        rows = selector.load(chosen, paths)
        if not rows:
            raise UsageError(f"no questions in {chosen}")
        asked[str(chosen)] = selector.limit(rows, limit, seed) if limit else rows
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
    _refuse_images(model, asked)
    folder = store.RunFolder(out, "eval", settings.spec(model.fingerprint(), asked))
    if folder.begin(resume=resume) is store.State.DONE:
        store.read_predictions(out / "predictions.jsonl")
        return store.read_json(out / store.PROVENANCE)
    device = models.pick_device(settings.device)
    dtype = models.pick_dtype(settings.dtype, device)
    progress("Loading the model", 0, 0)
    loaded = models.load(model, device=device, dtype=dtype, kernel=_kernel(settings, model))
    answered = time.monotonic()
    rows = answer_all(loaded, settings, asked, out / PARTIAL, progress)
    seconds = time.monotonic() - answered
    _check_errors(rows, settings.max_errors)
    _write_predictions(rows, out, paths)
    names = {task: settings.protocol[task] for task in {row.task for row in rows}}
    metrics = summarize(rows, protocols=names, mode=settings.mode, seconds=seconds)
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
        },
    )
    (out / PARTIAL).unlink(missing_ok=True)
    return record


def _kernel(settings: EvalSettings, model: ModelFolder) -> str:
    """`auto`: the library's INT4 kernel at 4 bits; else dense, as the library has no such kernel
    at 3 and 2 bits and would dequantize at every forward.
    """  # fmt: skip
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
        **{key: value for key, value in known.items() if key not in ("reload", "layers")},
    }


# --- answering ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """A question ready to run, or the reason why it cannot."""

    question: Question
    row: OptionRow | None
    prompt: Encoded | None
    error: str | None = None

    @property
    def cost(self) -> int:
        return len(self.row or self.prompt or ())


def answer_all(
    loaded: Loaded,
    settings: EvalSettings,
    asked: Mapping[str, Sequence[Question]],
    partial: Path,
    progress: Progress,
) -> list[Prediction]:
    """Answer all questions, batch by batch, appending to `partial`; in the order asked."""
    encoder = Encoder(loaded)
    items = [_prepare(encoder, question, settings) for rows in asked.values() for question in rows]
    batches = _batches(items, settings.batch_size, _budget(loaded.device.type))
    done = _whole_batches(partial, batches)
    total, count = len(items), len(done)
    with partial.open("w", encoding="utf-8") as stream:
        for line in done.values():
            stream.write(line.model_dump_json() + "\n")
        stream.flush()
        for batch in batches:
            if (batch[0].question.task, batch[0].question.id) in done:
                continue
            for prediction in _halving(loaded, settings, batch):
                done[prediction.task, prediction.id] = prediction
                stream.write(prediction.model_dump_json() + "\n")
            stream.flush()
            count += len(batch)
            progress("Answering", count, total)
    return [done[item.question.task, item.question.id] for item in items]


def _prepare(encoder: Encoder, question: Question, settings: EvalSettings) -> _Item:
    protocol = protocols.get(settings.protocol[question.task])
    try:
        prompt = encoder.prompt(protocol.prompt(question), question.image)
        if settings.mode == "generate":
            return _Item(question, None, prompt)
        answers = [
            encoder.answer(prompt, protocol.continuation(question, letter))
            for letter in question.options
        ]
    except (PrerequisiteError, ArtifactError) as error:
        return _Item(question, None, None, error.message)
    return _Item(question, OptionRow(prompt, answers), prompt)


def _batches(items: Sequence[_Item], size: int | None, budget: int) -> list[list[_Item]]:
    """Longest first, `size` rows or `budget` padded tokens a batch; rows in error by themselves."""
    batches: list[list[_Item]] = [[item] for item in items if item.error]
    rest = sorted((i for i in items if not i.error), key=lambda i: -i.cost)
    start = 0
    while start < len(rest):
        rows = size or max(1, budget // max(1, rest[start].cost))
        batches.append(rest[start : start + rows])
        start += rows
    return batches


def _whole_batches(
    partial: Path, batches: Sequence[Sequence[_Item]]
) -> dict[tuple[str, str], Prediction]:
    if not partial.exists():
        return {}
    found = {(p.task, p.id): p for p in store.read_predictions(partial, torn_tail=True)}
    done = {}
    for batch in batches:
        keys = [(item.question.task, item.question.id) for item in batch]
        if all(key in found for key in keys):
            done |= {key: found[key] for key in keys}
    return done


def _halving(loaded: Loaded, settings: EvalSettings, batch: Sequence[_Item]) -> list[Prediction]:
    """Answer a batch; out of GPU memory, answer its halves."""
    try:
        return _answer(loaded, settings, batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise PrerequisiteError(
                f"question {batch[0].question.id} alone does not fit into memory"
            ) from None
        torch.cuda.empty_cache()
    middle = len(batch) // 2
    return _halving(loaded, settings, batch[:middle]) + _halving(loaded, settings, batch[middle:])


def _answer(loaded: Loaded, settings: EvalSettings, batch: Sequence[_Item]) -> list[Prediction]:
    if batch[0].error:
        return [_row(item.question, status="error", error=item.error) for item in batch]
    if settings.mode == "options":
        scores = score_options(loaded, [item.row for item in batch if item.row])
        return [_scored(item.question, some) for item, some in zip(batch, scores, strict=True)]
    protocol = protocols.get(settings.protocol[batch[0].question.task])
    prompts = [item.prompt for item in batch if item.prompt]
    texts = generate(loaded, prompts, protocol.max_new_tokens)
    return [
        _extracted(item.question, text.strip(), protocol.extract)
        for item, text in zip(batch, texts, strict=True)
    ]


def _scored(question: Question, scores: Sequence[float]) -> Prediction:
    if not all(score == score and abs(score) != float("inf") for score in scores):
        raise NumericsError(f"question {question.id}: option scores are not finite: {scores}")
    best = max(scores)
    letters = list(question.options)
    return _row(
        question,
        status="ok",
        chosen=letters[list(scores).index(best)],
        scores={k: round(v, 6) for k, v in zip(letters, scores, strict=True)},
        tie=sum(score == best for score in scores) > 1,
    )


def _extracted(
    question: Question, text: str, extract: Callable[[str, Mapping[str, str]], str | None]
) -> Prediction:
    chosen = extract(text, question.options)
    return _row(
        question,
        status="ok" if chosen else "unparsed",
        chosen=chosen,
        raw=text,
        raw_sha256=hashlib.sha256(text.encode()).hexdigest(),
        raw_length=len(text),
    )


def _row(question: Question, **fields: Any) -> Prediction:
    meta = {
        "subject": question.subject,
        "category": question.category,
        "has_image": question.has_image,
        "group": question.group,
        "circular_pass": question.circular_pass if question.group else None,
    }
    return Prediction(
        id=question.id,
        task=question.task,
        choices=tuple(question.options),
        gold=question.gold,
        meta={key: value for key, value in meta.items() if value is not None},
        **({"chosen": None} | fields),
    )


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


def _lines(rows: Iterable[Prediction]) -> str:
    return "".join(row.model_dump_json(exclude_none=False) + "\n" for row in rows)


def _budget(device: str) -> int:
    return TOKEN_BUDGET["cpu" if device == "cpu" else "cuda"]
