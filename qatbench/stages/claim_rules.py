"""The schema of claims.yaml: published claims as data, each with the rule that tests it."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated, Literal

import yaml
from pydantic import Field, TypeAdapter

from qatbench.records import Record
from qatbench.report.model import ArmResult, Family, Part

Expected = Literal["better", "worse", "not worse"]


class Needs(Record):
    """What a comparison must be of, for the claim to be tested by it."""

    model: str | None = None  # which one; any without
    tasks: tuple[str, ...] = ()  # by the name before the split; any without
    images: bool = False  # questions with images, shown


class Arms(Record):
    """Which arms; where several fit, the most accurate on the same questions is taken."""

    family: Family | None = None
    method: tuple[str, ...] = ()  # base: 16 bit and untrained, also where no method was recorded
    bits: int | None = None
    name: tuple[str, ...] = ()  # of the folder

    def fits(self, arm: ArmResult) -> bool:
        """Whether the arm has everything that is asked for."""
        method = arm.method or ("base" if arm.family == "16-bit" else None)
        return (
            self.family in (None, arm.family)
            and (not self.method or method in self.method)
            and self.bits in (None, arm.bits)
            and (not self.name or arm.name in self.name)
        )

    def words(self) -> str:
        """Say which arms, as "grace arm at 4 bits"."""
        methods = ("untrained 16-bit" if method == "base" else method for method in self.method)
        kind = " or ".join(methods) or self.family
        named = f"named {' or '.join(f'`{name}`' for name in self.name)}" if self.name else None
        bits = f"at {self.bits} bits" if self.bits else None
        return " ".join(filter(None, [kind, "arm", named, bits]))


class PairTest(Record):
    """An arm against another, on one grid where both are quantized."""

    kind: Literal["pair"]
    arm: Arms
    reference: Arms | Literal["source"]  # source: the 16-bit arm that the arm was made from
    expect: Expected
    control: Arms | None = None  # told beside the figures, without a say in the verdict
    needs: Needs = Needs()


class AblationTest(Record):
    """What one part of GRACE is worth, on every grid where that was asked."""

    kind: Literal["ablation"]
    part: Part
    expect: Literal["helps"]
    needs: Needs = Needs()


class MemoryTest(Record):
    """Bytes saved, as a fraction of the reference's: in use, or where not measured on disk."""

    kind: Literal["memory"]
    arm: Arms
    reference: Arms
    expect_at_least: float = Field(gt=0, lt=1)
    needs: Needs = Needs()


class SpeedTest(Record):
    """Decode throughput at batch 1 over that of the 16-bit arm, in the same engine."""

    kind: Literal["speed"]
    arm: Arms
    reference: Arms
    expect_at_least: float = Field(gt=0)
    needs: Needs = Needs()


Test = Annotated[
    PairTest | AblationTest | MemoryTest | SpeedTest,
    Field(discriminator="kind"),
]


class Published(Record):
    """One entry of claims.yaml."""

    id: str
    claim: str  # a sentence
    source: str
    published: str  # its figures in words
    test: Test


def published() -> tuple[Published, ...]:
    """Read claims.yaml, in its order."""
    text = files("qatbench.report").joinpath("claims.yaml").read_text(encoding="utf-8")
    return TypeAdapter(tuple[Published, ...]).validate_python(yaml.safe_load(text))
