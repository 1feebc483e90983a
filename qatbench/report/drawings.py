"""Small drawings inside report.html: intervals on a shared scale, and figures made safe to inline.

Colours come from the page's style sheet, so that they follow its light and dark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple
from xml.etree import ElementTree

from markupsafe import Markup

from qatbench.errors import ArtifactError
from qatbench.report.model import ArmResult

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_LEFT_OUT = {"metadata", "script", "foreignObject", "title"}
_GREY = "#787878"  # of the figures' texts and axes, between black and white
_SHAPES = {"PTQ": "circle", "QAT": "triangle", "16-bit": "square", "unknown": "diamond"}  # theirs


class Scale(NamedTuple):
    """Where a value lies between two ends."""

    low: float
    high: float

    def place(self, value: float, width: float) -> float:
        """Pixels from the left, within the drawing."""
        share = (value - self.low) / (self.high - self.low)
        return round(min(max(share, 0.0), 1.0) * (width - 12) + 6, 1)


def accuracy_scale(arms: Iterable[ArmResult]) -> Scale:
    """From the lowest to the highest interval, out to the next 5 points."""
    ends = [(arm.low, arm.high) for arm in arms]
    low = math.floor(20 * min(low for low, _ in ends)) / 20
    return Scale(low, max(math.ceil(20 * max(high for _, high in ends)) / 20, low + 0.05))


def difference_scale(intervals: Iterable[tuple[float, float]], margin: float) -> Scale:
    """Symmetric around 0, wide enough for every interval and for the margin."""
    ends = [abs(end) for interval in intervals for end in interval]
    reach = 1.15 * max([*ends, margin])
    return Scale(-reach, reach)


def accuracy_bar(arm: ArmResult, scale: Scale, baseline: float) -> Markup:
    """An arm's accuracy and interval; a line where the baseline is. Beside it stand the numbers."""
    return Markup(
        '<svg class="bar {family}" viewBox="0 0 120 18" width="120" height="18"'
        ' aria-hidden="true" focusable="false"><path class="rule" d="M{base} 0V18"/>{marks}</svg>'
    ).format(
        family=arm.family.lower(),
        base=scale.place(baseline, 120),
        marks=_marks(arm.low, arm.accuracy, arm.high, scale, 120, 9, _SHAPES[arm.family]),
    )


def difference_bar(
    low: float, value: float, high: float, scale: Scale, margin: float, *, label: str = ""
) -> Markup:
    """A difference and its interval; a line at 0 and a band as wide as the margin.

    With a `label` it is a picture of its own, and wide; without one it repeats what stands beside.
    """
    width, height = (320, 40) if label else (120, 18)
    spoken = Markup('role="img" aria-label="{}"').format(label) if label else 'aria-hidden="true"'
    left, right = scale.place(-margin, width), scale.place(margin, width)
    return Markup(
        '<svg class="{kind}" viewBox="0 0 {w} {h}"{size} {spoken} focusable="false">'
        '<rect class="margin" x="{left}" y="0" width="{span}" height="{h}"/>'
        '<path class="rule" d="M{zero} 0V{h}"/>{marks}</svg>'
    ).format(
        kind="contest" if label else "bar",
        w=width,
        h=height,
        size="" if label else Markup(' width="{}" height="{}"').format(width, height),
        spoken=Markup(spoken),
        left=left,
        span=round(right - left, 1),
        zero=scale.place(0, width),
        marks=_marks(low, value, high, scale, width, height // 2, "circle"),
    )


def _marks(
    low: float, value: float, high: float, scale: Scale, width: int, y: int, shape: str
) -> Markup:
    """A whisker from low to high, and the value as a shape on it."""
    x, size = scale.place(value, width), 3.5 if y < 12 else 6
    shapes = {
        "circle": f"M{x - size} {y}a{size} {size} 0 1 0 {2 * size} 0a{size} {size} 0 1 0"
        f" {-2 * size} 0z",
        "triangle": f"M{x} {y - size - 1}l{size + 1} {2 * size}h{-2 * size - 2}z",
        "square": f"M{x - size} {y - size}h{2 * size}v{2 * size}h{-2 * size}z",
        "diamond": f"M{x} {y - size - 1}l{size + 1} {size + 1}l{-size - 1} {size + 1}"
        f"l{-size - 1} {-size - 1}z",
    }
    ends = scale.place(low, width), scale.place(high, width)
    tick = size - 1
    return Markup(
        '<path class="whisker" d="M{0} {y}H{1}M{0} {up}v{tall}M{1} {up}v{tall}"/>'
        '<path class="mark" d="{shape}"/>'
    ).format(*ends, y=y, up=y - tick, tall=2 * tick, shape=shapes[shape])


def inlined(svg: str, name: str, title: str) -> Markup:
    """A figure's SVG as part of the page: titled, its ids its own, its grey the page's text colour.

    Raises: ArtifactError for text that is no SVG, or one that runs a script or loads something.
    """
    try:
        root = ElementTree.fromstring(svg.encode())
    except ElementTree.ParseError as error:
        raise ArtifactError(
            f"figure {name} is no SVG: {error}", hint="compare the runs again"
        ) from error
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK[1:].partition("}")[0])
    own = re.sub(r"\W+", "-", name)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in _LEFT_OUT:
                parent.remove(child)
        _own_names(parent, own, name)
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{own}-title", "class": "figure"}
    heading = ElementTree.Element(f"{{{_SVG}}}title", {"id": f"{own}-title"})
    heading.text = title
    root.insert(0, heading)
    text = ElementTree.tostring(root, encoding="unicode")
    return Markup(text.replace(_GREY, "currentColor"))


def _own_names(element: ElementTree.Element, own: str, figure: str) -> None:
    """Prefix ids and what refers to them, and keep a style sheet to its figure; in place."""
    for key, value in element.attrib.items():
        if key == "id":
            element.attrib[key] = f"{own}-{value}"
        elif key in (_XLINK, "href"):
            if not value.startswith("#"):
                raise _unsafe(figure, value)
            element.attrib[key] = f"#{own}-{value[1:]}"
        elif key.lower().startswith("on") or "url(http" in value:
            raise _unsafe(figure, key)
        else:
            element.attrib[key] = value.replace("url(#", f"url(#{own}-")
    if element.tag.endswith("}style") and element.text:
        element.text = element.text.replace("*{", ".figure *{")


def _unsafe(figure: str, what: str) -> ArtifactError:
    return ArtifactError(
        f"figure {figure} refers to something outside it: {what}", hint="compare the runs again"
    )
