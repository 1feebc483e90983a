"""What may import what, and how long files and functions may be: DESIGN's rules, read with ast."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "qatbench"
FILES = sorted(PACKAGE.rglob("*.py"))
FRAMEWORKS = {"torch", "torchvision", "transformers", "gptqmodel", "optimum", "accelerate"}

# errors <- recipe, records <- store, stats, tasks, report <- quant, grace <- vlm, engine <- stages
# <- cli. A part imports parts of a lower level (and itself), no others.
LEVELS = {
    "errors": 0,
    "recipe": 1,
    "recipe_file": 1,
    "records": 1,
    "records_speed": 1,
    "ui": 2,
    "store": 2,
    "stats": 2,
    "stats_resample": 2,
    "tasks": 2,
    "report": 2,
    "quant": 3,
    "grace": 3,
    "vlm": 4,
    "engine": 4,
    "mini": 4,
    "stages": 5,
    "cli": 6,
    "__main__": 7,
}
BESIDE = {
    ("recipe_file", "recipe"),  # inside a level: a file and what it holds
    ("records_speed", "records"),
    ("stats", "stats_resample"),
    ("tasks", "mini"),  # `--data mini`: inside a function, for the folder of the built-in questions
    ("mini", "vlm"),
    ("engine", "vlm"),
}
WITHOUT_TORCH = ("errors", "recipe", "recipe_file", "records", "records_speed", "ui", "store",
                 "stats", "stats_resample", "tasks", "report")  # fmt: skip
LIGHT_MODULES = (
    "qatbench.cli",
    "qatbench.ui",
    "qatbench.vlm.layout",
    "qatbench.vlm.builtin",
    "qatbench.stages.grid_check",
    "qatbench.stages.dry_run",
    "qatbench.stages.doctor",
    "qatbench.stages.doctor_probe",
    "qatbench.tasks.selector",
    "qatbench.mini",
)
SLOW = FRAMEWORKS | {"scipy", "datasets", "pandas", "matplotlib", "huggingface_hub"}

LONGEST_FILE = 320
LONGEST_FUNCTION = 60
LONG_FILES: set[str] = set()


def name_of(path: Path) -> str:
    parts = ("qatbench", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def part_of(module: str) -> str:
    """`qatbench.quant.grid` -> `quant`; the package itself (its version) is no part."""
    part = [*module.split("."), ""][1]
    return "cli" if part.startswith("cli_") else part  # the command line is spread over files


def imported(nodes: list[ast.AST]) -> set[str]:
    """Dotted names of the modules that these statements import."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            module = node.module or ""
            deeper = {f"{module}.{alias.name}" for alias in node.names}
            within = {name for name in deeper if name in MODULES}
            found |= within or {module}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            # a name that is worked out at run time is not one of ours: those are written out
            found |= {str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def everywhere(path: Path) -> set[str]:
    """Imports of a file, those inside functions included."""
    return imported(list(ast.walk(tree(path))))


def at_import(path: Path) -> set[str]:
    """Imports that run when the module is imported: not in functions, not for types only."""
    nodes: list[ast.AST] = []
    todo: list[ast.AST] = [tree(path)]
    while todo:
        node = todo.pop()
        nodes.append(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return imported(nodes)


def reached(module: str) -> dict[str, tuple[str, ...]]:
    """Every module that importing `module` imports, ours walked through, each with one way."""
    ways: dict[str, tuple[str, ...]] = {}
    todo = [(module, (module,))]
    while todo:
        name, way = todo.pop()
        parents = [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)]
        for part in parents:  # importing a.b imports a
            if part in ways:
                continue
            ways[part] = way
            if part in MODULES:
                todo += [(other, (*way, other)) for other in at_import(MODULES[part])]
    return ways


def ids(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


# --- the reader itself --------------------------------------------------------------------------


def test_the_reader_sees_every_form_of_import() -> None:
    code = """
import torch.nn as nn
from qatbench import store, __version__
from qatbench.vlm import load as models
from qatbench.vlm.load import find
def late():
    import transformers
    importlib.import_module("qatbench.mini")
"""
    found = imported(list(ast.walk(ast.parse(code))))
    assert found == {
        "torch.nn",
        "qatbench.store",
        "qatbench.vlm.load",
        "transformers",
        "qatbench.mini",
    }


def test_the_reader_follows_arrows_but_not_into_functions() -> None:
    assert "torch" in reached("qatbench.vlm.load")
    assert "qatbench.errors" in reached("qatbench.stages.dry_run")
    assert "torch" not in at_import(MODULES["qatbench.vlm.builtin"])
    assert "torch" in everywhere(MODULES["qatbench.vlm.builtin"])


# --- arrows -------------------------------------------------------------------------------------


def test_every_part_has_its_level() -> None:
    parts = {part_of(module) for module in MODULES} - {""}
    assert parts <= LEVELS.keys()


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_point_down(path: Path) -> None:
    mine = part_of(name_of(path))
    others = {part_of(name) for name in everywhere(path) if name.split(".")[0] == "qatbench"}
    level = LEVELS[mine] if mine else -1  # the package's __init__ imports none of its parts

    wrong = {
        other
        for other in others - {mine, ""}
        if LEVELS[other] >= level and (mine, other) not in BESIDE
    }
    assert not wrong, f"{mine} imports {wrong}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_only_cli_imports_ui_and_stages(path: Path) -> None:
    mine = part_of(name_of(path))
    others = {part_of(name) for name in everywhere(path) if name.split(".")[0] == "qatbench"}
    if mine != "cli":
        assert "ui" not in others - {mine}
        assert "stages" not in others - {mine}
    if mine != "__main__":
        assert "cli" not in others - {mine}


@pytest.mark.parametrize(
    "path", [path for path in FILES if part_of(name_of(path)) in WITHOUT_TORCH], ids=ids
)
def test_no_torch_below_quant(path: Path) -> None:
    roots = {name.split(".")[0] for name in everywhere(path)}  # not even inside a function
    assert not roots & FRAMEWORKS


@pytest.mark.parametrize(
    "path", [path for path in FILES if part_of(name_of(path)) in ("quant", "grace")], ids=ids
)
def test_quant_and_grace_know_tensors_only(path: Path) -> None:
    roots = {name.split(".")[0] for name in everywhere(path)}
    assert "transformers" not in roots
    if part_of(name_of(path)) == "grace":
        assert roots & FRAMEWORKS <= {"torch"}


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_nothing_slow_is_imported_for_help_and_dry_run(module: str) -> None:
    ways = reached(module)
    slow = {name: " -> ".join(ways[name]) for name in ways if name.split(".")[0] in SLOW}
    assert not slow


# --- sizes --------------------------------------------------------------------------------------


def long_ones(path: Path) -> list[tuple[str, int]]:
    return [
        (node.name, node.end_lineno - node.lineno + 1)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]


def marked(path: Path) -> object:
    if ids(path) not in LONG_FILES:
        return path
    reason = f"{ids(path)} has more than {LONGEST_FILE} lines"
    return pytest.param(path, marks=pytest.mark.xfail(strict=True, reason=reason))


@pytest.mark.parametrize("path", map(marked, FILES), ids=ids)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_functions_are_short(path: Path) -> None:
    assert not long_ones(path)


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "ui.py"], ids=ids)
def test_only_ui_prints(path: Path) -> None:
    calls = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("print", "breakpoint")
    ]
    assert not calls, f"print on lines {calls}"
