"""Plain-text tables and paragraphs that never exceed the width of a mail.

Everything printed comes from a kernel image, which may be hostile: control characters and
whatever is not ASCII are written as escapes, so that no symbol name can drive a terminal.
"""

import textwrap
from typing import TYPE_CHECKING

from trapline.base.printable import printable_ascii

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WIDTH = 80
_GAP = 2
_NARROWEST = 8  # no column is squeezed below this many characters


def counted(number: int, noun: str) -> str:
    """Write a count with its noun: "1 site", "1,138 modules"."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def paragraph(text: str, *, indent: str = "", hanging: str | None = None) -> "Iterator[str]":
    """Fill one paragraph to the width; `hanging` indents all lines but the first."""
    yield from textwrap.wrap(
        printable_ascii(text),
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent if hanging is None else hanging,
        break_long_words=True,
        break_on_hyphens=False,
    )


def table(header: "Sequence[str]", rows: "Sequence[Sequence[str | int]]") -> "Iterator[str]":
    """Lay out rows under a header; numbers to the right, texts to the left.

    If the table is too wide, its widest text columns are narrowed and their cells wrapped.
    """
    if not rows:
        return
    numeric = [all(isinstance(row[i], int) for row in rows) for i in range(len(header))]
    cells = [
        [f"{c:,}" if isinstance(c, int) else printable_ascii(c) for c in row]
        for row in (header, *rows)
    ]
    widths = _fit([max(len(row[i]) for row in cells) for i in range(len(header))], numeric)
    yield from _row(cells[0], widths, numeric)
    yield (" " * _GAP).join("-" * width for width in widths)
    for row in cells[1:]:
        yield from _row(row, widths, numeric)


def _fit(widths: list[int], numeric: list[bool]) -> list[int]:
    widths = list(widths)
    excess = sum(widths) + _GAP * (len(widths) - 1) - WIDTH
    while excess > 0:
        texts = [i for i in range(len(widths)) if not numeric[i] and widths[i] > _NARROWEST]
        if not texts:
            break  # more columns than any report has: a mistake of the caller, caught by tests
        widest = max(texts, key=lambda i: (widths[i], i))  # of equals, the last
        widths[widest] -= 1
        excess -= 1
    return widths


def _row(cells: "Sequence[str]", widths: list[int], numeric: list[bool]) -> "Iterator[str]":
    wrapped = [
        textwrap.wrap(cell, width, break_on_hyphens=False) or [""]
        for cell, width in zip(cells, widths, strict=True)
    ]
    for n in range(max(len(lines) for lines in wrapped)):
        parts = []
        for lines, width, right in zip(wrapped, widths, numeric, strict=True):
            text = lines[n] if n < len(lines) else ""
            parts.append(text.rjust(width) if right else text.ljust(width))
        yield (" " * _GAP).join(parts).rstrip()
