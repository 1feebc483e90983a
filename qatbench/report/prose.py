"""The few marks of Markdown that the report's texts use, as HTML; everything else is escaped."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

_MARKS = re.compile(r"`([^`]+)`|\*\*(.+?)\*\*|\[([^\]]+)\]\((https://[^)\s]+)\)")


def prose(text: str) -> Markup:
    """Paragraphs and lists of `- ` lines, with **bold**, `code` and https links inside them."""
    parts: list[Markup] = []
    for block in re.split(r"\n\s*\n|\n(?=- )", text.strip()):
        if block.startswith("- "):
            item = Markup("<li>{}</li>").format(inline(block[2:]))
            if parts and parts[-1].endswith("</ul>"):
                parts[-1] = Markup("{}{}</ul>").format(parts[-1][: -len("</ul>")], item)
            else:
                parts.append(Markup("<ul>{}</ul>").format(item))
        elif block:
            parts.append(Markup("<p>{}</p>").format(inline(block)))
    return Markup("\n").join(parts)


def inline(text: str) -> Markup:
    """The same within a line."""
    parts, end = [], 0
    for found in _MARKS.finditer(text):
        parts.append(escape(text[end : found.start()]))
        code, bold, words, link = found.groups()
        if code is not None:
            parts.append(Markup("<code>{}</code>").format(code))
        elif bold is not None:
            parts.append(Markup("<strong>{}</strong>").format(inline(bold)))
        else:
            parts.append(Markup('<a href="{}">{}</a>').format(link, words))
        end = found.end()
    return Markup("").join([*parts, escape(text[end:])])
