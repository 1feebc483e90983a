"""Tables of questions or answers -> rows of texts: .tsv, .csv, .xlsx. An empty cell is "".

Every cell is its text, so that "NA" is an answer and not a gap; what a writer of .xlsx put in place
of control characters (`_x000D_`) is left as it is.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from qatbench.errors import ArtifactError

Row = dict[str, str]

_HINT = "save the table again as .xlsx, .tsv or .csv, with one header row"


def text_rows(
    source: Path | io.BytesIO,
    separator: str,
    path: Path,
    hint: str,
    needed: Sequence[str] = (),
) -> list[Row]:
    """Rows as pandas splits them; messages name `path` and carry `hint`.

    Raises: ArtifactError if they cannot be read, a column that is needed is not there, or a row has
        more cells than the header.
    """
    import pandas

    try:
        table = pandas.read_csv(
            source, sep=separator, dtype=str, na_filter=False, encoding="utf-8-sig"
        )
    except (OSError, ValueError) as error:  # the parser's and the decoder's are ValueErrors
        raise _unreadable(path, error, hint) from error
    if absent := [name for name in needed if name not in table.columns]:
        raise ArtifactError(f"{path} has no column {absent[0]}", hint=hint)
    if not isinstance(table.index, pandas.RangeIndex):  # pandas made row names of the first cells
        raise ArtifactError(f"{path}: rows have more cells than the header", hint=hint)
    return [{str(name): cell for name, cell in row.items()} for row in table.to_dict("records")]


def read_text_table(data: bytes, path: Path) -> list[Row]:
    """Rows of a .tsv or .csv; without a telling name the header's tabs decide.

    Raises: ArtifactError if it cannot be read, or a row has more cells than the header.
    """
    header = data.split(b"\n", 1)[0]
    comma = ".csv" in path.suffixes or (".tsv" not in path.suffixes and b"\t" not in header)
    return text_rows(io.BytesIO(data), "," if comma else "\t", path, _HINT)


def read_xlsx(data: bytes, path: Path) -> list[Row]:
    """Rows of the first sheet, named by its first row; rows without any cell are left out.

    Raises: ArtifactError if it is no .xlsx file, or two columns have one name.
    """
    import pandas

    try:
        sheet = pandas.read_excel(
            io.BytesIO(data), header=None, dtype=str, na_filter=False, engine="openpyxl"
        )
    except Exception as error:  # a damaged archive or part of one: whatever its readers raise
        raise _unreadable(path, error, _HINT) from error
    names, *rows = sheet.values.tolist() or [[]]
    shown = [name for name in names if name]
    if len(set(shown)) < len(shown):
        raise ArtifactError(f"{path}: two columns have one name", hint=_HINT)
    return [
        {name: str(cell) for name, cell in zip(names, row, strict=True) if name}
        for row in rows
        if any(row)
    ]


def _unreadable(path: Path, error: Exception, hint: str) -> ArtifactError:
    return ArtifactError(f"cannot read {path}: {' '.join(str(error).split())}", hint=hint)
