"""Compare the committed runs of a recipe again, from their predictions: report, tables, figures.

Needs neither models nor data. Of each folder, recipe.lock.yaml says which arms there are, which is
the baseline and what the margin is; the seeds are the recipe's, so the same runs give the same
comparison. Questions are shown of the drawn benchmark only.

    python benchmarks/recompare.py [results/NAME ...]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import yaml

from qatbench.recipe import Recipe
from qatbench.stages.run import compare

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main() -> None:
    """All folders with a recipe but the demo's, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="default: all under results/")
    given = parser.parse_args()
    found = sorted(lock.parent for lock in RESULTS.glob("*/recipe.lock.yaml"))
    for folder in given.folders or [one for one in found if one.name != "demo"]:
        started = time.monotonic()
        recipe = Recipe.model_validate(yaml.safe_load((folder / "recipe.lock.yaml").read_text()))
        compare(recipe, folder, recipe.data.paths)
        print(f"{folder}: {time.monotonic() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
