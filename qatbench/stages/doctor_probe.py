"""Import the heavy packages in a process of their own, and say what the GPUs are.

A package that is broken may raise anything, or end the process: here that is a finding. Each fact
is one line, `@` and a JSON object, so that what libraries print does not get in between.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from qatbench.stages.common import own_process

IMPORTED = ("torch", "torchvision", "transformers", "optimum", "torchao", "gptqmodel")
TIMEOUT = 300.0  # seconds; a slow disk and cold caches included
# What quantize writes: method and bits -> the library's format and whether zero points are fixed.
LAYOUTS = {
    ("gptq", 4): ("gptq", "gptq", True),
    ("gptq", 8): ("gptq", "gptq", True),
    ("awq", 4): ("awq", "gemm", False),
    ("awq", 8): ("gptq", "gptq", True),
}


def probe(timeout: float = TIMEOUT) -> dict[str, Any]:
    """Import everything elsewhere and read what it said.

    Returns: `imports` (package -> None, or why it cannot be imported), `cuda` (`built`, `devices`,
        `error`), `kernels` of the library on the CPU ("gptq 4" -> class), `triton` (None or why
        not). What is not known is missing.
    """
    try:
        ended = own_process("qatbench.stages.doctor_probe", timeout=timeout)
        text, last = ended.stdout, f"the import ended Python ({_end(ended.returncode)})"
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else ""
        last = f"the import took more than {timeout:.0f} s"
    found: dict[str, Any] = {"imports": {}}
    for line in text.splitlines():
        if line.startswith("@"):
            fact = json.loads(line[1:])
            found["imports"] |= fact.pop("imports", {})
            found |= fact
    silent = [name for name in IMPORTED if name not in found["imports"]]
    if silent:
        found["imports"][silent[0]] = last
    return found


def _end(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def main() -> None:
    """Say everything, one fact a line."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))
    for name in IMPORTED:
        _say({"imports": {name: _tried(partial(importlib.import_module, name))}})
        if name == "torch":
            _say({"cuda": _cuda()})
    _say({"triton": _tried(partial(importlib.import_module, "triton"))})
    for part in ("nvrtc", "driver"):
        module = f"cuda.bindings.{part}"
        _say({part: _tried(partial(importlib.import_module, module))})
    kernels: dict[str, str] = {}
    for (method, bits), what in LAYOUTS.items():
        with contextlib.suppress(Exception):
            kernels[f"{method} {bits}"] = _kernel(bits, *what)
    _say({"kernels": kernels})


def _say(fact: dict[str, Any]) -> None:
    sys.stdout.write(f"\n@{json.dumps(fact)}\n")
    sys.stdout.flush()


def _tried(what: Callable[[], Any]) -> str | None:
    """None, or the first line of what went wrong."""
    try:
        what()
    except BaseException as error:  # noqa: BLE001 - a broken package may raise anything
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    return None


def _cuda() -> dict[str, Any]:
    found: dict[str, Any] = {"built": None, "devices": [], "error": None}

    def look() -> None:
        import torch

        found["built"] = torch.version.cuda
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            found["devices"].append(
                {
                    "name": facts.name,
                    "capability": [facts.major, facts.minor],
                    "total": total,
                    "free": free,
                }
            )

    found["error"] = _tried(look)
    return found


def _kernel(bits: int, method: str, form: str, symmetric: bool) -> str:
    """What the library picks on the CPU, asked as transformers asks it."""
    importer: Any = importlib.import_module("gptqmodel.utils.importer")
    made = importer.hf_select_quant_linear_v2(
        bits=bits,
        group_size=128,
        desc_act=False,
        sym=symmetric,
        format=form,
        quant_method=method,
        zero_point=not symmetric,
        device_map={"": "cpu"},
        pack=False,
    )
    return str(made.__name__)


if __name__ == "__main__":
    main()
