"""NVRTC, if it is here; what a cubin says of its functions: registers and stack of a thread."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from qatbench.engine import cuda
from qatbench.errors import PrerequisiteError

REGISTERS, FRAME = 0x2F, 0x11  # EIATTR_REGCOUNT, EIATTRFRAME_SIZE in `cuobjdump -elf`


def _missing() -> str:
    try:
        cuda._done(cuda._binding("nvrtc").nvrtcVersion())
    except (PrerequisiteError, RuntimeError) as error:  # no bindings; bindings without the library
        return f"NVRTC is not here: {error}"
    return ""


without = _missing()
needs_nvrtc = pytest.mark.skipif(bool(without), reason=without or "NVRTC is here")


def attribute(image: bytes, kind: int) -> list[int]:
    """An attribute of each function of a cubin (ELF64), from its sections `.nv.info`."""
    (start,) = struct.unpack_from("<Q", image, 0x28)
    size, count, names = struct.unpack_from("<HHH", image, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", image, start + i * size) for i in range(count)]
    found = []
    for name, _, _, _, offset, length in sections:
        text = image[sections[names][4] + name :].split(b"\0", 1)[0]
        if text == b".nv.info":
            values = _attributes(image[offset : offset + length])
            found += [value[1] for known, value in values if known == kind]
    return found


def _attributes(data: bytes) -> Iterator[tuple[int, tuple[int, ...]]]:
    at = 0
    while at < len(data):
        form, kind, value = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == 4:  # `value` is the size of what follows: pairs (function, number)
            yield kind, struct.unpack_from(f"<{value // 4}I", data, at)
            at += value
