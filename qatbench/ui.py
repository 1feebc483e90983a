"""Everything that is printed: results on stdout, progress and errors on stderr. No torch here."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from qatbench.errors import QatbenchError

WIDTH = 100
QUIET_LINE_SECONDS = 15.0  # between progress lines where stderr is not a terminal


class Ui:
    """One command's output."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        # The stream objects of now: libraries that are silenced by redirection stay silenced,
        # this does not.
        self._err = Console(file=sys.stderr, highlight=False)
        self._out = Console(file=sys.stdout, width=WIDTH, highlight=False)

    def note(self, text: str) -> None:
        """Say something on stderr."""
        self._err.print(text, markup=False)

    def result(self, value: Mapping[str, Any], tables: Sequence[Table | str] = ()) -> None:
        """Print the result: one JSON object with --json, else tables and lines."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
            return
        for table in tables:
            self._out.print(table, markup=False, soft_wrap=isinstance(table, str))

    def next_command(self, text: str) -> None:
        """Name the command that usually follows."""
        self._err.print(f"next: {text}", markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self) -> Iterator[_Reporter]:
        """Show a stage's progress with an ETA, on stderr only."""
        if self._err.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
            )  # fmt: skip
            with Progress(*columns, console=self._err, transient=True) as bar:
                yield _Reporter(self._err, bar)
        else:
            yield _Reporter(self._err, None)


class _Reporter:
    """The callback that stages call: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, console: Console, bar: Progress | None) -> None:
        self._console, self._bar = console, bar
        self._task: TaskID | None = None
        self._what = ""
        self._since = self._said = time.monotonic()
        self._first = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        new = what != self._what
        if new:
            self._what, self._since, self._first = what, time.monotonic(), done
        if self._bar is not None:
            if new and self._task is not None:
                self._bar.remove_task(self._task)
            if new or self._task is None:
                self._task = self._bar.add_task(what, total=total or None)
            self._bar.update(self._task, completed=done, total=total or None)
        elif new or done == total or time.monotonic() - self._said > QUIET_LINE_SECONDS:
            self._said = time.monotonic()
            self._console.print(self._line(what, done, total), markup=False, soft_wrap=True)

    def _line(self, what: str, done: int, total: int) -> str:
        if not total:
            return what
        spent = time.monotonic() - self._since
        fresh = done - self._first
        eta = f", ETA {spent / fresh * (total - done):.0f} s" if fresh and done < total else ""
        return f"{what}: {done}/{total}{eta}"


def table(title: str, rows: Sequence[Mapping[str, str]], right: Sequence[str] = ()) -> Table:
    """A table from formatted rows; columns named in `right` are aligned to the right."""
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in rows[0] if rows else ():
        drawn.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row.values())
    return drawn


def report_error(error: QatbenchError) -> None:
    """`error:` and `hint:` on stderr."""
    sys.stderr.write(f"error: {error.message}\n")
    if error.hint:
        sys.stderr.write(f"hint: {error.hint}\n")
