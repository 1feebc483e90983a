"""Names of points: none over another, over a point or out of the frame, however crowded."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest
from test_markdown import GPTQ, comparison

from qatbench.report import pareto
from qatbench.report.placing import BESIDE, LED, Box, Name, Placed, place

FRAME = Box(0, 0, 300, 150)


def crowd(count: int, seed: int, within: tuple[float, float]) -> list[Name]:
    draw = random.Random(seed)
    return [
        Name((150 + draw.uniform(-1, 1) * within[0], 75 + draw.uniform(-1, 1) * within[1]),
             draw.uniform(12, 45), 8.0)
        for _ in range(count)
    ]  # fmt: skip


def all_there(names: list[Name]) -> list[Placed]:
    placed = place(names, FRAME, [name.spot for name in names])
    found = [one for one in placed if one is not None]
    assert len(found) == len(names)
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("count", "within"), [(12, (8, 8)), (25, (60, 30)), (8, (0, 0))])
def test_nothing_lies_over_anything(count: int, within: tuple[float, float], seed: int) -> None:
    names = crowd(count, seed, within)
    found = all_there(names)
    for one, other in combinations(found, 2):
        assert not one.box.meets(other.box)
    for name, mine in zip(names, found, strict=True):
        assert FRAME.holds(mine.box)
        assert mine.box.x1 - mine.box.x0 == pytest.approx(name.width)
        assert not any(mine.box.x0 < x < mine.box.x1 and mine.box.y0 < y < mine.box.y1
                       for x, y in (other.spot for other in names))  # fmt: skip
        if mine.leader:
            assert mine.leader[0] == name.spot
            assert mine.box.padded(1e-9).holds(Box(*mine.leader[1], *mine.leader[1]))
    assert any(mine.leader for mine in found)  # it was crowded


def test_leaders_go_round_names() -> None:
    found = all_there(crowd(20, 1, (60, 30)))
    led = [(one.leader, other) for one in found for other in found if one.leader]
    assert len(led) > 20
    assert not any(other.box.cut_by(*leader) for leader, other in led)


def test_a_name_alone_is_beside_its_point_without_a_line() -> None:
    (placed,) = all_there([Name((150, 75), 30, 8)])
    assert placed.leader is None
    assert placed.box.padded(BESIDE + 0.01).holds(Box(150, 75, 150, 75))


def test_a_name_keeps_off_lines_where_it_can() -> None:
    level = Box(150, 75, 300, 75)
    name = Name((150, 75), 30, 8)
    (placed,) = place([name], FRAME, [name.spot], [level])
    assert placed is not None
    assert not placed.box.meets(level.padded(0.01))
    everywhere = [Box(0, y, 300, y) for y in range(0, 150, 3)]
    (placed,) = place([name], FRAME, [name.spot], everywhere)
    assert placed is not None
    assert placed.leader is None  # it must lie on some


def test_at_an_edge_it_stays_inside() -> None:
    for spot in ((0.0, 0.0), (300.0, 150.0), (0.0, 150.0), (299.0, 2.0)):
        (placed,) = all_there([Name(spot, 60, 8)])
        assert FRAME.holds(placed.box)


def test_a_moved_name_is_led_to() -> None:
    """A wall of points about it leaves no room beside it."""
    wall = [(150.0 + dx, 75.0 + dy) for dx in range(-12, 13, 4) for dy in range(-12, 13, 4)]
    (placed,) = place([Name((150, 75), 30, 8)], FRAME, wall)
    assert placed is not None
    assert placed.leader is not None
    (x0, y0), (x1, y1) = placed.leader
    assert (x0, y0) == (150, 75)
    assert (x1 - x0) ** 2 + (y1 - y0) ** 2 > LED**2


def test_where_there_is_no_room_it_says_so() -> None:
    names = [Name((10, 10), 18, 8) for _ in range(9)]
    placed = place(names, Box(0, 0, 40, 30), [(10, 10)])
    found = [one.box for one in placed if one is not None]
    assert 0 < len(found) < len(names)
    assert not any(one.meets(other) for one, other in combinations(found, 2))
    assert place([Name((10, 10), 41, 8)], Box(0, 0, 40, 30), [(10, 10)]) == [None]


@pytest.mark.parametrize("arms", [14, 80])
def test_no_names_of_a_figure_meet(arms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made on two devices, so that all arms are named; on 5 x 2 inches there is room for some."""
    draw = random.Random(0)
    crowded = [
        GPTQ.model_copy(
            update={"name": f"gptq-variant-{k}", "accuracy": 0.7 + draw.uniform(0, 0.02),
                    "making_seconds": 100 + draw.uniform(0, 20), "checkpoint_bytes": None,
                    "device": "cuda", "gpu": f"GPU {k % 2}"}
        )
        for k in range(arms)
    ]  # fmt: skip
    task = comparison(None, *crowded).tasks[0]
    kept: list[Any] = []
    text_of = pareto.text_of
    monkeypatch.setattr(pareto, "text_of", lambda figure: kept.append(figure) or text_of(figure))
    svg = pareto.draw(task)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    (axes,) = kept[0].axes
    renderer = FigureCanvasAgg(kept[0]).get_renderer()  # type: ignore[no-untyped-call]
    extents = [Box(*text.get_window_extent(renderer).extents) for text in axes.texts]
    assert not any(one.meets(other) for one, other in combinations(extents, 2))
    points = axes.transData.transform([(a.cost_seconds, 100 * a.accuracy) for a in crowded])
    assert not any(box.meets(Box(x, y, x, y).padded(2)) for box in extents for x, y in points)
    if arms == 14:
        assert len(extents) == arms
        assert any(len(line.get_xdata()) == 2 for line in axes.lines)  # led to
    else:
        assert f"no room to name {arms - len(extents)} more</text>" in svg
        assert len(extents) >= 15
