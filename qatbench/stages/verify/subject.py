"""What is verified: the files' keys against the names of the model that the config describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qatbench.errors import ArtifactError, UsageError
from qatbench.stages.verify import reader
from qatbench.stages.verify.reader import Checkpoint
from qatbench.vlm.layout import ARCHITECTURES, Architecture, architecture, under
from qatbench.vlm.skeleton import Skeleton, skeleton

METHODS = ("gptq", "awq", "compressed-tensors")
PARTS = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape",
         "weight_zero_point", "weight_g_idx")  # fmt: skip
HEAD = "lm_head"
# Buffers that older files store and that neither loader asks for.
HARMLESS = ("rotary_emb.inv_freq", "position_ids")
WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "base_model.")


@dataclass(frozen=True, eq=False)  # hashed by identity: what is read of it is cached
class Subject:
    """A checkpoint and the model it should be; linears go by their names in memory."""

    checkpoint: Checkpoint
    arch: Architecture
    skeleton: Skeleton
    settings: Mapping[str, Any]
    """The quantization_config; empty when there is none."""
    dense: Mapping[str, str]
    """Parameter in memory -> its key."""
    packed: Mapping[str, Mapping[str, str]]
    """Linear -> part -> its key."""
    unknown: tuple[str, ...]
    """Keys that no loader finds a place for, and that stand for nothing."""
    misspelt: Mapping[str, str]
    """Keys that no loader knows -> the name they must stand for; counted as if it did."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.checkpoint.config

    @property
    def method(self) -> str | None:
        """gptq, awq or compressed-tensors; None for a config that says 16 bits."""
        return self.settings.get("quant_method")

    @cached_property
    def grid(self) -> tuple[object, object]:
        """(bits, group size) as the config has them, unchecked; -1: a whole row, None: not said."""
        if self.method != "compressed-tensors":
            return self.settings.get("bits"), self.settings.get("group_size")
        weights = ct_weights(self.settings)
        whole = weights.get("strategy") == "channel"
        return weights.get("num_bits"), -1 if whole else weights.get("group_size")

    @property
    def language(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linears inside the decoder layers."""
        inside = f"{self.arch.layers}."
        return {n: size for n, size in self.skeleton.linears.items() if n.startswith(inside)}

    @property
    def sixteen(self) -> set[str]:
        """Linears that are stored as they are."""
        return {n for n in self.skeleton.linears if f"{n}.weight" in self.dense}

    def seen(self, name: str) -> str:
        """The part of the model a name is in: vision, projector, head or language."""
        if under(name, self.arch.projector):
            return "projector"
        if under(name, self.arch.vision):
            return "vision"
        return "head" if under(name, (HEAD,)) else "language"

    def missing(self) -> list[str]:
        """Parameters that no key stands for and that are not tied to another one."""
        return [
            name
            for name in self.skeleton.shapes
            if name not in self.dense
            and name not in self.skeleton.tied
            and name.removesuffix(".weight") not in self.packed
        ]

    def parts(self, part: str) -> dict[str, str]:
        """Key of linear -> key of one part, where it is."""
        return {name: keys[part] for name, keys in self.packed.items() if part in keys}


def subject(path: Path) -> Subject:
    """Read a folder and match its keys.

    Raises: as `reader.read`; UsageError for a family or a format that is not covered;
        ArtifactError when the config describes no model.
    """
    checkpoint = reader.read(path)
    arch = architecture(checkpoint.config)
    built = skeleton(checkpoint.config)
    settings = _settings(checkpoint, arch)
    places: dict[str, str] = {}  # name in memory -> key
    unknown: list[str] = []
    for key in checkpoint.entries:
        name = in_memory(key, arch, built)
        if name is not None:
            places[name] = key
        elif not key.endswith(HARMLESS):
            unknown.append(key)
    misspelt = _misspelt(unknown, places, arch, built)
    places |= {name: key for key, name in misspelt.items()}
    dense = {name: key for name, key in places.items() if name in built.shapes}
    packed: dict[str, dict[str, str]] = {}
    for name in places.keys() - dense.keys():
        linear, _, part = name.rpartition(".")
        packed.setdefault(linear, {})[part] = places[name]
    twice = [f"{name}.weight" for name in packed if f"{name}.weight" in dense]
    unknown += [dense.pop(name) for name in twice]  # the packed ones are read
    spare = tuple(key for key in unknown if key not in misspelt)
    return Subject(
        checkpoint, arch, built, settings, dense, dict(sorted(packed.items())), spare, misspelt
    )


def _misspelt(
    unknown: list[str], places: Mapping[str, str], arch: Architecture, built: Skeleton
) -> dict[str, str]:
    """Keys that no loader knows and that stand for a name nobody else has -> that name."""
    named = {key: meant(key, arch, built) for key in unknown}
    return {key: name for key, name in named.items() if name is not None and name not in places}


def in_memory(key: str, arch: Architecture, built: Skeleton) -> str | None:
    """The name that transformers reads a key as, packed parts included; None for none."""
    stem, _, part = key.rpartition(".")
    if part not in PARTS:
        return next((name for name in arch.spellings(key) if name in built.shapes), None)
    linears = (name for name in arch.spellings(stem) if name in built.linears)
    return next((f"{name}.{part}" for name in linears), None)


def meant(key: str, arch: Architecture, built: Skeleton) -> str | None:
    """The name that a key no loader knows must stand for: wrapped, or of another tool or family."""
    bare = key
    for wrapper in WRAPPERS:
        bare = bare.removeprefix(wrapper)
    others = [a + bare.removeprefix(b) for a, b in arch.vllm if bare.startswith(b)]
    rows = [arch, *(row for row in ARCHITECTURES.values() if row is not arch)]
    found = (in_memory(name, row, built) for row in rows for name in (bare, *others))
    return next((name for name in found if name is not None), None)


def ct_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The weight settings of compressed-tensors' only group.

    Raises: UsageError when there are several groups, or none.
    """
    groups = settings.get("config_groups")
    held = list(groups.values()) if isinstance(groups, dict) else []
    weights = [group.get("weights") for group in held if isinstance(group, dict)]
    if len(weights) != 1 or len(held) != 1 or not isinstance(weights[0], dict):
        raise UsageError("compressed-tensors is covered with one group of weights only")
    return weights[0]


def where_settings_are(config: Mapping[str, Any], arch: Architecture) -> Mapping[str, Any]:
    """The config that holds quantization_config: both loaders look into the text's as well."""
    nested = config.get(arch.text_config) if arch.text_config else None
    if "quantization_config" in config or not isinstance(nested, dict):
        return config
    return nested if "quantization_config" in nested else config


def _settings(checkpoint: Checkpoint, arch: Architecture) -> dict[str, Any]:
    settings = where_settings_are(checkpoint.config, arch).get("quantization_config")
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ArtifactError("quantization_config is no object", hint=reader.AGAIN)
    method = settings.get("quant_method")
    if method not in METHODS:
        raise UsageError(
            f"quant_method {method!r} is not covered", hint=f"covered: {', '.join(METHODS)}"
        )
    if method == "compressed-tensors":
        if settings.get("format") != "pack-quantized":
            raise UsageError(
                f"compressed-tensors format {settings.get('format')!r} is not covered",
                hint="covered: pack-quantized",
            )
        ct_weights(settings)
    return settings
