"""Blocks as HTML elements. All text is escaped here, and nowhere else."""

import html
from typing import TYPE_CHECKING, assert_never

from trapline.base.printable import printable
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

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from trapline.report.blocks import Block


def elements(blocks: "Iterable[Block]") -> "Iterator[str]":
    """Yield the markup of blocks, a line for each; items and terms are put into their lists."""
    around = ""
    for block in blocks:
        wanted = {Item: "ul", Term: "dl"}.get(type(block), "")
        if wanted != around:
            if around:
                yield f"</{around}>"
            if wanted:
                yield f"<{wanted}>"
            around = wanted
        yield from _element(block)
    if around:
        yield f"</{around}>"


def tag(name: str, *texts: object, kind: str = "") -> str:
    """Put texts into an element; `kind` is its class."""
    start = f'{name} class="{kind}"' if kind else name
    return f"<{start}>{''.join(map(escape, texts))}</{name}>"


def escape(value: object) -> str:
    """Make a value harmless in markup, and visible where it would not print."""
    shown = f"{value:,}" if isinstance(value, int) else printable(str(value))
    return html.escape(shown)


def _element(block: "Block") -> "Iterator[str]":  # noqa: C901, PLR0912 - a case for each kind
    match block:
        case Gap():
            return
        case Heading(text, level):
            yield tag(f"h{level + 1}", text)
        case Paragraph(text):
            yield tag("p", text)
        case Quote(text):
            yield tag("blockquote", text)
        case Item(text):
            yield tag("li", text)
        case Term(name, text):
            yield tag("dt", name.strip()) + tag("dd", text)
        case Table(header, rows, right):
            yield from _table(header, rows, right=right)
        case Matrix(columns, groups):
            for title, named in groups.items():
                counts: list[tuple[str | int, ...]] = [(each, *of_it) for each, of_it in named]
                yield from _table((title, *columns), counts, right=True)
        case Code():
            yield "<pre>" + "\n".join(map(_line, block.lines)) + "</pre>"
        case Strip():
            yield from _strip(block)
        case Details(summary, inside):
            yield f"<details>{tag('summary', summary)}"
            yield from elements(inside)
            yield "</details>"
        case _:
            assert_never(block)


def _line(text: str) -> str:
    return html.escape(printable(text))


def _table(
    header: "Sequence[str]", rows: "Sequence[Sequence[str | int]]", *, right: bool
) -> "Iterator[str]":
    numeric = [all(isinstance(row[i], int) for row in rows) for i in range(len(header))]
    kinds = ["n" if number or (right and i) else "" for i, number in enumerate(numeric)]
    yield '<div class="wide"><table><thead><tr>'
    yield "".join(tag("th", cell, kind=kind) for cell, kind in zip(header, kinds, strict=True))
    yield "</tr></thead><tbody>"
    for row in rows:
        cells = (tag("td", cell, kind=kind) for cell, kind in zip(row, kinds, strict=True))
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"


def _strip(block: Strip) -> "Iterator[str]":
    """Make a cell for each place, a name where it changes; the legend says what a mark means."""
    marks = sorted(set(block.marks) - {" "})
    yield '<div class="strip">'
    before = None
    for mark, name in zip(block.marks, block.names, strict=True):
        if name != before:
            yield tag("b", name)
            before = name
        quiet = " quiet" if mark in block.quiet or mark == " " else ""
        number = f"m{marks.index(mark)}" if mark in marks else "none"
        yield tag("i", mark, kind=f"{number}{quiet}")
    yield "</div>"
    yield '<dl class="legend">'
    for mark in marks:
        yield tag("dt", mark) + tag("dd", block.words.get(mark, "not tried"))
    yield "</dl>"
