"""The real reload: plain transformers on the CPU in fp32, one text and one image prompt."""

from __future__ import annotations

from typing import Any

import torch

from qatbench.errors import PrerequisiteError
from qatbench.quant.backends import quiet
from qatbench.stages.proof import probe
from qatbench.stages.verify.finding import Finding, found
from qatbench.stages.verify.subject import Subject
from qatbench.vlm import load as models
from qatbench.vlm.load import ModelFolder


def reload(subject: Subject) -> tuple[list[Finding], dict[str, Any] | None]:
    """Load and ask; every key must have found its place and every logit must be finite.

    Returns: findings, and what was loaded and asked, None where that was not possible here.
    """
    path = subject.checkpoint.path
    settings = {"quantization_config": subject.settings} if subject.settings else {}
    folder = ModelFolder(str(path), path, subject.config | settings, {})
    try:
        loaded = models.load(folder, device="cpu", dtype=torch.float32)
        with quiet():
            logits = probe(loaded)
        kernel = models.kernel_name(loaded)
    except (PrerequisiteError, ImportError, MemoryError) as error:
        return [found("not-reloaded", str(path), _line(error))], None
    except Exception as error:  # noqa: BLE001 - whatever the library raises is the finding
        if "not enough memory" in str(error):
            return [found("not-reloaded", str(path), _line(error))], None
        return [found("reload-fails", str(path), _line(error))], None
    bad = [kind for kind, value in logits.items() if not torch.isfinite(value).all()]
    record = {"kernel": kernel, "finite": {kind: kind not in bad for kind in logits}}
    if bad:
        return [found("reload-nan", f"the {' and the '.join(bad)} prompt")], record
    return [], record


def _line(error: BaseException) -> str:
    """The first line of what an exception says."""
    told = str(error).strip().splitlines()
    return f"{type(error).__name__}: {told[0]}" if told else type(error).__name__
