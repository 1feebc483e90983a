"""The model that a config.json describes, without weights: what a weight file has to hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from qatbench.errors import ArtifactError
from qatbench.vlm.layout import architecture

# What a config says of types, kernels, quantization or code of its own is no part of the names.
_LEFT_OUT = ("dtype", "torch_dtype", "quantization_config", "auto_map", "attn_implementation",
             "_attn_implementation")  # fmt: skip


@dataclass(frozen=True)
class Skeleton:
    """Names are those in memory.

    Shapes: of every parameter and stored buffer; linears as (out, in).
    """

    shapes: Mapping[str, tuple[int, ...]]
    linears: Mapping[str, tuple[int, int]]
    tied: Mapping[str, str]
    """A parameter that is another one -> that one."""
    image_token: int | None
    """Id of the visual token after the class's defaults are filled in."""


def skeleton(config: Mapping[str, Any]) -> Skeleton:
    """Build the model of a config on the meta device: no memory, no code but transformers' own.

    Raises: UsageError for an architecture that is not in the table; ArtifactError when the config
        describes no model.
    """
    arch = architecture(config)
    plain = _without(config)
    try:
        known = transformers.CONFIG_MAPPING[arch.model_type].from_dict(plain)
        with torch.device("meta"):
            model = getattr(transformers, arch.model_class)(known)
    except Exception as error:
        told = " ".join(str(error).split())
        raise ArtifactError(
            f"config.json describes no {arch.model_type} model: {type(error).__name__}: {told}",
            hint="take the config.json of the model that was quantized",
        ) from error
    named = (getattr(known, key, None) for key in arch.image_token_keys)
    return Skeleton(
        {name: tuple(value.shape) for name, value in model.state_dict().items()},
        {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        },
        dict(getattr(model, "all_tied_weights_keys", {}) or {}),
        next((int(token) for token in named if token is not None), None),
    )


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _LEFT_OUT
    }
