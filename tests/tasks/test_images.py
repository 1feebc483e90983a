"""Limits on images of unknown origin: bytes, pixels, formats."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from qatbench.errors import ArtifactError, PrerequisiteError
from qatbench.tasks import images


def encoded(form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (200, 30, 30)).save(buffer, format=form)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that claims to be this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_that_data_sets_use(form: str) -> None:
    got = images.open_rgb(encoded(form))
    assert (got.size, got.mode) == ((3, 2), "RGB")
    assert images.is_encoded(encoded(form))


def test_a_file_and_its_bytes_are_one(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(encoded())
    assert images.open_rgb(file).tobytes() == images.open_rgb(encoded()).tobytes()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8001, 8000), (12_000, 12_000), (60_000, 60_000)])
def test_too_many_pixels_are_refused_by_the_header(size: tuple[int, int]) -> None:
    with pytest.raises(ArtifactError, match="pixels is too large"):
        images.open_rgb(bomb(*size))


def test_too_many_bytes_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    file = tmp_path / "x.png"
    file.write_bytes(encoded())
    for image in (file, encoded()):
        with pytest.raises(ArtifactError, match="bytes is too large"):
            images.open_rgb(image)


@pytest.mark.parametrize("content", [b"", b"not an image", encoded()[:-30], bomb(100, 100)])
def test_a_damaged_image_is_an_artifact_error_without_its_path(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(content)
    for image in (file, content):
        with pytest.raises(ArtifactError, match="cannot be decoded") as caught:
            images.open_rgb(image)
        assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("form", ["EPS", "SGI"])  # for the first Pillow would run Ghostscript
def test_no_format_but_those_named(form: str) -> None:
    with pytest.raises(ArtifactError, match="cannot be decoded"):
        images.open_rgb(encoded(form))


def test_a_missing_file_is_a_missing_prerequisite(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match=r"^missing image a/x\.png$"):
        images.open_rgb(tmp_path / "a" / "x.png")
