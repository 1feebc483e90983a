"""How exactly checkpoints reload: every family, layout, width and method, on tiny random models.

A cell is the largest difference of a logit, over the logits' standard deviation, between the
checkpoint as plain transformers load it (CPU, fp32) and the weights it was made from: on a text
prompt, and on an image prompt where the family sees. The bound is proof.RELOAD_BOUND.

    python benchmarks/reload_matrix.py [--family F ...] [--out docs/reload.md]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch._dynamo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import matrix  # noqa: E402
import tiny  # noqa: E402
from matrix import Cell  # noqa: E402

from qatbench.errors import QatbenchError  # noqa: E402
from qatbench.stages.proof import RELOAD_BOUND  # noqa: E402
from qatbench.vlm.load import find  # noqa: E402

NAMES = {
    "text": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "llava": "LLaVA-1.5",
    "qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL",
}  # fmt: skip


def measure(cell: Cell, source: Any, data: dict[str, str], scratch: Path) -> tuple[str, int, int]:
    """The cell's text, missing keys and unexpected keys."""
    out = scratch / f"{cell.family}-{cell.layout}-{cell.bits}-{cell.method}"
    try:
        record = matrix.make(cell, source, data, out)
    except QatbenchError as error:
        return f"n/a: {error.message}", 0, 0
    found = matrix.reload(record, source, out)
    if found.quantized != matrix.linears(source) or found.changed & matrix.vision_keys(source):
        raise SystemExit(f"{cell}: not the language model's linears alone were quantized")
    if found.defects:
        raise SystemExit(f"{cell}: qatbench verify finds {', '.join(found.defects)}")
    text = f"{found.text:.4f}" + ("" if found.image is None else f" / {found.image:.4f}")
    return text, found.missing, found.unexpected


def page(rows: list[list[str]], missing: int, unexpected: int, seconds: float) -> str:
    """The table with what a reader must know of it."""
    head = ["family", "layout", "bits", *matrix.METHODS]
    lines = [
        "# Reload errors",
        "",
        "`python benchmarks/reload_matrix.py --out docs/reload.md`, tiny random models of each "
        f"family (2 layers, group size {tiny.GROUP}), transformers on a CPU in fp32, "
        f"{seconds:.0f} s.",
        "",
        f"Missing keys in all cells together: {missing}; unexpected keys: {unexpected}. In every "
        "cell the language model's linears, and nothing else, are packed, and the vision tower is "
        "that of the 16-bit model bit for bit.",
        "",
        "A cell is the largest difference of a logit over the logits' standard deviation, text / "
        f"image, against the weights that were to be stored. A checkpoint above {RELOAD_BOUND} is "
        "not published. What is left is the kernels' own rounding: they hold scale times code in "
        "fp16. A wrong zero point, scale, nibble order or vision weight moves it by 1.5 and more.",
        "",
        "At 4 and 8 bits the checkpoints also satisfy vLLM's rules (`qatbench verify`); at 3 and 2 "
        "bits plain transformers load them, and nothing else is claimed. AWQ at 3 and 2 bits is "
        "asymmetric and stored as `gptq_v2`; at 8 bits, and in the gptq layout, it is symmetric. "
        "The awq layout is defined for 4 bits only.",
        "",
        "| " + " | ".join(head) + " |",
        "| --- | --- | ---: |" + " ---: |" * len(matrix.METHODS),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Fill the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", nargs="+", choices=matrix.FAMILIES, default=matrix.FAMILIES)
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    given = parser.parse_args()
    torch._dynamo.config.disable = True  # the library would compile 3- and 2-bit unpacking
    started, rows, missing, unexpected = time.monotonic(), [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = {"scienceqa": str(tiny.save_questions(scratch / "scienceqa"))}
        for family in given.family:
            source = find(str(tiny.SAVE[family](scratch / family)))
            for layout, bits in matrix.LAYOUTS:
                row = [NAMES[family], layout, str(bits)]
                for method in matrix.METHODS:
                    cell = Cell(family, layout, bits, method)
                    text, lacks, more = measure(cell, source, data, scratch)
                    missing, unexpected = missing + lacks, unexpected + more
                    row.append(text)
                rows.append(row)
                print(" | ".join(row), file=sys.stderr, flush=True)
    text = page(rows, missing, unexpected, time.monotonic() - started)
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
