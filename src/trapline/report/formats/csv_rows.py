"""The rows of a document as CSV (RFC 4180, but lines end with a newline), for a spreadsheet.

A spreadsheet takes a cell that begins with one of = + - @, a tab or a carriage return for a
formula, and the names in a kernel image may be hostile: such texts get an apostrophe in front.
What does not print, line ends above all, is escaped: a row is a line.
"""

import csv
import io
from typing import TYPE_CHECKING, Final

from trapline.base.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.results.document import ResultDocument
    from trapline.results.rows import Cell

_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


def render(document: "ResultDocument") -> "Iterator[bytes]":
    """Yield the header, then a line for each row, UTF-8."""
    yield line(document.columns())
    for row in document.rows():
        yield line(map(_cell, row.values()))


def line(cells: "Iterable[object]") -> bytes:
    """Write one line."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue().encode()


def _cell(value: "Cell") -> "Cell":
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return value
    return printable(f"'{value}" if value.startswith(_FORMULA) else value)
