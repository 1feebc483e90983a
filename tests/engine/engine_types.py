"""What the fixtures of this folder are."""

from __future__ import annotations

from collections.abc import Callable

from qatbench.vlm.batch import Encoded
from qatbench.vlm.load import Loaded, ModelFolder

Load = Callable[[str], Loaded]
Ask = Callable[[Loaded, int], list[Encoded]]
Packs = Callable[[str, str], ModelFolder]
