"""Questions a second, as `eval` scores options: encoding, pictures and forwards together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qatbench.engine.runner import Runner
from qatbench.errors import PrerequisiteError
from qatbench.records import Question
from qatbench.records_speed import EvaluationRow, spread
from qatbench.stages.answering import OPTIONS_ON_CPU
from qatbench.stages.evaluate import questions_of, refuse_images
from qatbench.stages.meter import Meter, is_out_of_memory
from qatbench.tasks.selector import Selector
from qatbench.vlm import answer
from qatbench.vlm.batch import Encoder, arithmetic
from qatbench.vlm.load import Loaded, ModelFolder

PADDED = {"cpu": OPTIONS_ON_CPU, "cuda": 16384}  # tokens a batch, the same for all models


@dataclass(frozen=True)
class Asked:
    """What questions are asked."""

    selector: Selector
    protocol: str
    questions: int
    seed: int = 0


def asked_of(
    folders: Sequence[ModelFolder], asked: Asked, paths: Mapping[str, str]
) -> list[Question]:
    """The first questions of a seeded order, as `eval --limit` asks them.

    Raises: UsageError for pictures and a text model; what loading the task raises.
    """
    rows = questions_of([asked.selector], paths, asked.questions, asked.seed)
    for folder in folders:
        refuse_images(folder, rows)
    return next(iter(rows.values()))


def measure_questions(
    entrants: Sequence[tuple[ModelFolder, Runner]],
    asked: Asked,
    questions: Sequence[Question],
    meter: Meter,
    warm_up: int,
    repeats: int,
    done: Callable[[], None],
) -> list[EvaluationRow]:
    """One row a model, repeats in turns.

    Raises: PrerequisiteError for a picture that is missing or damaged.
    """
    tokens = PADDED[meter.device.type]
    rates: list[list[float]] = [[] for _ in entrants]
    full = [False] * len(entrants)
    for turn in range(warm_up + repeats):
        for k, (_, runner) in enumerate(entrants):
            if not full[k]:
                begun = meter.now()
                full[k] = not _answered(runner.loaded, asked.protocol, questions, tokens)
                seconds = meter.now() - begun
                if full[k]:
                    meter.release()
                elif turn >= warm_up:
                    rates[k].append(len(questions) / seconds)
            done()
    return [
        EvaluationRow(
            model=folder.name,
            fingerprint=folder.fingerprint(),
            engine=runner.engine,
            kernel=runner.kernel,
            dtype=str(arithmetic(runner.loaded.model)).removeprefix("torch."),
            task=str(asked.selector),
            protocol=asked.protocol,
            questions=len(questions),
            padded_tokens=tokens,
            status="out of memory" if full[k] else "ok",
            reason="one question alone does not fit" if full[k] else "",
            questions_per_second=None if full[k] else spread(rates[k]),
        )
        for k, (folder, runner) in enumerate(entrants)
    ]


def _answered(loaded: Loaded, protocol: str, questions: Sequence[Question], tokens: int) -> bool:
    """Answer all; False when memory ran out. A new encoder: no picture is known from before."""
    encoder = Encoder(loaded)
    items = answer.items_of(encoder, questions, {questions[0].task: protocol}, "options")
    for item in items:
        if item.error:
            raise PrerequisiteError(
                f"question {item.question.id} cannot be asked: {item.error}",
                hint="other --questions or --data",
            )
    run, _ = answer.distinct(items)
    try:
        for batch, encoded in answer.ahead(encoder, answer.batches(run, None, tokens)):
            answer.answer(encoder, batch, encoded)
    except PrerequisiteError:  # of `answer`: a single question does not fit
        return False
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
