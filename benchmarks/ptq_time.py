"""Time of GPTQ and AWQ: this project's backend against the library called directly, side by side.

Both solve the same model on the same samples in one run; the library's own time includes
its packing and saving, ours the export with its reload proof. Prints seconds and the ratio.

    python benchmarks/ptq_time.py MODEL --data DIR [--samples 128] [--batch-size 8]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qatbench.quant import backends
from qatbench.quant.grid import Grid
from qatbench.stages import quantize as stage
from qatbench.stages.common import silent
from qatbench.tasks import selector
from qatbench.vlm import load as models


def library_alone(
    method: str, path: Path, batches: list[dict[str, Any]], bits: int, dtype: torch.dtype
) -> float:
    """Quantize and save with gptqmodel only; seconds."""
    grid = Grid(bits, 64)
    started = time.monotonic()
    with backends.quiet(), tempfile.TemporaryDirectory() as out:
        model = backends._load(method, path, grid, "cpu", dtype)
        samples = [
            {"input_ids": row["input_ids"][0], "attention_mask": row["attention_mask"][0]}
            for row in batches
        ]
        model.quantize(samples, batch_size=1)
        model.save(out)
    return time.monotonic() - started


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument(
        "--dtype", default="bfloat16", help="of the library's model; ours is float32"
    )
    parser.add_argument("--batch-size", type=int, default=stage.CALIBRATION_BATCH)
    parser.add_argument("--method", action="append", choices=["gptq", "awq"])
    given = parser.parse_args()
    folder = models.find(given.model)
    paths = {"scienceqa": given.data}
    chosen = selector.parse("scienceqa:train:text")
    loaded = models.load(folder, device="cpu", dtype=torch.float32)
    figures: dict[str, Any] = {"samples": given.samples, "threads": torch.get_num_threads()}
    for method in given.method or ["gptq", "awq"]:
        settings = stage.QuantizeSettings(
            method, 4, 64, chosen, given.samples, device="cpu", batch_size=given.batch_size
        )
        rows = stage.calibration_questions(settings, paths)
        batches = stage.calibration_batches(loaded, rows, settings.protocol)
        theirs = library_alone(method, folder.path, batches, 4, getattr(torch, given.dtype))
        with tempfile.TemporaryDirectory() as out:
            started = time.monotonic()
            record = stage.quantize(
                folder, settings, paths, Path(out) / "c", resume=False, progress=silent
            )
            whole = time.monotonic() - started
        solve = record["figures"]["calibration_seconds"]
        figures[method] = {
            "library_seconds": round(theirs, 1),
            "solve_seconds": round(solve, 1),
            "whole_verb_seconds": round(whole, 1),
            "solve_over_library": round(solve / theirs, 2),
            "layers_above_rtn": len(record["figures"]["layers"]["above_rtn"]),
        }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
