"""Texts laid out in the 80 columns of a mail: paragraphs, tables, lines of code.

Control characters and whatever is not ASCII are written as escapes on the way.
"""

import textwrap
from typing import TYPE_CHECKING

from trapline.base.printable import printable_ascii

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from trapline.report.blocks import Code

WIDTH = 80
_GAP = 2
_LABEL = 18  # columns of a matrix that hold the names of its rows
_NARROWEST = 8  # no column is squeezed below this many characters


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


def ranged(header: "Sequence[str]", rows: "Sequence[Sequence[str | int]]") -> "Iterator[str]":
    """Lay out with all columns but the first to the right, each as wide as it needs."""
    cells = [
        [f"{c:,}" if isinstance(c, int) else printable_ascii(c) for c in row]
        for row in (header, *rows)
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in (cells[0], ["-" * width for width in widths], *cells[1:]):
        first, *others = row
        parts = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield (" " * _GAP).join((first.ljust(widths[0]), *parts)).rstrip()


def matrix(
    columns: "Sequence[str]", groups: "Mapping[str, Sequence[tuple[str, Sequence[int]]]]"
) -> "Iterator[str]":
    """Lay out counts; the title of a group stands above its rows."""
    numbers = [[f"{n:,}" for n in counts] for rows in groups.values() for _, counts in rows]
    widths = [max(len(row[i]) for row in (columns, *numbers)) for i in range(len(columns))]
    heads = (head.rjust(width) for head, width in zip(columns, widths, strict=True))
    yield " ".join((" " * _LABEL, *heads))
    for title, rows in groups.items():
        yield printable_ascii(title)
        for name, counts in rows:
            cells = (f"{n:{width},}" for n, width in zip(counts, widths, strict=True))
            yield " ".join((printable_ascii(f"  {name}").ljust(_LABEL), *cells))


def code(block: "Code") -> "Iterator[str]":
    """Yield the lines, those that are too long as the block wants them."""
    for line in block.lines:
        text = printable_ascii(" " * block.indent + line)
        if len(text) <= WIDTH or block.long == "keep":
            yield text
        elif block.long == "cut":
            yield text[:WIDTH]
        else:
            yield from _wrapped(text)


def _wrapped(text: str) -> "Iterator[str]":
    """Break only what does not fit, and then anywhere: paths and names have no spaces."""
    indent = len(text) - len(text.lstrip(" "))
    while len(text) > WIDTH:
        cut = text.rfind(" ", indent + 1, WIDTH + 1)
        cut = cut if cut > indent + 8 else WIDTH
        yield text[:cut]
        text = " " * (indent + 4) + text[cut:].lstrip(" ")
    yield text
