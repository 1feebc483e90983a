"""Drawing: a scene is 6 x 6 tile numbers, a tile is 8 x 8 pixels, so every tile is one patch.

Tiles are samples on a tray (a colour, a shape, solid or hollow, or nothing) or land on a map (with
the letter of a town, or without). `picture` looks all pixels up at once.
"""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE, PIXELS = 6, 8  # tiles a side, pixels a side of a tile
Grid = NDArray[np.int16]  # (6, 6) tile numbers

COLORS = {
    "red": (214, 39, 40), "green": (44, 140, 60), "blue": (40, 80, 220), "yellow": (235, 200, 40),
    "purple": (140, 60, 190), "orange": (245, 130, 30), "black": (25, 25, 25),
    "pink": (240, 130, 190),
}  # fmt: skip
_TRAY = (246, 244, 238)
_BITMAPS = {  # a hexadecimal byte a row, the left pixel in the highest bit
    "circle": "3c7effffffff7e3c",
    "square": "007e7e7e7e7e7e00",
    "triangle": "18183c3c7e7effff",
    "cross": "3c3cffffffff3c3c",
    "diamond": "183c7effff7e3c18",
    "heart": "66ffffff7e3c1800",
    "moon": "3c78f0f0f0f0783c",
    "arrow": "183c7eff3c3c3c3c",
}
SHAPES = tuple(_BITMAPS)
FILLS = ("solid", "hollow")
_LAND = {  # base colour, colour of the pattern, pattern
    "water": ((90, 150, 235), (50, 100, 200), "0000cc3300cc3300"),
    "forest": ((60, 150, 70), (25, 95, 40), "1038107c00081c3e"),
    "desert": ((238, 214, 140), (205, 170, 85), "4000080040000800"),
    "mountains": ((170, 165, 160), (105, 95, 90), "00081c3e7f000000"),
    "meadow": ((165, 215, 110), (225, 225, 80), "0040000400400004"),
    "snow": ((240, 246, 252), (185, 205, 225), "2000020040000410"),
}
LANDS = tuple(_LAND)
_FONT = {  # five columns of seven pixels, the top pixel in the lowest bit
    "F": "7f09090901", "G": "3e4149497a", "H": "7f0808087f", "J": "2040413f01", "K": "7f08142241",
    "L": "7f40404040", "M": "7f020c027f", "N": "7f0408107f", "P": "7f09090906", "R": "7f09192946",
    "S": "4649494931", "T": "01017f0101", "U": "3f4040403f", "V": "1f2040201f", "W": "3f4038403f",
    "X": "6314081463", "Y": "0708700807", "Z": "6151494543",
}  # fmt: skip
TOWN_LETTERS = tuple(_FONT)  # none of A to E, which name options
_INK = (15, 15, 15)

EMPTY = 0
_SAMPLES = 1
_MAPS = _SAMPLES + len(COLORS) * len(SHAPES) * len(FILLS)
TILES = _MAPS + len(LANDS) * (1 + len(TOWN_LETTERS))


def sample_tile(color: int, shape: int, fill: int) -> int:
    """Number of a sample's tile, from indices into COLORS, SHAPES and FILLS."""
    return _SAMPLES + (color * len(SHAPES) + shape) * len(FILLS) + fill


def land_tile(land: int, town: int | None = None) -> int:
    """Number of a map tile, from indices into LANDS and TOWN_LETTERS."""
    return _MAPS + land * (1 + len(TOWN_LETTERS)) + (0 if town is None else 1 + town)


def is_map(tile: int) -> bool:
    """Whether a tile is part of a map."""
    return tile >= _MAPS


def kind_of_sample(tile: int) -> int:
    """Number of a sample's colour and shape, whatever its fill: which mineral it is."""
    return (tile - _SAMPLES) // len(FILLS)


@cache
def tile_words() -> tuple[str, ...]:
    """What a caption calls each tile, by its number."""
    samples = [
        f"{'hollow ' if fill == 'hollow' else ''}{color} {shape}"
        for color in COLORS
        for shape in SHAPES
        for fill in FILLS
    ]
    maps = [f"{land} {town}".rstrip() for land in LANDS for town in ("", *TOWN_LETTERS)]
    return ("empty", *samples, *maps)


@cache
def tile_pixels() -> NDArray[np.uint8]:
    """(TILES, 8, 8, 3) pixels of every tile."""
    tiles = [_fill(_TRAY)]
    for color in COLORS.values():
        for name in SHAPES:
            solid = _bits(_BITMAPS[name])
            tiles += [_paint(_fill(_TRAY), solid, color)]
            tiles += [_paint(_fill(_TRAY), solid & ~_inside(solid), color)]
    for base, mark, pattern in _LAND.values():
        plain = _paint(_fill(base), _bits(pattern), mark)
        tiles += [plain, *(_lettered(plain, letter) for letter in TOWN_LETTERS)]
    return np.stack(tiles)


def picture(grid: Grid) -> NDArray[np.uint8]:
    """(..., 48, 48, 3) pixels of (..., 6, 6) tile numbers."""
    looked_up = np.moveaxis(tile_pixels()[grid], -3, -4)  # (..., 6, 8, 6, 8, 3)
    side = SIDE * PIXELS
    return looked_up.reshape(*grid.shape[:-2], side, side, 3)


def png(grid: Grid) -> bytes:
    """One scene as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(picture(grid)).save(stream, format="PNG")
    return stream.getvalue()


def caption(grid: Grid) -> str:
    """Every tile's words, row by row."""
    words = tile_words()
    return ", ".join(" ".join(words[tile] for tile in row) for row in grid.tolist())


def _fill(color: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.full((PIXELS, PIXELS, 3), color, dtype=np.uint8)


def _bits(rows: str) -> NDArray[np.bool_]:
    packed = np.frombuffer(bytes.fromhex(rows), dtype=np.uint8)
    return np.unpackbits(packed).reshape(PIXELS, PIXELS).astype(bool)


def _inside(solid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels whose four neighbours are all set."""
    wide = np.pad(solid, 1)
    return solid & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]


def _paint(
    tile: NDArray[np.uint8], where: NDArray[np.bool_], color: tuple[int, int, int]
) -> NDArray[np.uint8]:
    painted = tile.copy()
    painted[where] = color
    return painted


def _lettered(tile: NDArray[np.uint8], letter: str) -> NDArray[np.uint8]:
    """The tile with a light plate of 6 x 8 pixels and the letter on it; the land shows beside."""
    columns = np.frombuffer(bytes.fromhex(_FONT[letter]), dtype=np.uint8)
    glyph = ((columns[None] >> np.arange(7)[:, None]) & 1).astype(bool)
    out = tile.copy()
    out[:, 1:7] = (out[:, 1:7].astype(np.uint16) + 3 * 255) // 4
    area = out[0:7, 2:7]
    area[glyph] = _INK
    return out
