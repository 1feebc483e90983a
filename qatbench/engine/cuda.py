"""CUDA sources -> kernels: compiled by NVRTC for the device at hand, cached, launched on a stream.

NVRTC and the driver's bindings come with torch's CUDA builds: no compiler has to be installed, and
no header of CUDA is used. A kernel is launched so that it may start while the one before it ends
(programmatic dependent launch; CUDA C++ Programming Guide, same name); it waits inside.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatbench import store
from qatbench.errors import PrerequisiteError

SOURCES = Path(__file__).parent / "kernels"
LEAST = (8, 0)  # compute capability: bf16 products
CARVEOUT = 100  # percent of the first cache that is shared memory: all that can be
PORTABLE = 8  # blocks of a cluster beyond which a kernel has to say that it wants so many
OVERLAPS = (9, 0)  # from here on a kernel may start before its predecessor has ended


@dataclass(frozen=True)
class Kernel:
    """A function on a device."""

    handle: Any
    name: str
    overlaps: bool
    shared: int  # bytes of dynamic shared memory
    spilled: int  # bytes a thread that found no room in registers
    fits: bool  # whether a cluster of its blocks can run, if it has clusters

    def __call__(self, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """Launch on the current stream.

        Args:
            grid: blocks along x, y, z.
            threads: of a block.
            arguments: tensors and None (as pointers), or ctypes values.
        """
        driver = _binding("driver")
        values = [_as_c(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self.shared
        config.hStream = torch.cuda.current_stream().cuda_stream
        if self.overlaps:
            config.attrs = [_overlapping()]
            config.numAttrs = 1
        _done(driver.cuLaunchKernelEx(config, self.handle, ctypes.addressof(pointers), 0))


def check(device: str | int) -> None:
    """Refuse a device that the kernels cannot run on; nothing is compiled, and no memory is taken.

    Raises: PrerequisiteError where the bindings or NVRTC are missing, and where the device is older
        than the kernels or newer than NVRTC.
    """
    _binding("driver")
    nvrtc = _binding("nvrtc")
    version = _version(nvrtc)
    known = [divmod(number, 10) for number in _done(nvrtc.nvrtcGetSupportedArchs())]
    capability = torch.cuda.get_device_capability(device)
    if capability not in known or capability < LEAST:
        least, last = (".".join(map(str, one)) for one in (LEAST, max(known)))
        raise PrerequisiteError(
            f"the engine needs compute capability {least} to {last}, which NVRTC {version} knows; "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}",
            hint="--engine transformers",
        )


def kernel(source: str, name: str, *, shared: int = 0, **defines: int) -> Kernel:
    """A function of a file under `kernels/`, for the current device, compiled if it has to be.

    Args:
        source: file name.
        name: of the `extern "C"` function.
        shared: bytes of dynamic shared memory that it takes.
        defines: of the preprocessor.

    Raises: PrerequisiteError as `check` and `binary`.
    """
    known = tuple(sorted(defines.items()))
    return _kernel(source, name, shared, known, torch.cuda.current_device())


@functools.cache
def _kernel(
    source: str, name: str, shared: int, defines: tuple[tuple[str, int], ...], device: int
) -> Kernel:
    check(device)
    driver, capability = _binding("driver"), torch.cuda.get_device_capability(device)
    module = _module(source, defines, capability, device)
    function = _done(driver.cuModuleGetFunction(module, name.encode()))
    # One division of the first cache for all: to change it a multiprocessor has to run empty.
    kinds = driver.CUfunction_attribute
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    used = _done(driver.cuFuncGetAttribute(kinds.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function))
    settings = [
        (kinds.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, CARVEOUT),
        (kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, limit - used),
    ]
    known = dict(defines)
    blocks = known.get("SPLITS", 1)
    if blocks > PORTABLE:
        settings.append((kinds.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1))
    for kind, value in settings:
        _done(driver.cuFuncSetAttribute(function, kind, value))
    spilled = _done(driver.cuFuncGetAttribute(kinds.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, function))
    fits = blocks == 1 or _clusters(function, blocks, 32 * known["WARPS"], shared) > 0
    return Kernel(function, name, capability >= OVERLAPS, shared, spilled, fits)


def _clusters(function: Any, blocks: int, threads: int, shared: int) -> int:
    """How many clusters of so many blocks the device can run at a time."""
    driver = _binding("driver")
    attribute, config = driver.CUlaunchAttribute(), driver.CUlaunchConfig()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    cluster = attribute.value.clusterDim
    cluster.x, cluster.y, cluster.z = blocks, 1, 1
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared
    config.attrs, config.numAttrs = [attribute], 1
    found = driver.cuOccupancyMaxActiveClusters(function, config)
    if found[0] == driver.CUresult.CUDA_ERROR_INVALID_CLUSTER_SIZE:
        return 0
    return int(_done(found))


@functools.cache
def _module(
    source: str, defines: tuple[tuple[str, int], ...], capability: tuple[int, int], device: int
) -> Any:
    torch.cuda.current_stream(device).synchronize()  # there is a context
    image = binary(source, dict(defines), capability)
    return _done(_binding("driver").cuModuleLoadData(image))


def headers() -> dict[str, bytes]:
    """What sources may include, by name."""
    return {file.name: file.read_bytes() for file in sorted(SOURCES.glob("*.cuh"))}


def digest(source: str) -> str:
    """Of a source with what it includes: eight hexadecimal digits."""
    code = b"".join([(SOURCES / source).read_bytes(), *headers().values()])
    return hashlib.sha256(code).hexdigest()[:8]


def binary(source: str, defines: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """Machine code of a source for a compute capability, from the cache where it is there.

    Raises: PrerequisiteError if NVRTC is missing or refuses the source.
    """
    code = (SOURCES / source).read_bytes()
    nvrtc = _binding("nvrtc")
    version = _version(nvrtc)
    options = [f"-D{key}={value}" for key, value in sorted(defines.items())]
    options += [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "-std=c++17"]
    included = headers()
    parts = b"\0".join([code, *included.values(), version.encode(), *map(str.encode, options)])
    name = f"{Path(source).stem}-{hashlib.sha256(parts).hexdigest()[:20]}.cubin"
    file = store.cache_folder() / "kernels" / name
    if file.exists():
        return file.read_bytes()
    image = _compiled(nvrtc, source, code, included, options)
    store.write_bytes(file, image)
    return image


def compile_all(wanted: Iterable[tuple[str, Mapping[str, int]]]) -> None:
    """Compile sources with their defines for the current device into the cache, several at once."""
    capability = torch.cuda.get_device_capability()
    each = {(source, *sorted(defines.items())): (source, defines) for source, defines in wanted}
    with ThreadPoolExecutor() as pool:  # the compiler lets other threads run
        list(pool.map(lambda one: binary(one[0], one[1], capability), each.values()))


def _version(nvrtc: Any) -> str:
    try:
        return ".".join(map(str, _done(nvrtc.nvrtcVersion())))
    except RuntimeError as error:  # the bindings look for the library at the first call
        told = str(error).strip().partition("\n")[0]
        raise PrerequisiteError(
            f"the engine's kernels need NVRTC: {told}",
            hint="pip install nvidia-cuda-nvrtc (it comes with torch's CUDA builds)",
        ) from error


def _compiled(
    nvrtc: Any, source: str, code: bytes, included: Mapping[str, bytes], options: list[str]
) -> bytes:
    names = [name.encode() for name in included]
    program = _done(
        nvrtc.nvrtcCreateProgram(code, source.encode(), len(names), list(included.values()), names)
    )
    status = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
    if int(status):
        log = b" " * _done(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        nvrtc.nvrtcDestroyProgram(program)
        told = log.rstrip(b"\0").decode().strip()
        raise PrerequisiteError(
            f"NVRTC does not compile {source} with {' '.join(options)}: {told}",
            hint="--engine transformers",
        )
    image = bytes(_done(nvrtc.nvrtcGetCUBINSize(program)))
    _done(nvrtc.nvrtcGetCUBIN(program, image))
    nvrtc.nvrtcDestroyProgram(program)
    return image


@functools.cache
def _binding(name: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise PrerequisiteError(
            f"the engine's kernels need cuda.bindings.{name}: {error}",
            hint="pip install cuda-bindings (it comes with torch's CUDA builds)",
        ) from error


@functools.cache
def _overlapping() -> Any:
    driver = _binding("driver")
    attribute = driver.CUlaunchAttribute()
    kinds = driver.CUlaunchAttributeID
    attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What a function launches, as a graph; its kernels have to be loaded."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The same after running it once, for kernels to be loaded."""
    run()
    return capture(run)


def seconds_of(graph: torch.cuda.CUDAGraph, times: int = 1) -> float:
    """Seconds a replay of some that follow one another."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    graph.replay()
    begin.record()
    for _ in range(times):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / times


def _as_c(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return argument


def _done(result: tuple[Any, ...]) -> Any:
    """What a call of CUDA returns beside its status.

    Raises: RuntimeError with the status' name.
    """
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values) if values else None
