"""doctor: GPUs, kernels, compilers, cores, memory, disk, the cache folder and the hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qatbench import store
from qatbench.stages.doctor_rows import Row, State, gb

MARLIN = (8, 0)  # the least compute capability for which the library has Marlin
ENGINE = (8, 0)  # as `engine.cuda.LEAST`, which imports torch
MACHETE = (9, 0)  # where it prefers a kernel whose source it has to download
LITTLE_DISK, NO_DISK = 10e9, 1e9  # bytes
HUB = "https://huggingface.co"
HUB_SECONDS = 3.0
# What torch's and gptqmodel's C++ extensions and torch.compile on the CPU include.
PROGRAM = "#include <Python.h>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
COMPILER = "apt-get install g++ python3-dev   (or: conda install cxx-compiler)"
CUDA_TORCH = "make setup VENV=NEW   (the default wheels of torch have CUDA)"


class Memory(NamedTuple):
    """Bytes of main memory."""

    total: int
    free: int


# --- GPUs and kernels ---------------------------------------------------------------------------


def gpus(found: Mapping[str, Any], wanted: bool) -> list[Row]:
    """One row a GPU; `wanted` says whether the work asks for one."""
    cuda = found.get("cuda") or {}
    driver = _driver()
    rows = [
        Row(
            f"GPU {index}",
            "ok",
            f"{gpu['name']}, {gb(gpu['total'])} ({gb(gpu['free'])} free), compute capability "
            f"{'.'.join(map(str, gpu['capability']))}, driver {driver or 'unknown'}",
        )
        for index, gpu in enumerate(cuda.get("devices", []))
    ]
    if rows:
        return rows
    bad: State = "failure" if wanted else "warning"
    if driver is None:
        return [Row("GPU", bad, "none: mini and smollm2-135m run on the CPU", "--device cpu")]
    if not cuda.get("built"):
        return [Row("GPU", bad, f"driver {driver}, but torch is built for the CPU", CUDA_TORCH)]
    why = cuda.get("error") or f"torch is built for CUDA {cuda['built']}"
    return [Row("GPU", bad, f"driver {driver}, but torch sees no GPU: {why}", "update the driver")]


def _driver() -> str | None:
    """Version of the NVIDIA driver, None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        ended = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.partition("\n")[0].strip() or None


def kernels(found: Mapping[str, Any], device: str) -> list[Row]:
    """Which kernel multiplies packed linears, by format and bits."""
    if found.get("imports", {}).get("gptqmodel", "it is not there") is not None:
        told = "every width is multiplied densely after unpacking: gptqmodel cannot be imported"
        return [Row("kernels", "warning", told, "--kernel dense, until gptqmodel is repaired")]
    on_cpu: Mapping[str, str] = found.get("kernels", {})
    capability = _capability(found) if device.startswith("cuda") else None
    rows = []
    for method in ("gptq", "awq"):
        four, eight = (_kernel(method, bits, capability, on_cpu) for bits in (4, 8))
        told = f"4 bits {four}, 8 bits {eight}, 3 and 2 bits dense after unpacking"
        rows.append(Row(f"kernels, {method.upper()}", "ok", told))
    if capability and capability >= MACHETE:
        told = "the library tries Machete before Marlin here and downloads its source once"
        rows.append(Row("kernels, first load", "ok", told, "--kernel dense, where that fails"))
    return rows


def engine(found: Mapping[str, Any], device: str) -> Row:
    """Whether the kernels of this project's engine run here: `speed`, `ask`, generate mode."""
    name = "kernels, engine"
    if not device.startswith("cuda"):
        return Row(name, "ok", "steps in torch, the model's own linears: its kernels are CUDA's")
    capability = _capability(found)
    if capability < ENGINE:
        told = f"compute capability {'.'.join(map(str, capability))}, its kernels need 8.0"
        return Row(name, "warning", told, "--engine transformers")
    for part in ("nvrtc", "driver"):
        if why := found.get(part):
            told = f"its kernels cannot be compiled: {why}"
            return Row(name, "warning", told, "pip install cuda-bindings, or --engine transformers")
    return Row(name, "ok", "16 and 4 bits in bfloat16, compiled by NVRTC at first use and kept")


def _capability(found: Mapping[str, Any]) -> tuple[int, ...]:
    devices = (found.get("cuda") or {}).get("devices", [])
    return min(tuple(gpu["capability"]) for gpu in devices) if devices else (0, 0)


def _kernel(
    method: str, bits: int, capability: tuple[int, ...] | None, on_cpu: Mapping[str, str]
) -> str:
    if capability is None:
        return on_cpu.get(f"{method} {bits}", "the library's choice")
    return "Marlin" if capability >= MARLIN else "the library's Triton or torch kernel"


# --- compilers ----------------------------------------------------------------------------------


def compilers(found: Mapping[str, Any], device: str, method: str | None) -> list[Row]:
    """Whether C++ compiles here, and on a GPU Triton and nvcc.

    Training on the grid compiles its fake quantization on CUDA, and Triton needs a compiler too.
    """
    compiled = device.startswith("cuda") and method in ("qat", "grace")
    why = _compiles()
    told = "compiles: gptqmodel's CPU kernels, torch.compile" if why is None else why
    bad: State = "failure" if compiled else "warning"
    rows = [Row("C++ compiler", "ok" if why is None else bad, told, COMPILER if why else "")]
    if not device.startswith("cuda"):
        return rows
    triton = found.get("triton", "not imported")
    fix = "pip install triton, or --no-compile" if triton else ""
    rows.append(Row("Triton", bad if triton else "ok", triton or "imports", fix))
    if (
        shutil.which("nvcc")
        or Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc").exists()
    ):
        return [*rows, Row("nvcc", "ok", "there: the library compiles its CUDA kernels once")]
    told = "not there: the library cannot compile Marlin"
    return [*rows, Row("nvcc", "warning", told, "--kernel dense, or install the CUDA toolkit")]


def _compiles() -> str | None:
    """None when a shared library with Python's and OpenMP's headers compiles, else why not."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "no c++ or g++ on PATH"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROGRAM, encoding="utf-8")
        include = sysconfig.get_paths()["include"]
        command = [*compiler.split(), "-shared", "-fPIC", "-fopenmp", f"-I{include}"]
        try:
            ended = subprocess.run(
                [*command, str(source), "-o", str(Path(folder, "probe.so"))],
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            return f"{compiler} does not run: {type(error).__name__}"
    if ended.returncode == 0:
        return None
    lines = [line for line in ended.stderr.splitlines() if "error" in line] or ["no reason given"]
    return f"{compiler} fails: {lines[0].rpartition('error:')[2].strip()[:160]}"


# --- cores, memory, disk ------------------------------------------------------------------------


def cores() -> Row:
    """Cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    set_to = os.environ.get("GPTQMODEL_CPU_WORKERS")
    told = f"{usable}; GPTQMODEL_CPU_WORKERS {f'is {set_to}' if set_to else 'is set when needed'}"
    return Row("cores", "ok", told)


def main_memory() -> Memory:
    """Main memory, within the limit of this container."""
    sizes = {}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            sizes[name] = int(value.split()[0]) * 1024
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError, ValueError):
        total = free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such limit: the file says `max`
        return Memory(total, free)
    return Memory(min(total, limit), min(free, max(0, limit - used)))


def disk(name: str, folder: Path, needed: float = 0.0) -> Row:
    """Free space at `folder`, be it there already or not; the work needs `needed` bytes."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    told = f"{gb(free)} free" + (f", the work needs {gb(needed)}" if needed else "")
    if free >= max(needed, NO_DISK):
        return Row(f"disk, {name}", "ok" if free > LITTLE_DISK else "warning", told)
    return Row(f"disk, {name}", "failure", told, f"free some space: du -sh {there}/* | sort -h")


def cache() -> Row:
    """Whether the cache folder can be written."""
    folder = store.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as stream:
            stream.write(b"0" * 4096)
    except OSError as error:
        why = f"{folder} cannot be written: {error.strerror or type(error).__name__}"
        return Row("cache", "failure", why, "export XDG_CACHE_HOME=FOLDER")
    return Row("cache", "ok", f"{folder} can be written")


# --- the hub ------------------------------------------------------------------------------------


def hub(seconds: float = HUB_SECONDS) -> Row:
    """Whether the hub answers; everything local works without it."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        told = "switched off by HF_HUB_OFFLINE: local models and data only"
        return Row("hub", "warning", told, "unset HF_HUB_OFFLINE")
    address = os.environ.get("HF_ENDPOINT", HUB)
    said: list[str | None] = []
    asking = threading.Thread(target=lambda: said.append(_ask(address, seconds)), daemon=True)
    asking.start()
    asking.join(seconds + 1)  # looking up a name has no time limit of its own
    why = said[0] if said else f"no answer within {seconds:.0f} s"
    if why is None:
        return Row("hub", "ok", f"{address} answers")
    told = f"{address} is not reached ({why}): local models and data only"
    return Row("hub", "warning", told, "give folders, or set HTTPS_PROXY or HF_ENDPOINT")


def _ask(address: str, seconds: float) -> str | None:
    """None when the address answers, be it with an error of its own; else why not."""
    try:
        request = urllib.request.Request(address, method="HEAD")
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError:
        return None
    except Exception as error:  # noqa: BLE001 - sockets, proxies and names fail in many ways
        return (str(getattr(error, "reason", error)) or type(error).__name__)[:120]
    return None
