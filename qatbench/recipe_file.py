"""Reading a recipe: every problem of the file at once, each with its line. No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qatbench.errors import QatbenchError, RecipeError
from qatbench.recipe import NAME, QUANTIZED, TAUGHT, TRAINED, Arm, ArmRef, GridSpec, Recipe

GridCheck = Callable[[str, int, int], list[str]]
"""(model name, bits, group size) -> problems; raises QatbenchError when the model is not there."""


def load_recipe(path: Path, check_grid: GridCheck | None = None) -> Recipe:
    """Read and check a recipe.

    Raises: RecipeError listing every problem found, each with its line.
    """
    text = _read(path)
    lines = _Lines(path, text)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        at = f":{where.line + 1}" if where else ""
        raise RecipeError(f"{path}{at}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        problems = [lines.say(item["loc"], item["msg"]) for item in error.errors()]
        problems += _loose_problems(content, lines, check_grid)
        raise RecipeError("\n".join(dict.fromkeys(problems)), hint="see docs/recipes.md") from error
    problems = [*_graph_problems(recipe, lines), *_grid_problems(recipe, lines, check_grid)]
    if problems:
        raise RecipeError("\n".join(problems), hint="see docs/recipes.md")
    return recipe


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
        try:
            self._walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
        except yaml.YAMLError:
            self.found = {}

    def _walk(self, node: yaml.Node | None, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*at, str(key.value))
                self.found[here] = key.start_mark.line + 1
                self._walk(value, here)

    def say(self, where: tuple[Any, ...], what: str) -> str:
        keys = tuple(str(part) for part in where)
        line = next(
            (self.found[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.found), 1
        )
        return f"{self.path}:{line}: {'.'.join(keys)}: {what[:1].lower() + what[1:]}"


def _graph_problems(recipe: Recipe, lines: _Lines) -> list[str]:
    problems = []
    arms = recipe.arms
    for name, arm in arms.items():
        problems += _arm_problems(recipe, name, arm, lines)
    if recipe.baseline and recipe.baseline not in arms:
        problems.append(lines.say(("baseline",), f"no arm {recipe.baseline!r}"))
    if isinstance(recipe.teacher, ArmRef) and recipe.teacher.arm not in arms:
        problems.append(lines.say(("teacher", "arm"), f"no arm {recipe.teacher.arm!r}"))
    return problems or _cycles(recipe, lines)


def _arm_problems(recipe: Recipe, name: str, arm: Arm, lines: _Lines) -> list[str]:
    found: list[tuple[str, str]] = []
    if not _is_name(name):
        found.append(("", "an arm's name is letters, digits, '.', '_' and '-'"))
    if arm.of is not None and arm.of not in recipe.arms:
        found.append(("of", f"no arm {arm.of!r}; there are {', '.join(recipe.arms)}"))
    elif arm.of is not None and recipe.arms[arm.of].kind in QUANTIZED:
        found.append(("of", f"{arm.of!r} is quantized already"))
    if arm.kind == "base" and arm.of:
        found.append(("of", "a base arm is the student itself"))
    if arm.kind in TAUGHT and recipe.teacher is None:
        found.append(("kind", f"{arm.kind} needs a `teacher`"))
    if arm.kind in TRAINED and not recipe.data.train:
        found.append(("kind", f"{arm.kind} needs `data.train`"))
    if arm.kind in ("gptq", "awq") and not recipe.data.calibration:
        found.append(("kind", f"{arm.kind} needs `data.calibration`"))
    switched = arm.model_fields_set & {"gate", "rcka", "beta", "kl", "controller"}
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


def _is_name(name: str) -> bool:
    return re.match(NAME, name) is not None


def _cycles(recipe: Recipe, lines: _Lines) -> list[str]:
    for name in recipe.arms:
        trail, todo = [name], recipe.needs(name)
        seen: set[str] = set()
        while todo:
            other = todo.pop()
            if other == name:
                circle = " -> ".join([*trail, name])
                return [lines.say(("arms", name), f"is made from itself: {circle}")]
            if other not in seen:
                seen.add(other)
                trail.append(other)
                todo += recipe.needs(other)
    return []


def _grid_problems(recipe: Recipe, lines: _Lines, check: GridCheck | None) -> list[str]:
    pairs: list[tuple[tuple[str, ...], GridSpec]] = [
        (("arms", name, "grid") if arm.grid else ("grid",), recipe.grid_of(arm))
        for name, arm in recipe.arms.items()
        if arm.kind in QUANTIZED
    ]
    return _check_grids(recipe.student, pairs, lines, check)


def _loose_problems(
    content: Mapping[str, Any], lines: _Lines, check: GridCheck | None
) -> list[str]:
    """Grid problems of a file that has other problems too, so that all are told at once."""
    pairs: list[tuple[tuple[str, ...], GridSpec]] = []
    places: list[tuple[tuple[str, ...], Any]] = [(("grid",), content.get("grid"))]
    arms = content.get("arms")
    for name, arm in (arms if isinstance(arms, dict) else {}).items():
        if isinstance(arm, dict):
            places.append((("arms", str(name), "grid"), arm.get("grid")))
    for where, raw in places:
        try:
            if isinstance(raw, dict):
                pairs.append((where, GridSpec.model_validate(raw)))
        except ValidationError:
            continue
    student = content.get("student")
    return _check_grids(student, pairs, lines, check) if isinstance(student, str) else []


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
