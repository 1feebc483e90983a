"""Figures: valid, the same bytes every time, and readable on white and on black."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from run_folders import predictions, write_run

from qatbench.report.figures import MOST_LINES, TOGETHER, TRAINING_FIGURE, figures
from qatbench.report.markdown import render
from qatbench.report.model import Comparison
from qatbench.report.svg import COLOURS, GREY
from qatbench.stages.compare import compare
from qatbench.stages.report_files import write

SVG = "{http://www.w3.org/2000/svg}"


def trained(root: Path, name: str, method: str, bits: int | None, seeds: int = 2) -> Path:
    """An arm with logs of 130 steps; every third step of grace has no image."""
    for seed in range(seeds):
        folder = root / name / f"seed-{seed}"
        write_run(folder, predictions([1, 1, 0, 1, 0, 1]), method=method, bits=bits, group_size=64)
        lines = []
        for k in range(1, 131):
            line: dict[str, object] = {"step": k, "ce": 1 / k + seed}
            if method == "grace":
                rcka = None if k % 3 == 0 else 0.1
                line |= {"kd": 2 / k, "rcka": rcka, "gate": 0.9, "beta": 0.5 + k / 1000}
            lines.append(json.dumps(line) + "\n")
        (folder / "train.jsonl").write_text("".join(lines))
    return root / name


@pytest.fixture
def few(tmp_path: Path) -> Comparison:
    arms = [
        trained(tmp_path, "sft", "sft", None),
        trained(tmp_path, "grace $x$ & <y>", "grace", 4),
        trained(tmp_path, "_qat", "qat", 4, seeds=1),
    ]
    return compare(arms, arms[0], draws=100)


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_figure_is_valid_and_holds_its_words(few: Comparison) -> None:
    svg = figures(few)[TRAINING_FIGURE]
    found = texts(svg)
    titles = ["CE, nats a token", "KD, nats", "RCKA, 1 - CKA", "gate", "beta"]
    assert [text for text in found if text in titles] == titles
    for name in ("sft", "grace $x$ & <y>", "_qat"):  # as they are, and once
        assert found.count(name) == 1
    assert found.count("optimizer step") == 1
    assert "<dc:date>" not in svg
    assert "Matplotlib" not in svg


def test_the_same_bytes_twice_whatever_the_users_style(few: Comparison) -> None:
    import matplotlib as mpl

    first = figures(few)
    with mpl.rc_context({"font.size": 20, "lines.marker": "o", "svg.fonttype": "path"}):
        assert figures(few) == first
        assert mpl.rcParams["font.size"] == 20  # and theirs is left alone
    assert figures(Comparison.model_validate_json(few.model_dump_json())) == first
    assert "matplotlib.pyplot" not in sys.modules


def test_there_is_no_background(few: Comparison) -> None:
    svg = figures(few)[TRAINING_FIGURE]
    backgrounds = [
        group[0].get("style")
        for group in ElementTree.fromstring(svg).iter(f"{SVG}g")
        if group.get("id", "").startswith("patch_")
        and (group[0].get("d") or "").rstrip().endswith("z")
    ]
    assert backgrounds
    assert set(backgrounds) == {"fill: none"}


@pytest.mark.parametrize("page", [(255, 255, 255), (13, 17, 23)])
@pytest.mark.parametrize("colour", [*COLOURS, GREY])
def test_colours_stand_out_on_white_and_on_black(colour: str, page: tuple[int, int, int]) -> None:
    """3:1 for lines, as WCAG 2.1 (1.4.11) asks of graphics; 4:1 for the grey of small text."""

    def luminance(rgb: tuple[int, ...]) -> float:
        parts = [v / 255 for v in rgb]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    mine = luminance(tuple(bytes.fromhex(colour[1:])))
    dark, light = sorted((mine, luminance(page)))
    assert (light + 0.05) / (dark + 0.05) >= (4 if colour == GREY else 3)


def test_many_arms_are_drawn_grid_by_grid(tmp_path: Path) -> None:
    arms = [trained(tmp_path, "sft", "sft", None, seeds=1)]
    arms += [
        trained(tmp_path, f"{m}-w{bits}", m, bits, seeds=1)
        for bits in (4, 3)
        for m in ("qat", "grace")
    ]
    together = texts(figures(compare(arms, arms[0], draws=100))[TRAINING_FIGURE])
    assert together.count("CE, nats a token") == 1
    many = MOST_LINES + 1
    arms += [trained(tmp_path, f"qat-w2-{k}", "qat", 2, seeds=1) for k in range(many)]
    assert len(arms) > TOGETHER
    found = texts(figures(compare(arms, arms[0], draws=100))[TRAINING_FIGURE])
    assert [t for t in found if t in ("16 bits", "4 bits g64", "3 bits g64")] != []
    assert found.count("2 bits g64") == 2  # nine lines are too many for one panel
    assert found.count("CE, nats a token") == 5
    assert found.count("KD, nats") == 2  # of the two grids that distil; the others stay empty
    for folder in arms:
        assert found.count(folder.name) == 1


def test_curves_are_short_and_keep_gaps(few: Comparison) -> None:
    course = next(course for course in few.training if course.arm.startswith("grace"))
    assert len(course.points) == 60
    assert set(course.curves) == {"ce", "kd", "rcka", "gate", "beta"}
    curve = course.curves["ce"]
    assert course.points[0] == 1.5  # two steps
    assert curve.mean[0] == pytest.approx((1 + 1 / 2) / 2 + 0.5)
    assert (curve.low[0], curve.high[0]) == (0.75, 1.75)  # the seeds
    assert all(len(f"{abs(v):.10f}".strip("0.").replace(".", "")) <= 5 for v in curve.mean if v)
    alone = next(course for course in few.training if course.arm == "_qat")
    assert alone.curves["ce"].low == ()


def test_a_term_that_was_off_at_a_point_leaves_a_gap(tmp_path: Path) -> None:
    arm = trained(tmp_path, "grace", "grace", 4, seeds=1)
    lines = (arm / "seed-0" / "train.jsonl").read_text().splitlines(keepends=True)
    (arm / "seed-0" / "train.jsonl").write_text("".join(lines[:30]))  # a point a step
    result = compare([arm], arm, draws=100)
    rcka = result.training[0].curves["rcka"].mean
    assert [k for k, value in enumerate(rcka, start=1) if value is None] == [*range(3, 31, 3)]
    paths = re.findall(r' d="([^"]+)"', figures(result)[TRAINING_FIGURE])
    assert [path.count("M") for path in paths if path.count("M") > 1] == [10]  # ten pieces of line


def test_the_report_shows_the_figure_that_is_written(few: Comparison, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert out / TRAINING_FIGURE in write(few, out)
    assert (out / TRAINING_FIGURE).read_text() == figures(few)[TRAINING_FIGURE]
    ElementTree.parse(io.BytesIO((out / TRAINING_FIGURE).read_bytes()))
    text = render(few)
    assert f"]({TRAINING_FIGURE})" in text
    assert "![Curves over the optimizer steps of CE, KD, RCKA, gate, beta" in text
    bare = [course.model_copy(update={"curves": {}, "points": ()}) for course in few.training]
    old = few.model_copy(update={"training": tuple(bare)})  # from before there were curves
    assert TRAINING_FIGURE not in figures(old)
    assert TRAINING_FIGURE not in render(old)
    write(old, out)
    assert not (out / TRAINING_FIGURE).exists()


def test_lists_of_numbers_take_one_line_of_the_json(few: Comparison, tmp_path: Path) -> None:
    write(few, tmp_path / "out")
    text = (tmp_path / "out" / "comparison.json").read_text()
    assert Comparison.model_validate_json(text) == few
    assert '"points": [1.5, 3.5, ' in text
    assert not re.search(r"^\s*[-\d.]+,?$", text, re.MULTILINE)  # no number on a line of its own
