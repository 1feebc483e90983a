"""Models without weights, or without those that stay packed: the rest is loaded around them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn

from qatbench.vlm.load import (
    Loaded,
    ModelFolder,
    check_loading_info,
    dense_config,
    load_state,
    load_tokenizer,
    quiet_libraries,
)


def hollow_model(folder: ModelFolder) -> Any:
    """A model of which only the config is read: on `meta`."""
    quiet_libraries()
    with torch.device("meta"):
        return getattr(transformers, folder.arch.model_class)(dense_config(folder))


def load_hollow(folder: ModelFolder) -> Loaded:
    """All but the weights, for prompts that an engine of its own runs: the model is on `meta`."""
    model = hollow_model(folder)
    tokenizer, processor = load_tokenizer(folder)
    return Loaded(folder, model, tokenizer, processor, "none")


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
