"""verify: will plain transformers and vLLM load this checkpoint, and load it right?

Rules read config, tensor headers and the tensors that they need; then, where nothing speaks
against it, the checkpoint is really loaded with plain transformers. vLLM is not run: its matching
rules are functions here (`loaders`). Nothing of the checkpoint is executed or unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qatbench import store
from qatbench.stages.common import Progress, silent
from qatbench.stages.verify import (
    rules_awq,
    rules_ct,
    rules_files,
    rules_gptq,
    rules_keys,
    rules_packed,
)
from qatbench.stages.verify.finding import Finding
from qatbench.stages.verify.subject import Subject, subject
from qatbench.vlm import load as models

Check = Callable[[Subject], Iterator[Finding]]
LOADERS = ("transformers", "vllm")
EVERY: tuple[Check, ...] = (
    rules_files.weight_files,
    rules_files.companions,
    rules_files.image_token,
    rules_files.dtypes,
    rules_keys.keys,
    rules_keys.tied_head,
    rules_keys.shapes,
    rules_keys.values,
    rules_packed.settings_there,
)
PACKED: tuple[Check, ...] = (
    rules_packed.complete,
    rules_packed.widths,
    rules_packed.types,
    rules_packed.outside,
    rules_packed.fused,
)
FORMATS: Mapping[str, tuple[Check, ...]] = {
    "gptq": (
        rules_gptq.config_keys,
        rules_gptq.zeros_there,
        rules_gptq.zero_points,
        rules_gptq.order,
        rules_gptq.blocks,
        rules_gptq.vllm_modules,
        rules_gptq.dynamic,
    ),
    "awq": (rules_awq.config_keys, rules_awq.skip_list, rules_awq.fields),
    "compressed-tensors": (rules_ct.targets, rules_ct.settings),
}


@dataclass(frozen=True)
class Verdict:
    """What was found of one checkpoint."""

    path: Path
    model_type: str
    method: str | None  # None: 16 bits
    bits: object
    group_size: object
    findings: tuple[Finding, ...]
    reload: dict[str, Any] | None  # what the real reload saw; None: not done
    recorded: dict[str, Any] | None  # the reload proof of the stage that made it, if one did

    @property
    def defects(self) -> list[Finding]:
        """Findings for which a loader does not load the checkpoint right."""
        return [finding for finding in self.findings if finding.defect]

    @property
    def sound(self) -> bool:
        """Whether both loaders load it right, as far as the format promises."""
        return not self.defects

    @property
    def repairable(self) -> bool:
        """Whether a repaired copy would be sound: there are defects, and none is beyond repair."""
        return bool(self.defects) and all(finding.repairable for finding in self.defects)

    @property
    def exit_code(self) -> int:
        """0 sound, 1 not."""
        return 0 if self.sound else 1

    def loader(self, name: str) -> str:
        """What one loader makes of it, in words."""
        if any(finding.breaks(name) for finding in self.findings):
            return "breaks"
        if name == "vllm":
            refused = any(finding.rule == "plain-only" for finding in self.findings)
            return "refuses this width" if refused else "loads right, by its rules"
        return "loads right" if self.reload else "loads right, by its rules"

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "checkpoint": str(self.path),
            "model_type": self.model_type,
            "format": self.method or "16-bit",
            "bits": self.bits,
            "group_size": self.group_size,
            "sound": self.sound,
            "loaders": {name: self.loader(name) for name in LOADERS},
            "findings": [finding.as_json() for finding in self.findings],
            "reload": self.reload,
            "recorded": self.recorded,
        }


def verify(folder: Path, *, load: bool = True, progress: Progress = silent) -> Verdict:
    """Check a checkpoint; `load` also loads it, unless transformers is known to break.

    Raises: PrerequisiteError when the folder or a needed file is not there; ArtifactError when one
        cannot be read; UsageError for a family or a format that is not covered.
    """
    progress("Reading the checkpoint", 0, 0)
    models.quiet_libraries()
    checked = subject(folder)
    findings = inspect(checked)
    record = None
    if load and not any(finding.breaks("transformers") for finding in findings):
        from qatbench.stages.verify.reload import reload

        progress("Loading it with plain transformers", 0, 0)
        more, record = reload(checked)
        findings += more
    return verdict(checked, findings, record)


def inspect(checked: Subject) -> list[Finding]:
    """What the rules find, defects first."""
    checks = EVERY + (PACKED + FORMATS[str(checked.method)] if checked.method else ())
    findings = [finding for check in checks for finding in check(checked)]
    if any(finding.rule == "plain-only" for finding in findings):  # vLLM is not promised then
        for_it = (f for f in findings if f.transformers or not f.vllm)
        findings = [replace(finding, vllm="") for finding in for_it]
    return sorted(findings, key=lambda finding: not finding.defect)


def verdict(
    checked: Subject, findings: list[Finding], record: dict[str, Any] | None = None
) -> Verdict:
    """The findings with what the checkpoint is."""
    made = checked.checkpoint.json(store.PROVENANCE).get("figures", {})
    bits, group_size = checked.grid if checked.method else (16, None)
    return Verdict(
        checked.checkpoint.path,
        checked.arch.model_type,
        checked.method,
        bits,
        group_size,
        tuple(findings),
        record,
        made.get("reload") if isinstance(made, dict) else None,
    )
