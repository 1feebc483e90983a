"""Tables of answers -> rows of texts: .xlsx, .tsv, .csv. An empty cell is "".

An .xlsx file is read with the standard library: the first sheet, values only. Every cell is its
text, so that "NA" is an answer and not a gap; what a writer put in place of control characters
(`_x000D_`) is left as it is, as pandas leaves it.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from qatbench.errors import ArtifactError

Row = dict[str, str]

_HINT = "save the table again as .xlsx, .tsv or .csv, with one header row"
_RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"


def read_text_table(data: bytes, path: Path) -> list[Row]:
    """Rows of a .tsv or .csv; without a telling name the header's tabs decide.

    Raises: ArtifactError if it cannot be read, or a row has more cells than the header.
    """
    import pandas

    header = data.split(b"\n", 1)[0]
    comma = ".csv" in path.suffixes or (".tsv" not in path.suffixes and b"\t" not in header)
    try:
        table = pandas.read_csv(
            io.BytesIO(data), sep="," if comma else "\t", dtype=str, na_filter=False,
            encoding="utf-8-sig",
        )  # fmt: skip
    except ValueError as error:  # the parser's and the decoder's are ValueErrors
        raise _unreadable(path, error) from error
    if not isinstance(table.index, pandas.RangeIndex):  # pandas made row names of the first cells
        raise ArtifactError(f"{path}: rows have more cells than the header", hint=_HINT)
    return [{str(name): cell for name, cell in row.items()} for row in table.to_dict("records")]


def read_xlsx(data: bytes, path: Path) -> list[Row]:
    """Rows of the first sheet, named by its first row.

    Raises: ArtifactError if it is no .xlsx file, or two columns have one name.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            strings = _shared_strings(parts)
            rows = list(_cells(_sheet(parts), strings))
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, IndexError, EOFError,
            ElementTree.ParseError) as error:  # fmt: skip
        raise _unreadable(path, error) from error
    names = rows[0] if rows else {}
    if len(set(names.values())) < len(names):
        raise ArtifactError(f"{path}: two columns have one name", hint=_HINT)
    return [
        {name: row.get(column, "") for column, name in names.items()}
        for row in rows[1:]
        if any(row.values())
    ]


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"cannot read {path}: {' '.join(str(error).split())}", hint=_HINT)


def _tags(node: Element, name: str) -> Iterator[Element]:
    return (child for child in node.iter() if child.tag.rpartition("}")[2] == name)


def _shared_strings(parts: zipfile.ZipFile) -> list[str]:
    if "xl/sharedStrings.xml" not in parts.namelist():
        return []
    root = ElementTree.fromstring(parts.read("xl/sharedStrings.xml"))
    return [_text(item) for item in _tags(root, "si")]


def _text(node: Element) -> str:
    """The text of all runs, without reading aids of East Asian scripts (rPh)."""
    aids = {id(text) for aid in _tags(node, "rPh") for text in _tags(aid, "t")}
    return "".join(text.text or "" for text in _tags(node, "t") if id(text) not in aids)


def _sheet(parts: zipfile.ZipFile) -> Element:
    """The first sheet, by the order of the workbook."""
    workbook = ElementTree.fromstring(parts.read("xl/workbook.xml"))
    wanted = next(_tags(workbook, "sheet")).get(_RELATION)
    relations = ElementTree.fromstring(parts.read("xl/_rels/workbook.xml.rels"))
    target = next(r.attrib["Target"] for r in _tags(relations, "Relationship")
                  if r.get("Id") == wanted)  # fmt: skip
    name = target.lstrip("/") if target.startswith("/") else f"xl/{target}"
    return ElementTree.fromstring(parts.read(name))


def _cells(sheet: Element, strings: list[str]) -> Iterator[dict[int, str]]:
    """Each row as column number -> text."""
    for row in _tags(sheet, "row"):
        cells: dict[int, str] = {}
        for cell in _tags(row, "c"):
            place = re.match("[A-Z]+", cell.get("r", ""))
            column = _column(place[0]) if place else max(cells, default=0) + 1
            cells[column] = _value(cell, strings)
        yield cells


def _column(letters: str) -> int:
    number = 0
    for letter in letters:
        number = 26 * number + ord(letter) - ord("A") + 1
    return number


def _value(cell: Element, strings: list[str]) -> str:
    kind = cell.get("t", "n")
    if kind == "inlineStr":
        return _text(cell)
    value = next((node.text or "" for node in _tags(cell, "v")), "")
    if kind == "s":
        return strings[int(value)]
    if kind == "b":
        return {"1": "True", "0": "False"}.get(value, value)
    if kind == "n" and value and float(value).is_integer():
        return str(int(float(value)))
    return value
