"""A finding: a rule that fired, where, and whether a copy can be repaired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qatbench.stages.verify.rules import RULES, SLOW


@dataclass(frozen=True)
class Finding:
    """One rule that fired, once for all places where it does."""

    rule: str
    transformers: str  # what plain transformers does with it; "" when it loads right
    vllm: str
    where: str
    what: str
    fix: str
    repairable: bool

    @property
    def defect(self) -> bool:
        """Whether a loader does not load the checkpoint right."""
        return any(effect not in ("", SLOW) for effect in (self.transformers, self.vllm))

    def breaks(self, loader: str) -> bool:
        """Whether `transformers` or `vllm` does not load the checkpoint right."""
        return getattr(self, loader) not in ("", SLOW)

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {"defect": self.defect} | asdict(self)


def found(
    rule: str,
    where: str,
    detail: str = "",
    *,
    repairable: bool = False,
    transformers: str | None = None,
    vllm: str | None = None,
) -> Finding:
    """A finding of a rule; effects other than the table's are given.

    `repairable` counts for rules whose table says `if`.
    """
    row = RULES[rule]
    return Finding(
        rule,
        row.transformers if transformers is None else transformers,
        row.vllm if vllm is None else vllm,
        where,
        f"{row.means}: {detail}" if detail else row.means,
        row.fix,
        row.repair == "yes" or (row.repair == "if" and repairable),
    )


def few(names: Sequence[str], most: int = 2) -> str:
    """The first names and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def entry(name: str) -> str:
    """Where an entry of quantization_config is."""
    return f"config.json: quantization_config.{name}"
