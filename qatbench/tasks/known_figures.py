"""What the published releases of ScienceQA and MMBench hold, to tell a whole copy from a part.

Sources: ScienceQA 2cbf8318's pid_splits.json, LLaVA c121f043's question file and its
mmbench_dev_20230712.tsv were counted; the other MMBench releases and ScienceQA-IMG are as their
data set cards and MMBench's README state them. Of v1.1 (`*_V11`) no figures are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """One split of one release; None where it is not known."""

    release: str
    rows: int
    questions: int | None = None  # a circular one counts once
    passes: Mapping[int, int] | None = None  # passes of a question -> questions
    image: int | None = None  # rows with one
    hint: int | None = None
    both: int | None = None  # image and hint
    neither: int | None = None
    choices: Mapping[int, int] | None = None  # options -> rows


_WHOLE = "ScienceQA"
SCIENCEQA: dict[str, Figures] = {
    "train": Figures(_WHOLE, 12726),
    "val": Figures(_WHOLE, 4241),
    "test": Figures(
        _WHOLE, 4241, image=2017, hint=2046, both=1257, neither=1435,
        choices={2: 2228, 3: 971, 4: 1004, 5: 38},
    ),
    "trainval": Figures(_WHOLE, 16967),
    "minitrain": Figures(_WHOLE, 1272),
    "minival": Figures(_WHOLE, 424),
    "minitest": Figures(_WHOLE, 424),
}  # fmt: skip
SCIENCEQA_IMG: dict[str, Figures] = {
    "val": Figures("ScienceQA-IMG", 2097, image=2097),
    "test": Figures("ScienceQA-IMG", 2017, image=2017, hint=1257, both=1257, neither=0),
}
EXPECTED = {"scienceqa": ("train", "val", "test"), "mmbench": ()}  # splits of a whole copy

DEV_2023_07 = Figures("MMBench dev 20230712", 4377, 1176, passes={4: 938, 3: 149, 2: 89})
DEV_2023_10 = Figures("MMBench dev 20231003", 4329, 1164)
TEST = Figures("MMBench test", 6666, 1784)
CC = Figures("CCBench", 2040, 510)


def scienceqa(split: str, *, only_images: bool, place: str) -> Figures | None:
    """The figures that a split is to be held against; those of IMG by its name, or its images."""
    whole = SCIENCEQA.get(split)
    image = SCIENCEQA_IMG.get(split)
    by_name = place.lower().endswith("img")
    return image if image and (by_name or (only_images and split in ("val", "test"))) else whole


def mmbench(split: str, *, rows: int, place: str) -> Figures | None:
    """The release that a file's name states, else the one of its rows, else the current one.

    `place` is the name of the TSV, or of the folder of parquet files. None: no figures are known.
    """
    name = place.lower()
    if "v11" in name:
        return None
    if "ccbench" in name or name in ("cc", "cc_test", "mmbench_cc"):
        return CC
    if split == "test":
        return CC if rows == CC.rows else TEST
    if split != "dev":
        return None
    older = "20230712" in name or ("20231003" not in name and rows > DEV_2023_10.rows)
    return DEV_2023_07 if older else DEV_2023_10
