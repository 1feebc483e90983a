"""A repaired copy in the making: a changed config and a list of changes to tensors.

Weight files are rewritten one at a time, or copied when nothing in them changes; the original is
only read.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qatbench import store
from qatbench.stages.verify.reader import INDEX, SINGLE, Checkpoint
from qatbench.stages.verify.subject import Subject, where_settings_are

# No pickles, no code, and no record of the stage that made the original.
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")
NOT_COPIED = ("config.json", INDEX, store.PROVENANCE, store.UNFINISHED)


@dataclass
class Draft:
    """Changes to a checkpoint."""

    subject: Subject
    config: dict[str, Any] = field(default_factory=dict)
    drop: set[str] = field(default_factory=set)
    rename: dict[str, str] = field(default_factory=dict)
    put: dict[str, tuple[str, Callable[[], Tensor]]] = field(default_factory=dict)
    """New key -> a key whose file it goes to, and what makes it."""
    files_anew: bool = False

    @classmethod
    def of(cls, subject: Subject) -> Draft:
        """A draft without changes."""
        return cls(subject, copy.deepcopy(subject.config))

    @property
    def settings(self) -> dict[str, Any]:
        """The quantization_config to change, where the original has it; made if need be."""
        holder = where_settings_are(self.config, self.subject.arch)
        settings: dict[str, Any] = holder.setdefault("quantization_config", {})  # type: ignore[attr-defined]
        return settings

    def key(self, name: str) -> str:
        """The key under which a tensor is written: as the family's published files have it."""
        return self.subject.arch.file_key(name)

    def replace(self, key: str, make: Callable[[], Tensor]) -> None:
        """Write another tensor under a key."""
        self.drop.add(key)
        self.put[key] = (key, make)

    def write(self, out: Path) -> None:
        """Write the copy into an empty folder, config.json last."""
        checkpoint = self.subject.checkpoint
        for pattern in COMPANIONS:
            for file in checkpoint.path.glob(pattern):
                if file.name not in NOT_COPIED:
                    shutil.copyfile(file, out / file.name)
        if self.drop or self.rename or self.put or self.files_anew:
            self._rewrite(out)
        else:
            for name in checkpoint.files:
                shutil.copyfile(checkpoint.path / name, out / name)
            if checkpoint.index is not None:
                store.write_json(out / INDEX, checkpoint.index)
        store.write_json(out / "config.json", self.config)

    def _rewrite(self, out: Path) -> None:
        checkpoint = self.subject.checkpoint
        names = _names(checkpoint)
        places: dict[str, str] = {}
        total = 0
        for file, name in names.items():
            tensors = self._tensors(checkpoint, file)
            save_file(tensors, out / name, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, name)
            total += sum(value.numel() * value.element_size() for value in tensors.values())
        if len(names) > 1:
            store.write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": places})

    def _tensors(self, checkpoint: Checkpoint, file: str) -> dict[str, Tensor]:
        entries = checkpoint.entries
        kept = [
            key for key, entry in entries.items() if entry.file == file and key not in self.drop
        ]
        tensors = {self.rename.get(key, key): value for key, value in checkpoint.tensors(kept)}
        for key, (beside, make) in self.put.items():
            if entries[beside].file == file:
                tensors[self.rename.get(key, key)] = make().contiguous()
        return tensors


def _names(checkpoint: Checkpoint) -> dict[str, str]:
    """Weight file -> its name in the copy."""
    files = checkpoint.files
    if len(files) == 1:
        return {files[0]: SINGLE}
    return {
        file: f"model-{number:05d}-of-{len(files):05d}.safetensors"
        for number, file in enumerate(files, start=1)
    }
