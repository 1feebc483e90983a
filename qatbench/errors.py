"""Errors a user can act on: each class is an exit code, each instance carries a hint.

`cli.main` prints `error: <what, where>` and `hint: <what to do>` and exits with `exit_code`.
Anything that is not a QatbenchError is a bug (exit 70).
"""

from __future__ import annotations


class QatbenchError(Exception):
    """Base of all expected failures."""

    exit_code = 70

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(QatbenchError):
    """A flag, path or combination that cannot work (exit 2)."""

    exit_code = 2


class RecipeError(UsageError):
    """One or more problems in a recipe; the message lists all of them (exit 2)."""


class PrerequisiteError(QatbenchError):
    """Something that must be there is not: data, weights, a package, a GPU (exit 3)."""

    exit_code = 3


class ArtifactError(QatbenchError):
    """A file made earlier is damaged, stale or belongs to another question set (exit 4)."""

    exit_code = 4


class NumericsError(QatbenchError):
    """A loss, a weight or a reloaded model is numerically wrong (exit 5)."""

    exit_code = 5


class ShapeError(NumericsError):
    """Tensors whose shapes do not belong together (exit 5)."""
