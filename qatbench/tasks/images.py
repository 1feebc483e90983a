"""Encoded images -> pixels, within limits: what a file of unknown origin may cost."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from qatbench.errors import ArtifactError, PrerequisiteError

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 64 * 2**20  # of an encoded image
MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # none that runs another program
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")


def is_encoded(data: bytes) -> bool:
    """Whether these bytes begin as an image file does."""
    return data.startswith(_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def open_rgb(image: Path | bytes) -> Image.Image:
    """Decode an image to RGB; of several frames the first.

    Raises: PrerequisiteError when the file is missing; ArtifactError when it has more than 64 MiB
        or 64 million pixels, cannot be decoded, or is of a format that is not in FORMATS. No path
        but the last two parts, and no content, is told.
    """
    from PIL import Image

    if isinstance(image, Path) and not image.exists():
        raise PrerequisiteError(f"missing image {image.parent.name}/{image.name}")
    try:
        size = len(image) if isinstance(image, bytes) else image.stat().st_size
        if size > MAX_BYTES:
            raise ArtifactError(f"an image of {size} bytes is too large (at most {MAX_BYTES})")
        source = io.BytesIO(image) if isinstance(image, bytes) else image
        with Image.open(source, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                told = f"{opened.width} x {opened.height}"
                raise ArtifactError(f"an image of {told} pixels is too large")
            return opened.convert("RGB")
    except Image.DecompressionBombError as error:  # told by the header: nothing was decoded
        raise ArtifactError(f"an image of more than {MAX_PIXELS} pixels is too large") from error
    except (OSError, SyntaxError, ValueError) as error:
        # Not the library's own words: they hold the file's whole path.
        raise ArtifactError(f"image cannot be decoded: {type(error).__name__}") from error
