"""What is said of two sets of rules: the rows that differ."""

from typing import TYPE_CHECKING

from trapline.report.blocks import Gap, Heading, Paragraph
from trapline.report.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.report.blocks import Block
    from trapline.results.rules import Cell, ColumnChange, RulesCompared


def page(compared: "RulesCompared", verbosity: int = 0) -> "Iterator[Block]":
    """Yield each row that differs with its cells."""
    del verbosity
    yield Paragraph(
        f"{compared.old} and {compared.new}: {counted(len(compared.changes), 'row')} differ"
        if compared.changes
        else f"{compared.old} and {compared.new}: no differences"
    )
    for change in compared.changes:
        yield Gap()
        yield Heading(f"{change.table}: {change.id} {change.change}")
        for column in change.columns:
            yield from _column(column, change.change)


def _column(column: "ColumnChange", change: str) -> "Iterator[Block]":
    old, new = _written(column.old), _written(column.new)
    text = {"added": new, "removed": old}.get(change, f"{old} -> {new}")
    if change != "changed" and text == "-":
        return
    yield Paragraph(f"{column.column}: {text}", indent=2, hanging=2)


def _written(value: "Cell") -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:#x}" if isinstance(value, int) and value > 9 else str(value)
