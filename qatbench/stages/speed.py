"""speed: decoding, prefill, questions/s and memory of models and engines, side by side.

Repeats are in turns (A B A B): what drifts, a clock or a neighbour, hits all alike. Nothing is
compared across runs: the bandwidth that the limit is told by is measured in the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from qatbench import store
from qatbench.engine import pick, vllm
from qatbench.engine.runner import Room
from qatbench.errors import PrerequisiteError, UsageError
from qatbench.records import Question
from qatbench.records_speed import Bandwidth, EvaluationRow, Speed, SpeedModel, SpeedRow, spread
from qatbench.stages.common import Progress
from qatbench.stages.meter import Meter, is_out_of_memory
from qatbench.stages.speed_measure import (
    Case,
    Count,
    Entrant,
    How,
    SpeedSettings,
    case_facts,
    measure,
    named,
)
from qatbench.stages.speed_questions import asked_of, measure_questions
from qatbench.stages.speed_ratios import PLAIN, with_ratios
from qatbench.vlm import load as models
from qatbench.vlm.layout import most_positions
from qatbench.vlm.load import ModelFolder


def speed(
    folders: Sequence[ModelFolder],
    settings: SpeedSettings,
    paths: Mapping[str, str],
    progress: Progress,
    meter: Meter | None = None,
) -> Speed:
    """Measure every model in every engine at every batch and context.

    `paths` says where the data of the task lie that `settings.asked` names.

    Raises: UsageError for settings that cannot work with these models; PrerequisiteError when no
        engine runs any of them, and when vLLM is asked for and not there; what an engine of
        `settings.engines` says that does not run one, where `required` is set.
    """
    _check(folders, settings)
    questions = asked_of(folders, settings.asked, paths) if settings.asked else []
    device = models.pick_device(settings.device)
    dtype = models.pick_dtype(settings.dtype, device)
    versions = store.versions() | pick.require(settings.engines, device)
    meter = meter or Meter(device)
    progress("Measuring the bandwidth of the memory", 0, 0)
    size, rates = meter.bandwidth(settings.repeats)
    bandwidth = Bandwidth(copied_bytes=size, bytes_per_second=spread(rates))
    cases = [Case(context, batch) for context in settings.contexts for batch in settings.batches]
    pairs = [(folder, engine) for folder in folders for engine in settings.engines]
    rounds = settings.warm_up + settings.repeats
    asking = sum(engine == PLAIN for _, engine in pairs) if questions else 0
    count = Count(progress, (len(pairs) * len(cases) + asking) * rounds)
    how = How(settings, meter, dtype, device, bandwidth.bytes_per_second.median)
    rows: list[SpeedRow] = []
    evaluations: list[EvaluationRow] = []
    for group in [pairs] if settings.in_turns else [[pair] for pair in pairs]:
        more, asked = _together(group, cases, how, questions, count)
        rows, evaluations = rows + more, evaluations + asked
        meter.release()
    if all(row.status == "not run" for row in rows):
        raise PrerequisiteError(rows[0].reason, hint="--engine transformers")
    order = {case: k for k, case in enumerate(cases)}
    rows.sort(key=lambda row: order[Case(row.context, row.batch)])
    return _record(folders, how, versions, bandwidth, rows, evaluations)


def _together(
    pairs: Sequence[tuple[ModelFolder, str]],
    cases: Sequence[Case],
    how: How,
    questions: Sequence[Question],
    count: Count,
) -> tuple[list[SpeedRow], list[EvaluationRow]]:
    """Measure these side by side: all of them lie on the device at once."""
    settings, rounds = how.settings, how.settings.warm_up + how.settings.repeats
    entrants, rows = _load(pairs, cases, how, count.progress)
    count.add(len(rows) * rounds)
    try:
        for case in cases:
            rows += measure(entrants, case, how, count)
        if settings.asked is None:
            return rows, []
        plain = [(e.folder, e.runner) for e in entrants if e.runner.engine == PLAIN]
        return rows, measure_questions(
            plain, settings.asked, questions, how.meter, settings.warm_up, settings.repeats,
            count.add,
        )  # fmt: skip
    finally:
        for entrant in entrants:
            entrant.runner.close()


def _record(
    folders: Sequence[ModelFolder],
    how: How,
    versions: dict[str, str],
    bandwidth: Bandwidth,
    rows: Sequence[SpeedRow],
    evaluations: Sequence[EvaluationRow],
) -> Speed:
    settings, machine = how.settings, models.machine(how.device)
    return Speed(
        device=how.device,
        gpu=machine.get("gpu"),
        cpu_threads=machine["cpu_threads"],
        dtype=str(how.dtype).removeprefix("torch."),
        seed=settings.seed,
        warm_up=settings.warm_up,
        repeats=settings.repeats,
        tokens=settings.tokens,
        in_turns=settings.in_turns,
        image=settings.image,
        versions=versions,
        bandwidth=bandwidth,
        models=tuple(_model(folder) for folder in folders),
        rows=with_ratios(rows, folders[0].name),
        evaluations=tuple(evaluations),
        notes=tuple(_notes(settings)),
    )


def _check(folders: Sequence[ModelFolder], settings: SpeedSettings) -> None:
    pick.check(settings.engines, pick.MEASURED)
    for what, values in (("model", [f.name for f in folders]), ("engine", settings.engines)):
        if len(set(values)) < len(values):
            raise UsageError(f"a {what} is named twice: {', '.join(values)}")
    longest = max(settings.contexts) + settings.tokens + 1
    for folder in folders:
        most = most_positions(folder.config)
        if most is not None and longest > most:
            raise UsageError(
                f"{folder.name} has {most} positions: a context of {max(settings.contexts)} and"
                f" {settings.tokens + 1} tokens after it need {longest}",
                hint=f"--context {most - settings.tokens - 1} at most, or fewer --tokens",
            )
    if settings.image != "none" and not any(folder.arch.is_vlm for folder in folders):
        raise UsageError(
            "--image: none of the models sees pictures", hint="name a vision-language model"
        )


def _notes(settings: SpeedSettings) -> Iterator[str]:
    if vllm.ENGINE in settings.engines:
        yield vllm.NOTE
    if settings.asked is None:
        yield "questions/s in evaluation: not measured, as no task was given (--task)"
    elif PLAIN not in settings.engines:
        yield "questions/s in evaluation: eval runs in the engine transformers, which was not asked"


def _model(folder: ModelFolder) -> SpeedModel:
    quantization = folder.quantization or {}
    return SpeedModel(
        model=folder.name,
        fingerprint=folder.fingerprint(),
        model_type=folder.arch.model_type,
        bits=quantization.get("bits"),
        group_size=quantization.get("group_size"),
        method=folder.figures.get("method"),
        checkpoint_bytes=folder.weight_bytes(),
    )


# --- loading ------------------------------------------------------------------------------------


def _load(
    pairs: Sequence[tuple[ModelFolder, str]], cases: Sequence[Case], how: How, progress: Progress
) -> tuple[list[Entrant], list[SpeedRow]]:
    """Those that were loaded; of the others the rows that say why not."""
    entrants, refused = [], []
    for k, (folder, engine) in enumerate(pairs):
        progress("Loading", k, len(pairs))
        try:
            found = _entrant(folder, engine, how, progress)
        except (PrerequisiteError, UsageError) as error:
            if how.settings.required:
                raise
            found = "not run", error.message
        how.meter.release()
        if isinstance(found, Entrant):
            entrants.append(found)
        else:
            refused += [_refused(folder, engine, case, found, how) for case in cases]
    progress("Loading", len(pairs), len(pairs))
    return entrants, refused


Refusal = tuple[Literal["out of memory", "not run"], str]


def _entrant(folder: ModelFolder, engine: str, how: How, progress: Progress) -> Entrant | Refusal:
    """Load a model into an engine; what is not there for want of memory says so."""
    before, asked = how.meter.held(), how.settings
    room = Room(max(asked.batches), max(asked.contexts), asked.tokens + 1)
    try:
        runner = pick.load(
            engine, folder, device=how.device, dtype=how.dtype, progress=progress, room=room
        )
    except Exception as error:
        if not is_out_of_memory(error) and not is_out_of_memory(error.__cause__ or error):
            raise
        beside = ", beside the others (--apart)" if how.settings.in_turns else ""
        what = "weights and room for the largest case" if engine == vllm.ENGINE else "weights"
        return "out of memory", f"the {what} do not fit{beside}"
    return Entrant(folder, runner, how.meter.held() - before)


def _refused(folder: ModelFolder, engine: str, case: Case, why: Refusal, how: How) -> SpeedRow:
    return SpeedRow(
        **named(folder, engine), **case_facts(folder, case, how), kernel="-", attention="-",
        status=why[0], reason=why[1],
    )  # fmt: skip
