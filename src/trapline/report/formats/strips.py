"""A strip of marks as text: rows of 64, names below where they begin, quiet rows folded."""

from collections import Counter
from typing import TYPE_CHECKING, Final

from trapline.base.printable import printable_ascii
from trapline.report.formats.layout import WIDTH, paragraph

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.report.blocks import Strip

_ROW: Final = 64
_LONG: Final = 3  # in strips of more rows, rows that are quiet are folded


def strip(block: "Strip") -> "Iterator[str]":
    """Yield the lines of a strip, rows where nothing is known left out."""
    marks = block.marks
    rows = [range(at, min(at + _ROW, len(marks))) for at in range(0, len(marks), _ROW)]
    quiet = block.quiet | {" "}
    folded: list[range] = []
    for row in rows:
        here = marks[row.start : row.stop]
        if not here.strip():
            continue
        if not block.whole and set(here) <= quiet and len(rows) > _LONG:
            folded.append(row)
            continue
        yield from _fold(block, folded)
        folded = []
        yield from _row(block, row)
    yield from _fold(block, folded)


def _fold(block: "Strip", folded: "list[range]") -> "Iterator[str]":
    """Show the first of several quiet rows, and how many more there are."""
    if not folded:
        return
    yield from _row(block, folded[0])
    if len(folded) > 1:
        rest = range(folded[1].start, folded[-1].stop)
        counts = Counter(block.marks[rest.start : rest.stop])
        said = ", ".join(
            f"{count:,} {block.words.get(mark, 'not tried')}"
            for mark, count in counts.most_common()
        )
        yield from paragraph(f"{rest.start:6}-{rest.stop - 1}: {said}", hanging=" " * 8)


def _row(block: "Strip", row: range) -> "Iterator[str]":
    yield f"{row.start:6}  {block.marks[row.start : row.stop]}"
    names = " " * 8
    for index in row:
        if index != row.start and block.names[index] == block.names[index - 1]:
            continue
        column = 8 + index - row.start
        if len(names) <= column:
            names = names.ljust(column) + printable_ascii(block.names[index]) + " "
    yield names.rstrip()[:WIDTH]
