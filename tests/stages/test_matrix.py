"""Families, layouts and methods: what is written reloads plainly, and vision stays as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matrix
import pytest
import tiny
from matrix import Cell
from tiny import Source

from qatbench.errors import UsageError
from qatbench.quant.result import layout_of
from qatbench.stages.common import silent
from qatbench.stages.quantize import quantize
from qatbench.stages.verify import verify
from qatbench.vlm.load import find

CELLS = [
    *(
        Cell(family, layout, 4, method)
        for family in matrix.FAMILIES
        for layout in ("gptq", "awq")
        for method in matrix.METHODS
    ),
    *(Cell("qwen2_vl", "gptq", 8, method) for method in matrix.METHODS),
    *(Cell("qwen3_vl", "gptq", bits, method) for bits in (3, 2) for method in ("rtn", "awq")),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c.family}-{c.layout}-{c.bits}-{c.method}")
def test_it_reloads(cell: Cell, source: Source, data: dict[str, str], tmp_path: Path) -> None:
    folder = source(cell.family)
    found = matrix.reload(matrix.make(cell, folder, data, tmp_path), folder, tmp_path)
    # RELOAD_BOUND's comment says where this comes from
    assert found.text < 0.012
    assert (found.image is not None) == folder.arch.is_vlm
    assert (found.image or 0) < 0.012
    assert (found.missing, found.unexpected) == (0, 0)
    assert found.quantized == matrix.linears(folder)
    assert not found.changed & matrix.vision_keys(folder)
    settings = find(str(tmp_path)).quantization or {}
    assert settings["quant_method"] == cell.layout
    assert found.defects == []  # of transformers and, at 4 and 8 bits, of vLLM
    if cell.bits in (4, 8) and cell.layout == "gptq":
        assert settings["sym"]  # or vLLM refuses it


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_one_scale_a_row_reloads(layout: Any, source: Source, tmp_path: Path) -> None:
    folder = source("llava")
    settings = replace(tiny.settings("text", "rtn"), group_size=-1, layout=layout)
    record = quantize(folder, settings, {}, tmp_path, resume=False, progress=silent)
    proof = record["figures"]["reload"]
    assert (find(str(tmp_path)).quantization or {})["group_size"] == -1
    assert max(proof["text"], proof["image"]) < min(0.15, proof["bound"])
    assert verify(tmp_path, load=False).sound


def test_layouts_of_methods_and_widths() -> None:
    assert [layout_of("auto", "gptq", bits) for bits in (2, 3, 4, 8)] == ["gptq"] * 4
    expected = ["gptq_v2", "gptq_v2", "awq", "gptq"]
    assert [layout_of("auto", "awq", bits) for bits in (2, 3, 4, 8)] == expected
    assert layout_of("awq", "grace", 4) == "awq"
    assert layout_of("gptq", "awq", 3) == "gptq"
    with pytest.raises(UsageError, match="4 bits, not 8"):
        layout_of("awq", "rtn", 8)
