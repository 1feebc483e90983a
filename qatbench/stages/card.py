"""The model card: README.md of a checkpoint, with the hub's metadata and, once measured, scores.

The exporter writes it from what it knows; `rewrite` writes it again from provenance.json, with the
scores of runs that answered with this very checkpoint. No paths, no question: names, counts, ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from qatbench import store
from qatbench.errors import UsageError
from qatbench.stages.card_scores import result, scores_of
from qatbench.vlm import builtin
from qatbench.vlm.load import ModelFolder

README = "README.md"
MARK = "<!-- written by qatbench -->"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
# The built-in models: where they are published, and under what license their weights are.
_PUBLISHED = {builtin.SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}
_LICENSES = dict.fromkeys(builtin.NAMES, "apache-2.0")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSE_KEYS = ("license", "license_name", "license_link")
# Not settings: fingerprints, and what has its own place on the card.
_ELSEWHERE = ("method", "bits", "group_size", "model", "student", "teacher", "init", "data",
              "calibration", "samples", "seed")  # fmt: skip
_METHODS = {
    "rtn": "Round to nearest on a symmetric grid, scales searched for least squared error.",
    "gptq": "GPTQ (arXiv:2210.17323) through gptqmodel, symmetric.",
    "awq": "AWQ (arXiv:2306.00978) through gptqmodel, with zero points.",
    "autoround": "AutoRound (arXiv:2309.05516).",
    "sft": "Fine-tuned with cross-entropy in 16 bit; nothing is quantized.",
    "kd": "Fine-tuned with plain distillation in 16 bit; nothing is quantized.",
    "qat": "Trained on the integer grid (group-wise LSQ, arXiv:1902.08153) with cross-entropy.",
    "grace": "Trained on the integer grid with GRACE's distillation (arXiv:2601.22709).",
}


def origin(
    source: ModelFolder,
    data: Sequence[Mapping[str, Any]] | None,
    seed: int | None = None,
    teacher: ModelFolder | None = None,
) -> dict[str, Any]:
    """What the card says of the base and the data, for provenance.json.

    Args:
        source: the model that was quantized or trained.
        data: `name`, `n` and `place` (of `selector.place`) of each source of samples; None where
            it is not known.
        seed: of what was drawn, None where nothing was.
        teacher: of a distillation.
    """
    head = front_matter(source.path)
    published = source.name if _published(source) else _PUBLISHED.get(source.name)
    if _made_here(source):
        published = head.get("base_model")
    license_ = {key: head[key] for key in _LICENSE_KEYS if isinstance(head.get(key), str)}
    if source.name in _LICENSES:
        license_ = {"license": _LICENSES[source.name]}
    return {
        "base": _short(source),
        "base_model": published,
        "license": license_ if "license" in license_ else {},
        "data": None if data is None else [dict(row) for row in data],
        "seed": seed,
        **({"teacher": _short(teacher)} if teacher else {}),
    }


def _short(model: ModelFolder) -> str:
    """A model's name without the folders of this machine; a checkpoint's says what it is of."""
    if _made_here(model):
        told = model.figures.get("origin") or _older(model.provenance)
        return f"{told['base'] or 'model'}-{model.figures.get('method')}"
    known = model.name in builtin.NAMES or _published(model)
    return model.name if known else Path(model.name).name


def _made_here(model: ModelFolder) -> bool:
    """Whether a model is a checkpoint that qatbench made."""
    return model.provenance.get("stage") in ("quantize", "train")


def _published(model: ModelFolder) -> bool:
    """Whether a model was named by its hub id."""
    return bool(_HUB_ID.fullmatch(model.name)) and not (
        Path(model.name).exists() or model.name in builtin.NAMES
    )


def front_matter(folder: Path) -> dict[str, Any]:
    """Metadata of a folder's README.md; {} where there is none that can be read."""
    try:
        text = (folder / README).read_text(encoding="utf-8")
        head = re.match(r"\s*---\n(.*?)\n---\s", text, re.DOTALL)
        found = yaml.safe_load(head[1]) if head else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def write(folder: Path, source: ModelFolder, figures: Mapping[str, Any]) -> None:
    """Write README.md into a folder whose config.json is there already.

    The settings are those in `unfinished.json` of the folder above, where a stage works in it.
    """
    begun = folder.parent / store.UNFINISHED
    record = {
        "spec": store.read_json(begun).get("spec", {}) if begun.exists() else {},
        "figures": {"origin": origin(source, None)} | dict(figures),
        "versions": store.versions(),
    }
    made = ModelFolder("", folder, store.read_json(folder / "config.json"), record)
    store.write_text(folder / README, render(made))


def rewrite(checkpoint: ModelFolder, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Write the card of a finished checkpoint again, with the scores of `runs`; returns these.

    Raises: UsageError for a folder that is no checkpoint of ours, or whose README.md is not;
        ArtifactError for a run of another model, or one that is not finished.
    """
    if not _made_here(checkpoint):
        raise UsageError(
            f"{checkpoint.name} is no checkpoint that qatbench made",
            hint="give the --out folder of quantize or train-qat",
        )
    there = checkpoint.path / README
    if there.exists() and MARK not in there.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(
            f"{there} was written by someone else", hint="move it away to have it written anew"
        )
    scores = [row for run in runs for row in scores_of(run, checkpoint.fingerprint())]
    store.write_text(there, render(checkpoint, scores))
    return scores


# --- the page -----------------------------------------------------------------------------------


def render(checkpoint: ModelFolder, scores: Sequence[Mapping[str, Any]] = ()) -> str:
    """The whole README.md, metadata first."""
    figures, spec = checkpoint.figures, checkpoint.provenance.get("spec", {})
    grid = _grid(checkpoint.quantization)
    method = str(figures.get("method") or grid.get("algorithm") or "unknown")
    told = figures.get("origin") or _older(checkpoint.provenance)
    base = str(told["base"] or "model").rsplit("/", 1)[-1]
    name = "-".join([base, method, *grid.get("short", [])])
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        mark=MARK,
        name=name,
        method=method,
        about=_METHODS.get(method, ""),
        grid=grid,
        told=told,
        figures=figures,
        settings=_flat({key: spec[key] for key in spec if key not in _ELSEWHERE}),
        versions=checkpoint.provenance.get("versions", {}),
        auto="AutoProcessor" if checkpoint.arch.is_vlm else "AutoTokenizer",
        model_class=checkpoint.arch.auto_class,
        scores=scores,
    )
    head = yaml.safe_dump(
        _metadata(checkpoint, told, method, grid, name, scores), sort_keys=False, allow_unicode=True
    )
    return f"---\n{head}---\n{page}"


def _older(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint made before there were cards says of its origin."""
    inputs, spec = record.get("inputs", {}), record.get("spec", {})
    base = (inputs.get("model") or inputs.get("student") or {}).get("name", "")
    return {
        "base": base,
        "base_model": _PUBLISHED.get(base),
        "license": {"license": _LICENSES[base]} if base in _LICENSES else {},
        "data": None,
        "seed": spec.get("seed"),
    }


def _grid(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """How weights are stored: {} for 16 bits; `vllm` says why vLLM does not load it, or nothing."""
    if settings is None:
        return {}
    bits, size, kind = settings["bits"], settings["group_size"], settings["quant_method"]
    symmetric = bool(settings.get("sym")) and kind == "gptq"
    why = ""
    if bits not in (4, 8):
        why = f"vLLM has no kernel for {bits} bits"
    elif kind == "gptq" and not symmetric:
        why = "vLLM takes the GPTQ layout without zero points only"
    return {
        "bits": bits,
        "group_size": size,
        "layout": settings.get("checkpoint_format", settings.get("version", kind)),
        "format": kind,
        "symmetric": symmetric,
        "algorithm": (settings.get("meta") or {}).get("algorithm"),
        "short": [f"w{bits}", f"g{size}" if size != -1 else "rows"],
        "vllm": why,
    }


def _metadata(
    checkpoint: ModelFolder,
    told: Mapping[str, Any],
    method: str,
    grid: Mapping[str, Any],
    name: str,
    scores: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The hub's metadata; what is not known is left out."""
    sets = sorted(
        {r["place"] for r in told["data"] or () if _HUB_ID.fullmatch(r.get("place") or "")}
    )
    head: dict[str, Any] = {}
    if told["base_model"]:
        head["base_model"] = told["base_model"]
        head["base_model_relation"] = "quantized" if grid else "finetune"
    head |= {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if checkpoint.arch.is_vlm else "text-generation",
        "tags": ["qatbench", *dict.fromkeys([method, *([grid["format"]] if grid else [])])],
        **told["license"],
    }
    if grid:
        head["tags"].append(f"{grid['bits']}-bit")
    if sets:
        head["datasets"] = sets
    if scores:
        head["model-index"] = [{"name": name, "results": [result(row) for row in scores]}]
    return head


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one list, `distillation.kl` for what is inside."""
    found: dict[str, str] = {}
    for key, some in value.items():
        if isinstance(some, Mapping):
            found |= _flat(some, f"{prefix}{key}.")
        else:
            listed = isinstance(some, list | tuple)
            found[f"{prefix}{key}"] = ", ".join(map(str, some)) if listed else str(some)
    return found
