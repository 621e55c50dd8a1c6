"""The rows of a document as CSV (RFC 4180, but lines end with a newline), for a spreadsheet.

A spreadsheet takes a cell that begins with one of = + - @, a tab or a carriage return for a
formula, and the names in a kernel image may be hostile: such texts get an apostrophe in front.
"""

import csv
import io
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.results.document import ResultDocument
    from trapline.results.rows import Cell

_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


def render(document: "ResultDocument") -> "Iterator[bytes]":
    """Yield the header, then a line for each row, UTF-8; nothing where there is no row."""
    rows = document.rows()
    if rows:
        yield line(rows[0])
    for row in rows:
        yield line(map(_cell, row.values()))


def line(cells: "Iterable[object]") -> bytes:
    """Write one line."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    # Names of files may hold bytes that are not UTF-8, which Python keeps as lone surrogates.
    return buffer.getvalue().encode("utf-8", "backslashreplace")


def _cell(value: "Cell") -> "Cell":
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return value
    return f"'{value}" if value.startswith(_FORMULA) else value
