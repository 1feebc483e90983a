"""Find and load models: hub id, folder or built-in name -> model, tokenizer, processor.

Safetensors only, never remote code. A packed checkpoint loads in two ways: `library` is plain
transformers with gptqmodel's kernels; `dense` reads the packed tensors with this project's own
unpacking and multiplies densely, so it depends on no quantization library.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from qatbench import store
from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.quant.backends import forget_failed_imports, prepare_import, quiet
from qatbench.vlm import builtin
from qatbench.vlm.layout import Architecture, architecture
from qatbench.vlm.packed import dequantized_state

KERNELS = ("library", "dense")


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk: its folder, config and what is known of how it was made."""

    name: str
    path: Path
    config: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def arch(self) -> Architecture:
        """Architecture facts."""
        return architecture(self.config)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The checkpoint's quantization_config, None for a 16-bit model."""
        return self.config.get("quantization_config")

    @property
    def figures(self) -> dict[str, Any]:
        """What the stage that made the folder measured."""
        return dict(self.provenance.get("figures", {}))

    def fingerprint(self) -> str:
        """Of how it was made where that is known, else of every weight and config byte."""
        return str(self.provenance.get("fingerprint") or self._digest)

    @cached_property
    def _digest(self) -> str:
        files = sorted([*self.path.glob("*.safetensors"), *self.path.glob("*.json")])
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            digests = list(pool.map(store.file_digest, files))
        names = [file.name for file in files]
        return store.fingerprint(dict(zip(names, digests, strict=True)))

    def weight_bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))


@dataclass
class Loaded:
    """A model ready to run, with what turns text and images into its inputs."""

    folder: ModelFolder
    model: Any
    tokenizer: Any
    processor: Any | None
    kernel: str

    @property
    def arch(self) -> Architecture:
        """Architecture facts."""
        return self.folder.arch

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        device: torch.device = next(self.model.parameters()).device
        return device


def find(name: str) -> ModelFolder:
    """Resolve a built-in name, a folder or a hub id.

    Raises: PrerequisiteError when it is not there or lacks its tokenizer or processor;
        ArtifactError when config.json is damaged; UsageError for pickled weights.
    """
    if name == builtin.SMOLLM2:
        path = builtin.smollm2_folder()
    elif name in builtin.MINI:
        if Path(name).exists():
            raise UsageError(
                f"{name} is a built-in model and a folder here", hint=f"for the folder: ./{name}"
            )
        path = builtin.mini_folder(name)
    elif Path(name).exists():
        path = Path(name)
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        path = _from_hub(name)
    else:
        raise PrerequisiteError(
            f"no model at {name}",
            hint=f"a folder, a hub id such as owner/name, or one of {', '.join(builtin.NAMES)}",
        )
    return _inspect(name, path)


def _inspect(name: str, path: Path) -> ModelFolder:
    if (path / store.UNFINISHED).exists() and not (path / store.PROVENANCE).exists():
        raise PrerequisiteError(
            f"the checkpoint {path} is unfinished", hint="finish it with --resume first"
        )
    if not (path / "config.json").exists():
        raise PrerequisiteError(f"no config.json in {path}", hint="is this a model folder?")
    config = store.read_json(path / "config.json")
    arch = architecture(config)
    if not any(path.glob("*.safetensors")):
        raise PrerequisiteError(
            f"no safetensors weights in {path}",
            hint="pickled weights are never loaded: convert the model to safetensors",
        )
    if not any((path / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise PrerequisiteError(f"no tokenizer in {path}", hint="copy the model's tokenizer there")
    parts = ("processor_config.json", "preprocessor_config.json")
    if arch.is_vlm and not any((path / f).exists() for f in parts):
        raise PrerequisiteError(f"no processor in {path}", hint="copy preprocessor_config.json")
    record = path / store.PROVENANCE
    return ModelFolder(name, path, config, store.read_json(record) if record.exists() else {})


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise PrerequisiteError(
            f"cannot get {name} from the hub: {type(error).__name__}",
            hint="check the name and the network, or give a local folder",
        ) from error


def load(
    folder: ModelFolder, *, device: str, dtype: torch.dtype, kernel: str = "library"
) -> Loaded:
    """Load weights, tokenizer and processor; eval mode.

    Args:
        folder: from `find`.
        device: torch device name.
        dtype: of activations and unquantized weights.
        kernel: `library` or `dense` (see the module's first lines); same for 16-bit models.

    Raises: ArtifactError when weights are missing, damaged or left over; PrerequisiteError when the
        library wants to download the source of a kernel and cannot.
    """
    quiet_libraries()
    kernel = kernel if folder.quantization else "dense"
    try:
        if kernel == "dense" and folder.quantization:
            model, info = _load_dense(folder, dtype)
        else:
            model, info = _load_plain(folder, dtype, device)
    except URLError as error:
        raise PrerequisiteError(
            f"the library's kernel for {folder.path} is not here and cannot be downloaded:"
            f" {error.reason}",
            hint="--kernel dense, or load it once with a network",
        ) from error
    except (SafetensorError, json.JSONDecodeError, KeyError, RuntimeError, OSError) as error:
        raise ArtifactError(
            f"cannot load {folder.path}: {error}", hint="the checkpoint is damaged: make it anew"
        ) from error
    check_loading_info(folder.path, info)
    tokenizer, processor = load_tokenizer(folder)
    return Loaded(folder, model.to(device).eval(), tokenizer, processor, kernel)


def dense_config(folder: ModelFolder) -> Any:
    """The folder's config without its quantization."""
    config = transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_tokenizer(folder: ModelFolder) -> tuple[Any, Any | None]:
    """(tokenizer, processor); the processor is None for a text model."""
    if folder.arch.is_vlm:
        processor = transformers.AutoProcessor.from_pretrained(folder.path, trust_remote_code=False)
        return processor.tokenizer, processor
    return transformers.AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False), None


def _load_plain(folder: ModelFolder, dtype: torch.dtype, device: str) -> tuple[Any, dict[str, Any]]:
    prepare_import()
    auto = getattr(transformers, folder.arch.auto_class)
    extra: dict[str, Any] = {"device_map": device} if folder.quantization else {}
    with quiet() if folder.quantization else contextlib.nullcontext():
        model, info = auto.from_pretrained(
            folder.path,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **extra,
        )
    forget_failed_imports()
    return model, info


def check_loading_info(path: Path, info: dict[str, Any]) -> None:
    """Fail on any weight that was missing, left over or of the wrong shape.

    Raises: ArtifactError naming the first few.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            names = sorted(map(str, info[kind]))
            raise ArtifactError(
                f"{path}: {len(names)} {kind.replace('_', ' ')}, e.g. {', '.join(names[:3])}",
                hint="the checkpoint does not fit its config.json: make it anew",
            )


def _load_dense(folder: ModelFolder, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    return load_state(folder, dequantized_state(folder.path, folder.quantization or {}), dtype)


def load_state(
    folder: ModelFolder, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """A dense model of the folder's config from these tensors, with transformers' loading info."""
    config = dense_config(folder)
    model, info = getattr(transformers, folder.arch.model_class).from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    return model, info


def kernel_name(loaded: Loaded) -> str:
    """Class of the linear that multiplies, for the record: e.g. TorchAtenLinear, or Linear."""
    module: nn.Module = loaded.model.get_submodule(f"{loaded.arch.layers}.0.mlp.down_proj")
    return type(module).__name__


def quiet_libraries() -> None:
    """Keep the libraries' banners, bars and advice off the terminal; errors still show."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|optimum|gptqmodel)\b.*")
    for name in ("optimum", "gptqmodel", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def pick_device(name: str | None) -> str:
    """The device asked for, or CUDA where there is one, else the CPU.

    Raises: PrerequisiteError when CUDA is asked for and not there.
    """
    if name and name.startswith("cuda") and not torch.cuda.is_available():
        raise PrerequisiteError("no CUDA device here", hint="--device cpu")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str | None, device: str) -> torch.dtype:
    """Find a torch dtype by name; default bfloat16 on CUDA and float32 on the CPU.

    Raises: UsageError for a name that is no floating dtype.
    """
    if name is None:
        return torch.float32 if device == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UsageError(f"unknown dtype {name!r}", hint=", ".join(known))
    return known[name]


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    facts: dict[str, Any] = {"device": device, "cpu_threads": torch.get_num_threads()}
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name()
    return facts
