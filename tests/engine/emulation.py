"""The CUDA kernels on a CPU: their sources, compiled by g++ with `emulator.h` in place of CUDA.

Slow, and no statement about speed: what a kernel computes is what it says, thread by thread.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qatbench.engine import cuda

HEADER = Path(__file__).parent / "emulator.h"
COMPILER = shutil.which("g++")
_SIGNATURE = "void** given, const int* grid, int cluster, int threads, size_t shared, int lazy, " \
             "int late, char** to, const size_t* bytes"  # fmt: skip


@dataclass(frozen=True)
class Emulated:
    """A kernel, called as `cuda.Kernel` is."""

    function: Any
    shared: int
    cluster: int  # blocks
    lazy: bool  # copies come as late as they may
    late: Sequence[Tensor]  # what kernels before this one write

    def __call__(self, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """Run it to its end. Raises: AssertionError where it cannot go on."""
        values = [cuda._as_c(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        late = [tensor for tensor in self.late if tensor.numel()]
        to = (ctypes.c_void_p * len(late))(*(tensor.data_ptr() for tensor in late))
        sizes = [tensor.numel() * tensor.element_size() for tensor in late]
        failure = self.function(
            pointers, (ctypes.c_int * 3)(*(*grid, 1, 1)[:3]), self.cluster, threads,
            ctypes.c_size_t(self.shared), int(self.lazy), len(late), to,
            (ctypes.c_size_t * len(late))(*sizes),
        )  # fmt: skip
        assert failure is None, failure.decode()


def without_assembly(source: str) -> str:
    """A source without the functions that are written in assembly."""
    kept, at = [], 0
    for match in re.finditer(r"^(?:template <[^\n]*>\n)?__device__", source, re.M):
        start = match.start()
        line = source.index("\n", match.end())
        end = line if source[line - 1] == "}" else source.index("\n}\n", start) + 2
        if "asm" in source[start:end]:
            kept.append(source[at:start])
            at = end
    return "".join([*kept, source[at:]])


def as_cpp(source: str) -> str:
    """What g++ takes: without assembly, and with shared memory that is asked for."""
    included = {name: text.decode() for name, text in cuda.headers().items()}
    while '#include "' in source:  # each includes one at most
        source = re.sub(r'#include "([\w.]+)"', lambda found: included[found[1]], source)
    text = without_assembly(source)
    return re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];",
        r"\1* const \2 = (\1*)dynamic_memory();", text,
    )  # fmt: skip


@functools.cache
def _library(source: str, name: str, defines: tuple[tuple[str, int], ...], folder: Path) -> Any:
    own = as_cpp((cuda.SOURCES / source).read_text(encoding="utf-8"))
    told = "kernel(void** given) { emulator::call(&" + name + ", given); }\n"
    code = "\n".join([
        '#include "emulator.h"', own, "static void " + told,
        f'extern "C" const char* run({_SIGNATURE}) {{',
        "return emulator::launch(",
        "    kernel, given, grid, cluster, threads, shared, lazy, late, to, bytes); }",
    ])  # fmt: skip
    options = [f"-D{key}={value}" for key, value in defines]
    digest = hashlib.sha256("\0".join([code, HEADER.read_text(), *options]).encode()).hexdigest()
    file = folder / f"{Path(source).stem}-{digest[:16]}.so"
    if not file.exists():
        written = file.with_suffix(".cpp")
        written.write_text(code, encoding="utf-8")
        assert COMPILER is not None
        command = [
            COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-ffp-contract=off",
            f"-I{HEADER.parent}", *options, str(written), "-o", str(file),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr[:3000]
    function = ctypes.CDLL(str(file)).run
    function.restype = ctypes.c_char_p
    return function


def kernel(
    source: str, name: str, *, folder: Path, shared: int = 0, lazy: bool = True,
    late: Sequence[Tensor] = (), **defines: int,
) -> Emulated:  # fmt: skip
    """As `cuda.kernel`, with libraries kept in a folder."""
    function = _library(source, name, tuple(sorted(defines.items())), folder)
    return Emulated(function, shared, defines.get("SPLITS", 1), lazy, late)
