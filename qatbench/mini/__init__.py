"""The built-in test bed: drawn benchmarks, and two small models that were trained on their world.

`mini` is the drawn world with pictures (benchmark.py writes it, pretrain.py makes models for it);
`mini-text` are questions in plain English for text models (text.py). Both are made once per user.
"""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock

# Raise a version with every change of a word, a template or the order of draws.
VERSIONS = {"mini": "2", "mini-text": "1"}


def folder(name: str = "mini") -> Path:
    """Folder of a built-in benchmark (seed 0), built on first use.

    It lies in $XDG_CACHE_HOME (else ~/.cache) under qatbench/; two processes may ask at once.
    """
    from qatbench.mini import benchmark, text

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qatbench"
    out = base / f"{name}-{VERSIONS[name]}-seed0"
    base.mkdir(parents=True, exist_ok=True)
    with FileLock(base / f".{out.name}.lock"):
        if not (out / "problems.json").is_file():  # build() renames a finished folder into place
            (benchmark if name == "mini" else text).build(out, seed=0)
    return out
