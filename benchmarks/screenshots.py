"""Pictures of a report in a headless Chromium: small and wide, light and dark.

    python benchmarks/screenshots.py results/mini/report.html --out docs/screenshots

Needs the extra `browser`, a Chromium and its chromedriver. Of each width and scheme the first
screen; of the light ones also the parts named by --part, if the page has them.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "report"))
import browser  # noqa: E402

SIZES = ((390, 844), (1400, 900))
SCHEMES = ("light", "dark")
PARTS = ("task-1-arms", "task-1-gallery")
LARGEST = 200_000  # bytes of a picture


def main() -> None:
    """Take the pictures and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", action="append", help=f"anchor; default: {', '.join(PARTS)}")
    given = parser.parse_args()
    if reason := browser.missing():
        sys.exit(f"screenshots need a browser: {reason}")
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, browser.chromium(Path(profile)) as driver:
        for width, height in SIZES:
            for scheme in SCHEMES:
                browser.show(driver, given.report, width, height, scheme)
                save(driver, given.out / f"verdict-{width}-{scheme}.png")
                for part in given.part or PARTS:
                    if scroll_to(driver, part) and scheme == "light":
                        save(driver, given.out / f"{part}-{width}.png")


def scroll_to(driver: Any, anchor: str) -> bool:
    """Bring a part to the top of the window; False if there is none."""
    return bool(
        driver.execute_script(
            "const part = document.getElementById(arguments[0]);"
            "if (part) part.scrollIntoView(); return part !== null;",
            anchor,
        )
    )


def save(driver: Any, path: Path) -> None:
    """Write the window as a PNG of few colours, below LARGEST."""
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path} {size / 1000:.0f} kB")
    if size > LARGEST:
        sys.exit(f"{path} is larger than {LARGEST / 1000:.0f} kB")


if __name__ == "__main__":
    main()
