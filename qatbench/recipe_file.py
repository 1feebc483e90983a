"""Reading a recipe: every problem of the file at once, each with its line. No torch here."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qatbench.errors import QatbenchError, RecipeError
from qatbench.recipe import (
    CALIBRATED,
    NAME,
    QUANTIZED,
    TAUGHT,
    TRAINED,
    Arm,
    ArmRef,
    BetaSpec,
    GridSpec,
    Recipe,
    TrainingSpec,
)

HINT = "docs/recipes.md shows every key"
GridCheck = Callable[[str, int, int], list[str]]
"""(model name, bits, group size) -> problems; raises QatbenchError when the model is not there."""
NameCheck = Callable[[str, str], str | None]
"""(`questions`, `protocol` or `format`, text) -> what is wrong with that name."""
BETA = "beta_"  # a candidate's key with this start is a value of the controller


def load_recipe(
    path: Path, check_grid: GridCheck | None = None, check_name: NameCheck | None = None
) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file.
        check_grid: whether a grid fits the student; not checked without it.
        check_name: whether questions, protocols and prompt formats are known; likewise.

    Raises: RecipeError listing every problem found, each with its line.
    """
    text = _read(path)
    lines = _Lines(path, text)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        where = getattr(error, "problem_mark", None)
        at = f":{where.line + 1}" if where else ""
        raise RecipeError(
            f"{path}{at}: not YAML: {getattr(error, 'problem', None) or error}",
            hint="look at the line before, too",
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values", hint=HINT)
    recipe, problems, touched = _validated(content, lines)
    if recipe is not None:
        known = set(content["arms"]) if isinstance(content.get("arms"), dict) else set()
        problems += _graph_problems(recipe, lines, known)
        problems += _grid_problems(recipe, lines, check_grid, touched)
        problems += _name_problems(recipe, lines, check_name) if check_name else []
        problems += _tuning_problems(recipe, lines)
    problems = lines.repeated + problems
    if recipe is None or problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)), hint=HINT)
    return recipe


def _validated(
    content: dict[str, Any], lines: _Lines
) -> tuple[Recipe | None, list[str], set[tuple[str, ...]]]:
    """The recipe and what its schema says against it.

    What is wrong is left out and the rest validated again, so that a misspelled key does not hide
    an arm that is missing: the recipe returned then serves for looking for further problems only.
    The third value holds the sections that something was left out of.
    """
    try:
        return Recipe.model_validate(content), [], set()
    except ValidationError as error:
        found = error.errors()
    problems = [lines.say(item["loc"], item["msg"]) for item in found]
    rest = copy.deepcopy(content)
    for item in found:
        _leave_out(rest, item["loc"])
    try:
        touched = {tuple(map(str, item["loc"][:-1])) for item in found}
        return Recipe.model_validate(rest), problems, touched
    except ValidationError:
        return None, problems, set()


def _leave_out(content: dict[str, Any], where: tuple[Any, ...]) -> None:
    """Delete the key that an error is about; an arm without a usable kind goes as a whole."""
    if len(where) == 3 and where[0] == "arms" and where[2] == "kind":
        where = where[:2]
    for key in where[:-1]:
        inner = content.get(key) if isinstance(content, dict) else None
        if not isinstance(inner, dict):
            content.pop(key, None)
            return
        content = inner
    content.pop(where[-1], None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"cannot read {path}: {error.strerror}", hint="give the path of a recipe (YAML)"
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a text file") from error


class _Lines:
    """Where in the file a key stands."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.found: dict[tuple[str, ...], int] = {}
        self.repeated: list[str] = []
        try:
            self._walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
        except yaml.YAMLError:
            self.found = {}

    def _walk(self, node: yaml.Node | None, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*at, str(key.value))
                line = key.start_mark.line + 1
                if here in self.found:
                    name = ".".join(here)
                    self.repeated.append(f"{self.path}:{line}: {name}: stands here a second time")
                self.found[here] = line
                self._walk(value, here)

    def say(self, where: tuple[Any, ...], what: str) -> str:
        keys = tuple(str(part) for part in where)
        line = next(
            (self.found[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.found), 1
        )
        return f"{self.path}:{line}: {'.'.join(keys)}: {what[:1].lower() + what[1:]}"


def _graph_problems(recipe: Recipe, lines: _Lines, known: set[str]) -> list[str]:
    problems = []
    arms = recipe.arms
    for name, arm in arms.items():
        problems += _arm_problems(recipe, name, arm, lines, known)
    if recipe.baseline and recipe.baseline not in known:
        problems.append(lines.say(("baseline",), f"no arm {recipe.baseline!r}"))
    if isinstance(recipe.teacher, ArmRef) and recipe.teacher.arm not in known:
        problems.append(lines.say(("teacher", "arm"), f"no arm {recipe.teacher.arm!r}"))
    return problems or _cycles(recipe, lines)


def _arm_problems(recipe: Recipe, name: str, arm: Arm, lines: _Lines, known: set[str]) -> list[str]:
    found: list[tuple[str, str]] = []
    if not _is_name(name):
        found.append(("", "an arm's name is letters, digits, '.', '_' and '-'"))
    if arm.of is not None and arm.of not in known:
        found.append(("of", f"no arm {arm.of!r}; there are {', '.join(recipe.arms)}"))
    elif arm.of in recipe.arms and recipe.arms[arm.of].kind in QUANTIZED:
        found.append(("of", f"{arm.of!r} is quantized already"))
    found += _start_problems(recipe, arm, known) + _teacher_problems(recipe, arm, known)
    if arm.kind == "base" and arm.of:
        found.append(("of", "a base arm is the student itself"))
    if arm.kind in TRAINED and not recipe.data.train:
        found.append(("kind", f"{arm.kind} needs `data.train`"))
    if arm.kind in CALIBRATED and not recipe.data.calibration:
        found.append(("kind", f"{arm.kind} needs `data.calibration`"))
    switched = arm.model_fields_set & {"gate", "rcka", "beta", "kl", "controller", "tokens"}
    if switched and arm.kind != "grace":
        found.append((min(switched), f"only a grace arm has terms to switch, not {arm.kind}"))
    if arm.grid and arm.kind not in QUANTIZED:
        found.append(("grid", f"a {arm.kind} arm is not quantized"))
    if arm.training and arm.kind not in TRAINED:
        found.append(("training", f"a {arm.kind} arm is not trained"))
    try:
        recipe.training_of(arm)
    except ValidationError as error:
        found += [(f"training.{'.'.join(map(str, e['loc']))}", e["msg"]) for e in error.errors()]
    return [lines.say(("arms", name, *filter(None, key.split("."))), why) for key, why in found]


def _start_problems(recipe: Recipe, arm: Arm, known: set[str]) -> list[tuple[str, str]]:
    """What is wrong with the checkpoint that an arm's training starts from."""
    if arm.init is None:
        return []
    if arm.kind not in ("qat", "grace"):
        return [("init", f"only qat and grace start from quantized weights, not {arm.kind}")]
    if arm.init not in known:
        return [("init", f"no arm {arm.init!r}; there are {', '.join(recipe.arms)}")]
    if arm.init in recipe.arms and recipe.arms[arm.init].kind not in QUANTIZED:
        return [("init", f"{arm.init!r} is not quantized: `of` trains on a 16-bit arm")]
    return []


def _teacher_problems(recipe: Recipe, arm: Arm, known: set[str]) -> list[tuple[str, str]]:
    if arm.kind not in TAUGHT:
        return [] if arm.teacher is None else [("teacher", f"a {arm.kind} arm has no teacher")]
    if arm.teacher is None and recipe.teacher is None:
        return [("kind", f"{arm.kind} needs a `teacher`")]
    if isinstance(arm.teacher, ArmRef) and arm.teacher.arm not in known:
        return [("teacher.arm", f"no arm {arm.teacher.arm!r}")]
    return []


def _name_problems(recipe: Recipe, lines: _Lines, check: NameCheck) -> list[str]:
    data = recipe.data
    names: list[tuple[tuple[str, ...], str, str]] = [
        (("data", "eval"), "questions", text) for text in data.eval
    ]
    chosen = [("train", source.questions) for source in data.train]
    for key, text in (*chosen, ("calibration", data.calibration)):
        names += [(("data", key), "questions", text)] if text else []
    if recipe.tuning:
        names.append((("tuning", "data"), "questions", recipe.tuning.data))
    names.append((("evaluation", "protocol"), "protocol", recipe.evaluation.protocol))
    names += [(("training", "formats"), "format", name) for name in recipe.training.formats]
    for arm, spec in recipe.arms.items():
        own = spec.training.get("formats")
        given = own if isinstance(own, (list, tuple)) else ()
        names += [(("arms", arm, "training", "formats"), "format", str(n)) for n in given]
    told = ((where, check(kind, text)) for where, kind, text in names)
    return [lines.say(where, why) for where, why in told if why]


def _tuning_problems(recipe: Recipe, lines: _Lines) -> list[str]:
    problems = []
    for arm, candidates in (recipe.tuning.candidates if recipe.tuning else {}).items():
        where = ("tuning", "candidates", arm)
        if arm not in recipe.arms or recipe.arms[arm].kind not in TRAINED:
            problems.append(lines.say(where, "no arm of this name is trained"))
        for given in candidates:
            beta = {k.removeprefix(BETA): v for k, v in given.items() if k.startswith(BETA)}
            rest = {k: v for k, v in given.items() if not k.startswith(BETA)}
            try:
                TrainingSpec.model_validate(recipe.training.model_dump() | rest)
                BetaSpec.model_validate(beta)
            except ValidationError as error:
                told = error.errors()
                problems += [
                    lines.say(where, f"{'.'.join(map(str, e['loc']))}: {e['msg']}") for e in told
                ]
    return problems


def _is_name(name: str) -> bool:
    return re.match(NAME, name) is not None


def _cycles(recipe: Recipe, lines: _Lines) -> list[str]:
    def circle(path: list[str]) -> list[str]:
        for other in recipe.needs(path[-1]) if path[-1] in recipe.arms else []:
            if other == path[0]:
                return [*path, other]
            found = circle([*path, other]) if other not in path else []
            if found:
                return found
        return []

    for name in recipe.arms:
        found = circle([name])
        if found:
            return [lines.say(("arms", name), f"is made from itself: {' -> '.join(found)}")]
    return []


def _grid_problems(
    recipe: Recipe, lines: _Lines, check: GridCheck | None, touched: set[tuple[str, ...]]
) -> list[str]:
    """Grids that do not fit the student; a group size that was left out as wrong is not judged."""
    pairs: list[tuple[tuple[str, ...], GridSpec]] = [
        (("arms", name, "grid") if arm.grid else ("grid",), recipe.grid_of(arm))
        for name, arm in recipe.arms.items()
        if arm.kind in QUANTIZED
    ]
    pairs = [
        (where, grid)
        for where, grid in pairs
        if where not in touched or "group_size" in grid.model_fields_set
    ]
    return _check_grids(recipe.student, pairs, lines, check)


def _check_grids(
    student: str,
    pairs: list[tuple[tuple[str, ...], GridSpec]],
    lines: _Lines,
    check: GridCheck | None,
) -> list[str]:
    problems: list[str] = []
    for where, grid in pairs if check else []:
        try:
            found = check(student, grid.bits, grid.group_size) if check else []
        except QatbenchError as error:
            return [lines.say(("student",), error.message)]
        problems += [lines.say(where, why) for why in found]
    return list(dict.fromkeys(problems))
