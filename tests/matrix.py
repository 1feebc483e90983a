"""Every family, layout, width and method: a tiny checkpoint each, and how well it reloads.

Tests look at a part of it (tests/stages/test_matrix.py), `benchmarks/reload_matrix.py` at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from safetensors.torch import load_file

from qatbench.stages.common import silent
from qatbench.stages.quantize import quantize
from qatbench.stages.train import TrainRequest, train
from qatbench.stages.train_settings import TrainSettings
from qatbench.stages.verify import verify
from qatbench.tasks import selector
from qatbench.vlm import layout
from qatbench.vlm.load import ModelFolder, find

FAMILIES = ("text", "qwen2", "qwen3", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
LAYOUTS = (("gptq", 8), ("gptq", 4), ("awq", 4), ("gptq", 3), ("gptq", 2))
METHODS = ("rtn", "gptq", "awq", "autoround", "qat", "grace")
TRAINED = ("qat", "grace")


@dataclass(frozen=True)
class Cell:
    """A checkpoint of the matrix; `layout` is asked for where the method's own is another."""

    family: str
    layout: str
    bits: int
    method: str

    @property
    def asked(self) -> Any:
        """AWQ below 4 bits is asymmetric: it keeps the layout that holds that."""
        return "auto" if self.method == "awq" and self.bits < 4 else self.layout


@dataclass(frozen=True)
class Reloaded:
    """What plain transformers made of it; errors are shares of the logits' spread."""

    text: float
    image: float | None
    missing: int
    unexpected: int
    quantized: set[str]  # modules that hold packed weights
    changed: set[str]  # 16-bit tensors that are not those of the source, bit for bit
    defects: list[str]  # rules of `qatbench verify` that it breaks, vLLM's included


def make(cell: Cell, source: ModelFolder, data: dict[str, str], out: Path) -> dict[str, Any]:
    """Write the checkpoint; returns its provenance."""
    if cell.method in TRAINED:
        part = "all" if source.arch.is_vlm else "text"
        settings = TrainSettings(
            method=cell.method, steps=2, bits=cell.bits, group_size=tiny.GROUP, batch_size=4,
            micro_batch_size=2, lr=1e-3, scale_lr=1e-2, omega_warmup=1, layout=cell.asked,
        )  # fmt: skip
        rows = selector.load(selector.parse(f"scienceqa:train:{part}"), data)
        teacher = source if cell.method == "grace" else None
        asked = TrainRequest(settings, source, teacher, rows, "cpu")
        return train(asked, out, resume=False, progress=silent)
    family = "llava" if source.arch.is_vlm else "text"  # which questions calibrate
    chosen = replace(tiny.settings(family, cell.method, cell.bits), layout=cell.asked, iters=10)
    return quantize(source, chosen, data, out, resume=False, progress=silent)


def reload(record: dict[str, Any], source: ModelFolder, out: Path) -> Reloaded:
    """Load it as any user does, and compare its 16-bit tensors with the source's."""
    auto = getattr(transformers, find(str(out)).arch.auto_class)
    model, info = auto.from_pretrained(
        out, dtype=torch.float32, device_map="cpu", output_loading_info=True
    )
    old, new = (load_file(folder / "model.safetensors") for folder in (source.path, out))
    proof = record["figures"]["reload"]
    return Reloaded(
        text=proof["text"],
        image=proof.get("image"),
        missing=len(info["missing_keys"]),
        unexpected=len(info["unexpected_keys"]),
        quantized={name for name, module in model.named_modules() if hasattr(module, "qweight")},
        changed={key for key in old.keys() & new.keys() if not torch.equal(old[key], new[key])},
        defects=[finding.rule for finding in verify(out, load=False).defects],
    )


def vision_keys(source: ModelFolder) -> set[str]:
    """Tensors of the frozen vision tower by their names in the file."""
    keys = load_file(source.path / "model.safetensors").keys()
    arch = source.arch
    inside = {arch.file_key(f"{part}."): part for part in arch.vision}
    mine = {key for key in keys if any(key.startswith(prefix) for prefix in inside)}
    merger = tuple(arch.file_key(f"{part}.") for part in arch.projector)
    return {key for key in mine if not key.startswith(merger)}


def linears(source: ModelFolder) -> set[str]:
    """Names of the linears that must be quantized, and no others."""
    return set(layout.linear_shapes(source.config))
