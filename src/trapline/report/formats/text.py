"""Blocks as plain text, ready to be pasted into a mail: 80 columns, ASCII, no escape sequences.

Everything printed comes from a kernel image, which may be hostile: control characters and
whatever is not ASCII are written as escapes, so that no symbol name can drive a terminal.
"""

from typing import TYPE_CHECKING, assert_never

from trapline.base.printable import encode_line, printable_ascii
from trapline.report.blocks import (
    Code,
    Details,
    Gap,
    Heading,
    Item,
    Matrix,
    Paragraph,
    Quote,
    Strip,
    Table,
    Term,
)
from trapline.report.formats.layout import code, matrix, paragraph, ranged, table
from trapline.report.formats.strips import strip

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.report.blocks import Block


def render(blocks: "Iterable[Block]") -> "Iterator[bytes]":
    """Yield the report line by line."""
    for line in lines(blocks):
        yield encode_line(line)


def lines(blocks: "Iterable[Block]") -> "Iterator[str]":
    """Yield the report's lines without their ends."""
    for block in blocks:
        yield from _block(block)


def _block(block: "Block") -> "Iterator[str]":  # noqa: C901 - a case for each kind of block
    match block:
        case Code():  # first, as a listing is of nothing else
            yield from code(block)
        case Gap():
            yield ""
        case Heading(text, level):
            yield from _heading(printable_ascii(text), level)
        case Paragraph(text, indent, hanging):
            yield from paragraph(text, indent=" " * indent, hanging=" " * (indent + hanging))
        case Quote(text):
            yield from paragraph(text, indent="> ")
        case Item(text, indent):
            margin = " " * indent
            yield from paragraph(text, indent=f"{margin}- ", hanging=f"{margin}  ")
        case Term(name, text, indent, width):
            margins = {"indent": " " * indent, "hanging": " " * (indent + width)}
            yield from paragraph(f"{name:{width}}{text}", **margins)
        case Table(header, rows, right):
            yield from (ranged if right else table)(header, rows)
        case Matrix(columns, groups):
            yield from matrix(columns, groups)
        case Strip():
            yield from strip(block)
        case Details(_, blocks, indent):
            yield from (" " * indent + line for line in lines(blocks))
        case _:
            assert_never(block)


def _heading(text: str, level: int) -> "Iterator[str]":
    yield text
    if level == 1:
        yield "=" * len(text)
