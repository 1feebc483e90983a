"""Packed checkpoints whose packed linears stay packed: the rest of a model, loaded around them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from qatbench.vlm.load import (
    Loaded,
    ModelFolder,
    check_loading_info,
    load_state,
    load_tokenizer,
    quiet_libraries,
)


def load_around(
    folder: ModelFolder,
    state: dict[str, torch.Tensor],
    hollow: Iterable[str],
    device: str,
    dtype: torch.dtype,
) -> Loaded:
    """Load a packed checkpoint but for its packed linears, whose weights are left empty.

    `state` stands for its files (`packed.affine_state`), `hollow` names those linears.

    Raises: ArtifactError when a weight is missing or left over.
    """
    quiet_libraries()
    model, info = load_state(folder, state, dtype)
    check_loading_info(folder.path, info)
    for name in hollow:
        model.get_submodule(name).weight = nn.Parameter(torch.empty(0, dtype=dtype))
    tokenizer, processor = load_tokenizer(folder)
    return Loaded(folder, model.to(device).eval(), tokenizer, processor, "packed")
