"""Figures of a benchmark, printed and kept as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def show(found: Mapping[str, Any], file: Path | None) -> None:
    """Print JSON, and write the same to a file if one is named; its folder is made."""
    text = json.dumps(found, indent=2)
    print(text)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
