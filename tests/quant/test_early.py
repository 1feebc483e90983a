"""GPTQ's codes are made when a linear is solved, and its weight is left behind."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from qatbench.errors import NumericsError, PrerequisiteError
from qatbench.quant import backends
from qatbench.quant.early import Solved, codes
from qatbench.quant.grid import Grid
from qatbench.vlm import layout
from qatbench.vlm.load import ModelFolder, find

GRID = Grid(4, tiny.GROUP)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    path = tmp_path_factory.mktemp("early") / "text"
    return find(str(tiny.save_text_model(path)))


def batches() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = [torch.randint(5, 40, (1, 24)) for _ in range(4)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


def solve(folder: ModelFolder, names: list[str]) -> Any:
    return backends.solve(
        "gptq", folder.path, names, GRID, batches(), device=DEVICE,
        progress=lambda done, total: None,
    )  # fmt: skip


def test_codes_and_scales_are_those_that_the_library_would_pack(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside each hand-over, the library's own weight, scales and zero points at packing."""
    names = list(layout.linear_shapes(folder.config))
    at_packing: dict[str, tuple[torch.Tensor, ...]] = {}
    pop, leaving = Solved.pop, Solved.leaving

    def watch(self: Solved, post_quantize: Any) -> Any:
        leave = leaving(self, post_quantize)

        def seen(layer: nn.Module) -> nn.Module:
            for name, linear in self._linears.items():
                if linear.module in set(layer.modules()):
                    linear.stream_sync()
                    state = linear.state
                    weight = linear.module.weight.detach().clone()
                    at_packing[name] = (weight, state["q_scales"].clone(), state["q_zeros"].clone())
            return leave(layer)

        return seen

    left: dict[str, tuple[int, ...]] = {}

    def look(self: Solved, name: str) -> Any:
        weight = self._linears[name].module.weight
        assert weight.shape == at_packing[name][0].shape
        left[name] = weight.stride()
        return pop(self, name)

    monkeypatch.setattr(Solved, "leaving", watch)
    monkeypatch.setattr(Solved, "pop", look)
    found = solve(folder, names)
    assert sorted(at_packing) == sorted(names)
    for name, linear in found.linears.items():
        expected = codes(*at_packing[name], GRID, name).to("cpu")
        assert not linear.fields.is_pinned()
        for part in ("fields", "zeros", "scales"):
            torch.testing.assert_close(
                getattr(linear, part), getattr(expected, part), rtol=0, atol=0
            )
        assert len(linear.fields.unique()) > 8
        assert left[name] == (0, 0), f"{name}'s weight travelled with its layer"


def test_the_library_is_left_as_it_was(folder: ModelFolder) -> None:
    processor = importlib.import_module("gptqmodel.looper.gptq_processor")
    logger = importlib.import_module("gptqmodel.utils.logger")
    places = [(processor.GPTQ, "quantize"), (processor, "pack_module"),
              (logger, "_suppress_live_renderables")]  # fmt: skip
    before = [getattr(owner, name) for owner, name in places]
    solve(folder, list(layout.linear_shapes(folder.config)))
    assert [getattr(owner, name) for owner, name in places] == before


def test_another_build_of_the_library_is_refused(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = importlib.import_module("gptqmodel.looper.gptq_processor")
    monkeypatch.delattr(processor.GPTQ, "quantize")
    with pytest.raises(PrerequisiteError, match=r"no gptqmodel\.looper.*\.GPTQ\.quantize"):
        solve(folder, ["a.0.b"])


def test_a_linear_that_was_never_solved_is_not_handed_over() -> None:
    with pytest.raises(NumericsError, match="x: packed, but never solved"):
        Solved(GRID).pop("x")


def test_scales_of_another_shape_are_refused() -> None:
    weight, scales = torch.zeros(4, 2 * tiny.GROUP), torch.ones(2, 4)
    with pytest.raises(NumericsError, match=r"x: scales \(2, 4\) instead of \(4, 2\)"):
        codes(weight, scales, scales, GRID, "x")


def test_no_bars_are_drawn(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under pytest the library draws none by itself."""
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    drawn: list[Any] = []
    bar = importlib.import_module("logbar.progress").ProgressBar
    monkeypatch.setattr(bar, "draw", lambda self, *args, **kwargs: drawn.append(self))
    solve(folder, list(layout.linear_shapes(folder.config)))
    assert not drawn
