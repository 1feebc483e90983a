"""Seconds a question of `qatbench eval` in option mode, fp32 on the CPU, model loading left out.

python benchmarks/eval_time.py MODEL --data DIR [--limit 200]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from qatbench import store
from qatbench.stages.common import silent
from qatbench.stages.evaluate import EvalSettings, evaluate
from qatbench.tasks import selector
from qatbench.vlm import load as models


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=200)
    given = parser.parse_args()
    settings = EvalSettings(
        (selector.parse("scienceqa:test:text"),),
        {"scienceqa": "qatbench"},
        dtype="float32",
        limit=given.limit,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as out:
        run = Path(out) / "run"
        evaluate(
            models.find(given.model), settings, {"scienceqa": given.data}, run,
            resume=False, progress=silent,
        )  # fmt: skip
        metrics = store.read_json(run / "metrics.json")
    seconds = 1 / metrics["questions_per_second"]
    figures = {"seconds_a_question": round(seconds, 3), "threads": torch.get_num_threads()}
    print(json.dumps(figures | {"n": metrics["tasks"][0]["overall"]["n"]}))


if __name__ == "__main__":
    main()
