"""Write a packed checkpoint and prove that it loads: the end of quantize and of train-qat.

The checkpoint is written into a scratch folder, reloaded from there with plain transformers, and
its logits on a text and (for a VLM) an image prompt are compared with those of the intended dense
weights. Only then are its files moved to where they belong, config.json last.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qatbench import __version__, store
from qatbench.quant.result import Quantized
from qatbench.stages import card
from qatbench.stages.proof import prove
from qatbench.vlm.load import Loaded, ModelFolder

SHARD_BYTES = 4 << 30
_KEEP = ("*.json", "*.jinja", "*.model", "*.txt")
_DROP = ("config.json", "model.safetensors.index.json", "provenance.json", "quantize_config.json")


def write_packed(
    source: ModelFolder,
    loaded: Loaded,
    quantized: Quantized,
    out: Path,
    told: Mapping[str, Any] | None = None,
    *,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write the checkpoint of `quantized` into `out` and prove it; returns its figures.

    Args:
        source: the 16-bit model folder; its tokenizer, processor and config are kept.
        loaded: that model in memory, dense (on the CPU afterwards, with the intended weights).
        quantized: what the quantizer or the trainer made.
        out: the stage's folder.
        told: the stage's own figures, for the model card.
        device: where integers are packed, a linear at a time.

    Raises: NumericsError when the reloaded logits are off; ArtifactError when weights are missing.
    """
    dtype = _storage_dtype(source)
    with _scratch(out) as scratch:
        bits = _save_packed(loaded, quantized, dtype, device, scratch)
        _copy_companions(source, scratch)
        store.write_json(scratch / "config.json", _config(source, quantized, dtype))
        for name, linear in quantized.linears.items():
            install(loaded.model, {f"{name}.weight": linear.to(device).dense()})
        # auto-round changes transformers in this process as soon as it is imported.
        proof = prove(scratch, loaded, fresh=quantized.method == "autoround")
        figures = {"bits_per_weight": bits, "reload": proof}
        card.write(scratch, source, dict(told or {}) | figures)
        _publish(scratch, out)
    return figures


def write_dense(
    source: ModelFolder, loaded: Loaded, out: Path, told: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write a 16-bit (bf16) checkpoint of the model in memory, and prove that it loads."""
    state = loaded.model.state_dict()
    tensors = {key: _stored(state[key], torch.bfloat16) for key in _saved_keys(loaded)}
    install(loaded.model, tensors)
    with _scratch(out) as scratch:
        _save({loaded.arch.file_key(key): value for key, value in tensors.items()}, scratch)
        _copy_companions(source, scratch)
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        store.write_json(scratch / "config.json", _with_dtype(config, torch.bfloat16))
        figures = {"bits_per_weight": 16.0, "reload": prove(scratch, loaded)}
        card.write(scratch, source, dict(told or {}) | figures)
        _publish(scratch, out)
    return figures


def install(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put dense weights into the model's parameters and buffers, in place.

    Raises: KeyError for a name that the model does not have.
    """
    state = model.state_dict()  # shares memory with the model
    with torch.no_grad():
        for name, value in weights.items():
            state[name].copy_(value)


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """An empty folder in `out`; it is gone afterwards, and what failed the proof with it."""
    scratch = out / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _saved_keys(loaded: Loaded) -> list[str]:
    """State keys to write: all but those tied to another one (an lm_head on the embeddings)."""
    tied = set(getattr(loaded.model, "all_tied_weights_keys", {}) or {})
    return [key for key in loaded.model.state_dict() if key not in tied]


def _save_packed(
    loaded: Loaded, quantized: Quantized, dtype: torch.dtype, device: str, folder: Path
) -> float:
    """Write everything the checkpoint holds; stored bits a quantized weight, zeros and scales in.

    What is not quantized is rounded to `dtype` in the model too: the proof is about packing.
    """
    state = loaded.model.state_dict()
    replaced = {f"{name}.weight" for name in quantized.linears}
    tensors = {
        key: _stored(quantized.changed.get(key, state[key]), dtype)
        for key in _saved_keys(loaded)
        if key not in replaced
    }
    install(loaded.model, tensors)
    bits = weights = 0
    for name, linear in quantized.linears.items():
        packed = linear.to(device).packed(quantized.layout, name)
        bits += sum(t.numel() * t.element_size() * 8 for k, t in packed.items() if k != "g_idx")
        weights += linear.fields.numel()
        tensors |= {f"{name}.{part}": value.cpu() for part, value in packed.items()}
    _save({loaded.arch.file_key(key): value for key, value in tensors.items()}, folder)
    return round(bits / weights, 4)


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that is not quantized as it is written: on the CPU, floats in `dtype`."""
    value = value.detach().cpu()
    return value.to(dtype) if value.is_floating_point() else value


def _storage_dtype(source: ModelFolder) -> torch.dtype:
    """The source's own 16-bit type, so that what is not quantized stays bit for bit; else bf16."""
    name = source.config.get("dtype") or source.config.get("torch_dtype")
    return torch.float16 if name == "float16" else torch.bfloat16


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config with one dtype throughout, nested configs and the old key included."""
    name = str(dtype).removeprefix("torch.")
    changed = {
        key: _with_dtype(value, dtype) if key in ("text_config", "vision_config") else value
        for key, value in config.items()
        if key != "torch_dtype"
    }
    return changed | {"dtype": name}


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    """Safetensors shards of at most 4 GiB, with an index when there is more than one."""
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for key, value in tensors.items():
        size = value.numel() * value.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][key] = value.contiguous().clone()
        room -= size
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
    total = sum(v.numel() * v.element_size() for v in tensors.values())
    store.write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": index},
    )


def _copy_companions(source: ModelFolder, folder: Path) -> None:
    for pattern in _KEEP:
        for file in source.path.glob(pattern):
            if file.name not in _DROP:
                shutil.copyfile(file, folder / file.name)


def _config(source: ModelFolder, quantized: Quantized, dtype: torch.dtype) -> dict[str, Any]:
    grid = next(iter(quantized.linears.values())).grid
    settings: dict[str, Any] = {"bits": grid.bits, "group_size": grid.group_size}
    if quantized.layout == "awq":
        settings |= {
            "quant_method": "awq",
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": source.arch.never_quantized,
        }
    else:
        settings |= {
            "quant_method": "gptq",
            "desc_act": False,
            "sym": quantized.layout == "gptq",
            "checkpoint_format": quantized.layout,
            "lm_head": False,
            "block_name_to_quantize": source.arch.layers,
            "meta": {"quantizer": [f"qatbench:{__version__}"], "algorithm": quantized.method},
        }
    return _with_dtype(source.config, dtype) | {"quantization_config": settings}


def _publish(scratch: Path, out: Path) -> None:
    for file in sorted(scratch.iterdir(), key=lambda f: f.name == "config.json"):
        file.replace(out / file.name)
