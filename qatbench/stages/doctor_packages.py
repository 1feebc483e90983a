"""doctor: versions of Python and of the packages, what they ask of each other, and imports."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from qatbench.recipe import TRAINED
from qatbench.stages.doctor_probe import IMPORTED
from qatbench.stages.doctor_rows import Row, State

OURS = "qatbench"
NEW = "make setup VENV=NEW   (torch, torchvision and gptqmodel in one resolve)"
# What is needed by some methods only: a package, its requirement where it is no dependency of ours.
PARTLY: dict[str, tuple[tuple[str, ...], str]] = {
    "torchao": (TRAINED, ""),
    "auto-round": (("autoround",), "auto-round"),
}
DEAD = {
    "autoawq": "AutoAWQ ended in 2025; transformers 5 does not call it",
    "auto-gptq": "AutoGPTQ ended in 2024; it shadows gptqmodel in older optimum",
}
PAIR = ("torch", "torchvision")  # built against each other


class Installed(Protocol):
    """What is installed; tests have their own."""

    def version(self, name: str) -> str | None:
        """A package's version, None when it is not there."""

    def requires(self, name: str) -> list[str]:
        """What a package asks for in its metadata."""

    def python(self, name: str) -> str:
        """What a package asks of Python: `>=3.11`, or nothing."""


class Here:
    """What is installed in this environment, from metadata: nothing is imported."""

    def version(self, name: str) -> str | None:
        """A package's version, None when it is not there."""
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def requires(self, name: str) -> list[str]:
        """What a package asks for in its metadata."""
        try:
            return importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            return []

    def python(self, name: str) -> str:
        """What a package asks of Python: `>=3.11`, or nothing."""
        try:
            told = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            return ""
        return str(told.json.get("requires_python", ""))


def rows(installed: Installed, found: Mapping[str, Any], method: str | None) -> list[Row]:
    """One row for Python, one a package that decides a number or is wrong, one a dead one.

    `found` is what `doctor_probe.probe` returned.
    """
    try:
        wrong = {name: list(unmet(installed, name)) for name in (OURS, *IMPORTED, "auto-round")}
    except ImportError as error:
        return [Row("packages", "failure", f"versions cannot be compared: {error}", NEW)]
    told = [_python(installed)]
    told += [_package(installed, name, wrong, found, method) for name in IMPORTED]
    told += [
        Row(name, "failure", why, f"pip install '{need}'")
        for name, need, why in wrong[OURS]
        if name not in IMPORTED
    ]
    if installed.version("auto-round") or method == "autoround":
        told.append(_package(installed, "auto-round", wrong, found, method))
    told += _builds(installed)
    for name, why in DEAD.items():
        if installed.version(name):
            there = f"{installed.version(name)} is installed: {why}"
            told.append(Row(name, "warning", there, f"pip uninstall {name}"))
    return told


def unmet(installed: Installed, name: str) -> Iterator[tuple[str, str, str]]:
    """(package, requirement, what is there instead) for each requirement of `name` that fails.

    Raises: ImportError without the package `packaging`.
    """
    from packaging.requirements import Requirement

    for text in installed.requires(name) if installed.version(name) else ():
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        there = installed.version(need.name)
        if there is None:
            yield need.name, f"{need.name}{need.specifier}", "not installed"
        elif not need.specifier.contains(there, prereleases=True):
            yield need.name, f"{need.name}{need.specifier}", f"{need.name} {there} is installed"


def _python(installed: Installed) -> Row:
    from packaging.specifiers import SpecifierSet

    asked, have = installed.python(OURS), platform.python_version()
    if SpecifierSet(asked).contains(have, prereleases=True):
        return Row("Python", "ok", have)
    return Row(
        "Python", "failure", f"{have}, qatbench needs {asked}", "make setup PYTHON=python3.11"
    )


def _package(
    installed: Installed,
    name: str,
    wrong: Mapping[str, list[tuple[str, str, str]]],
    found: Mapping[str, Any],
    method: str | None,
) -> Row:
    """Whether a package is there, in a version that all ask for, content itself, and imports."""
    methods, asked = PARTLY.get(name, ((), ""))
    bad: State = "failure" if not methods or method in methods else "warning"
    need = next((need for other, need, _ in wrong[OURS] if other == name), asked or name)
    version = installed.version(name)
    if version is None:
        return Row(name, bad, "not installed", f"pip install '{need}'")
    if need not in (name, asked):
        return Row(name, bad, f"{version}, qatbench needs {need}", NEW)
    if wrong[name]:
        told = "; ".join(f"{need}, but {there}" for _, need, there in wrong[name])
        return Row(name, bad, f"{version} needs {told}", NEW)
    why = found.get("imports", {}).get(name)
    if why is not None:
        return Row(name, bad, f"{version} cannot be imported: {why}", NEW)
    return Row(name, "ok", version)


def _builds(installed: Installed) -> list[Row]:
    """Torch and torchvision for different CUDA versions break each other's operators."""
    versions = [installed.version(name) for name in PAIR]
    labels = [version.partition("+")[2] for version in versions if version]
    if len(labels) < len(PAIR) or not all(labels) or len(set(labels)) == 1:
        return []
    told = " and ".join(f"{n} {v}" for n, v in zip(PAIR, versions, strict=True))
    return [Row("torch builds", "failure", f"{told} are built for different devices", NEW)]
