"""doctor: what this machine can and cannot run, and the command that fixes it. No torch here.

Heavy packages are imported in a process of their own (doctor_probe): a broken one is a finding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qatbench import mini, store
from qatbench.errors import PrerequisiteError, QatbenchError, UsageError
from qatbench.recipe import TAUGHT, TRAINED
from qatbench.records import Question
from qatbench.stages import doctor_machine as machine
from qatbench.stages import doctor_packages as packages
from qatbench.stages import doctor_probe
from qatbench.stages.common import Progress
from qatbench.stages.doctor_rows import Row, State, gb
from qatbench.stages.grid_check import peek
from qatbench.tasks import selector
from qatbench.vlm import builtin, memory, shapes
from qatbench.vlm.counts import stored

SPLITS = {"scienceqa": ("train", "val", "test"), "mmbench": ("dev", "test")}
SAFE = 0.95  # share of the free memory that is counted on: CUDA's own and gaps between blocks
# What train-qat can be told, most memory first; each step keeps the ones before it.
ECONOMIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("", {"weights": "float32", "optimizer": "adamw", "checkpointing": False}),
    ("--checkpointing", {"checkpointing": True}),
    (
        "--weights bfloat16 --optimizer adamw8bit",
        {"weights": "bfloat16", "optimizer": "adamw8bit"},
    ),
    ("--teacher-dtype int8", {"teacher_dtype": "int8"}),
    ("--micro-batch-size 1", {"batch_size": 1}),
)
OTHER_RUNS = ("--teacher-dtype int8", "--micro-batch-size 1")  # their use changes what is asked


@dataclass(frozen=True)
class Request:
    """What is asked about."""

    models: tuple[str, ...] = ()
    method: str | None = None  # one of memory.METHODS
    teacher: str | None = None
    bits: int | None = None  # default: 4, and 16 for eval
    group_size: int = 128
    batch_size: int = 8
    length: int = 704
    data: Mapping[str, str] = field(default_factory=dict)  # task -> path
    device: str | None = None

    def work(self, device: str) -> memory.Work:
        """The work in its leanest form, on `device`."""
        bits = self.bits or (16 if self.method == "eval" else 4)
        return memory.Work(
            self.method or "eval", bits, self.group_size, self.batch_size, self.length,
            device="cpu" if device == "cpu" else "cuda",
        )  # fmt: skip


def examine(
    request: Request, progress: Progress, installed: packages.Installed | None = None
) -> list[Row]:
    """Check everything; nothing is changed and nothing is downloaded.

    Raises: UsageError for a distillation without a teacher, or a method without a model.
    """
    if request.method in TAUGHT and request.models and request.teacher is None:
        raise UsageError(f"{request.method} needs a teacher", hint="--teacher MODEL")
    progress("Importing torch and the others", 0, 0)
    found = doctor_probe.probe()
    gpus = (found.get("cuda") or {}).get("devices", [])
    device = request.device or ("cuda" if gpus else "cpu")
    progress("Looking at the machine and the data", 0, 0)
    reached = machine.hub()
    sized = {name: _sizes(name) for name in filter(None, (*request.models, request.teacher))}
    disk = sum(_disk(config, request) for config in map(sized.get, request.models) if config)
    return [
        *packages.rows(installed or packages.Here(), found, request.method),
        *machine.gpus(found, device.startswith("cuda") and request.device is not None),
        *machine.kernels(found, device),
        machine.engine(found, device),
        *machine.compilers(found, device, request.method),
        machine.cores(),
        _main_memory(),
        machine.disk("cache", store.cache_folder()),
        machine.disk("this folder", Path(), disk),
        machine.cache(),
        reached,
        *_built_in(sized),
        *_data(request.data),
        *_models(sized, request, reached),
        *_memory(sized, request, device, gpus),
    ]


def _main_memory() -> Row:
    total, free = machine.main_memory()
    return Row("memory", "ok" if free > 2e9 else "warning", f"{gb(total)}, {gb(free)} free")


# --- models and data ----------------------------------------------------------------------------


def _sizes(name: str) -> dict[str, Any] | None:
    """config.json of a local or built-in model, or of a well-known one by any of its names."""
    try:
        found = peek(name)
    except QatbenchError:
        found = None
    return found or shapes.known(name)


def _disk(config: Mapping[str, Any], request: Request) -> float:
    """Bytes that a run leaves: a checkpoint, or nothing worth counting."""
    if request.method in (None, "eval"):
        return 0.0
    bits = 16 if request.method in ("sft", "kd") else request.bits or 4
    try:
        return stored(config, bits, request.group_size)
    except UsageError:  # the row on its memory says it
        return 0.0


def _built_in(asked: Mapping[str, Any]) -> Iterator[Row]:
    for name in builtin.MINI:
        try:
            builtin.mini_folder(name)
            yield Row(name, "ok", "built in, whole")
        except QatbenchError as error:
            yield Row(name, "failure", error.message, error.hint)
    try:
        builtin.gguf_file()
        made = builtin.converted().exists()
        told = "weights are installed" + (", converted" if made else "; converted at first use")
        yield Row(builtin.SMOLLM2, "ok", told)
    except (QatbenchError, ImportError) as error:
        bad: State = "failure" if builtin.SMOLLM2 in asked else "warning"
        yield Row(builtin.SMOLLM2, bad, str(error), getattr(error, "hint", packages.NEW))
    for name, version in mini.VERSIONS.items():
        drawn = (store.cache_folder() / f"{name}-{version}-seed0").is_dir()
        yield Row(f"data {name}", "ok", f"built in, {'drawn' if drawn else 'drawn at first use'}")


def _data(paths: Mapping[str, str]) -> Iterator[Row]:
    for task, path in paths.items():
        check = f"data {task}"
        if path in selector.BUILT_IN:
            continue
        if selector.on_the_hub(path):
            yield Row(check, "ok", f"{path} is looked up on the hub when it is used")
            continue
        rows, why = _splits(task, path)
        if not rows:
            yield Row(
                check, "failure", why.message if why else "no questions", why.hint if why else ""
            )
            continue
        parts = ", ".join(f"{split} {len(some)}" for split, some in rows.items())
        questions = [question for some in rows.values() for question in some]
        pictures = [q.image for q in questions if q.has_image]
        absent = sum(isinstance(image, Path) and not image.is_file() for image in pictures)
        told = f"{len(questions)} rows ({parts}), {len(pictures)} with an image"
        if absent:
            fix = f"complete the images below {path}, or ask {task}:SPLIT:text"
            yield Row(check, "warning", f"{told}, {absent} images missing", fix)
        else:
            yield Row(check, "ok", told)


def _splits(task: str, path: str) -> tuple[dict[str, list[Question]], QatbenchError | None]:
    """Rows of every split that can be read, and the first error."""
    rows: dict[str, list[Question]] = {}
    first: QatbenchError | None = None
    for split in SPLITS.get(task, ("all",)):
        own = None if task in SPLITS else Path(path)
        try:
            rows[split] = selector.load(selector.Selector(task, split, file=own), {task: path})
        except QatbenchError as error:
            first = first or error
        except Exception as error:  # noqa: BLE001 - pandas or pyarrow may be the broken package
            first = first or PrerequisiteError(
                f"{type(error).__name__}: {error}", hint=packages.NEW
            )
    return rows, first


def _models(sized: Mapping[str, Any], request: Request, reached: Row) -> Iterator[Row]:
    """Whether the weights that are asked for are here, or can be had."""
    bad: State = "failure" if request.method else "warning"
    for name in sized:
        if name in builtin.NAMES:
            continue
        if Path(name).is_dir() and any(Path(name).glob("*.safetensors")):
            yield Row(f"model {name}", "ok", "a folder with weights")
        elif reached.state == "ok" and not Path(name).exists():
            yield Row(f"model {name}", "ok", "not here: the hub is asked for it by its OWNER/NAME")
        else:
            told = "no safetensors weights here, and the hub is not reached"
            yield Row(f"model {name}", bad, told, "give a folder, or OWNER/NAME with a network")


# --- memory -------------------------------------------------------------------------------------


def _memory(
    sized: Mapping[str, Any], request: Request, device: str, gpus: Sequence[Mapping[str, Any]]
) -> Iterator[Row]:
    """The work on each model against what the device and main memory have free."""
    ram = machine.main_memory().free
    room = Room(ram, f"{gb(ram)} of main memory")
    if device != "cpu" and gpus:
        best = max(gpus, key=lambda gpu: gpu["free"])
        room = Room(best["free"], f"{gb(best['free'])} on {best['name']}")
    work = request.work(device)
    taught = request.method in TAUGHT
    for name in request.models:
        check, config = f"memory {name}", sized[name]
        teacher = sized.get(request.teacher or "") if taught else None
        if config is None or (taught and teacher is None):
            unknown = request.teacher if config is not None else name
            yield Row(check, "warning", f"the sizes of {unknown} are not known", "give its folder")
            continue
        told = f"{work.method}{f' by {request.teacher}' if taught else ''}"
        told += f", {work.batch_size} x {work.length} tokens"
        try:
            if work.method in TRAINED:
                yield _training(check, told, config, work, teacher, room)
            else:
                yield _at_once(check, told, config, work, room)
            if device != "cpu" and work.method != "eval":
                yield _exported(name, config, ram)
        except UsageError as error:
            yield Row(check, "failure", error.message, error.hint)


class Room(NamedTuple):
    """What is free, in bytes and in words."""

    free: float
    label: str

    def takes(self, size: float) -> bool:
        """Whether it fits, with some room for what nobody counts."""
        return size <= SAFE * self.free


def _at_once(
    check: str, told: str, config: Mapping[str, Any], work: memory.Work, room: Room
) -> Row:
    """Evaluation or quantization."""
    size = memory.need(config, work).total
    told = f"{told}: needs {gb(size)}, you have {room.label}"
    if room.takes(size):
        return Row(check, "ok", told)
    if work.method != "eval":
        return Row(check, "failure", told, f"--device cpu with {gb(2.5 * size)} of main memory")
    packed = memory.need(config, dataclasses.replace(work, bits=4, batch_size=1)).total
    return Row(check, "failure", told, f"a 4-bit checkpoint and --batch-size 1: {gb(packed)}")


def _training(
    check: str,
    told: str,
    config: Mapping[str, Any],
    work: memory.Work,
    teacher: Mapping[str, Any] | None,
    room: Room,
) -> Row:
    """The first economy of train-qat that fits, or what the leanest training needs."""
    flags, asked = "train-qat", 0.0
    changes: dict[str, Any] = {}
    for flag, change in ECONOMIES:
        if "teacher" in flag and teacher is None:
            continue
        flags, changes = f"{flags} {flag}".rstrip(), changes | change
        size = memory.need(config, dataclasses.replace(work, **changes), teacher).total
        other = flag in OTHER_RUNS
        asked = asked if other else size
        if room.takes(size):
            found = f"{told}: needs {gb(size)}, you have {room.label}"
            return Row(check, "warning" if other else "ok", found, flags)
    found = f"{told}: needs {gb(asked)}, you have {room.label}"
    return Row(check, "failure", found, f"a larger device: {flags} still needs {gb(size)}")


def _exported(name: str, config: Mapping[str, Any], free: float) -> Row:
    """Writing and proving a checkpoint happens in main memory."""
    size = memory.writing(config)
    told = f"the checkpoint is written and proven in {gb(size)} of main memory, {gb(free)} are free"
    if size <= free:
        return Row(f"export {name}", "ok", told)
    return Row(f"export {name}", "warning", told, "more main memory, or swap")
