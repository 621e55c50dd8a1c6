"""A rule table as CSV, in the form that `trapline rules lint` and `diff` read."""

from typing import TYPE_CHECKING, Final

from trapline.report.formats.csv_rows import line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.results.rules import Cell, RulesShown

_HEXADECIMAL: Final = frozenset(
    ("first", "last", "subleaf", "function", "value", "code", "read_mask", "write_mask")
)


def render(shown: "RulesShown") -> "Iterator[bytes]":
    """Yield the one table of the document."""
    (table,) = shown.tables
    columns = list(table.rows[0].columns) if table.rows else []
    header = ["id", *columns, "module", "claimant", "source", "standing", "note"]
    yield line(header)
    for row in table.rows:
        cells = [_written(name, row.columns[name]) for name in columns]
        standing = "enforced" if row.enforced else "described" if row.followed else "claimed"
        common = [row.module, row.claimant, row.source, standing, row.note]
        yield line([row.id, *cells, *common])


def _written(column: str, value: "Cell") -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and column in _HEXADECIMAL:
        return f"{value:#x}" if column != "code" else f"{value:#018x}"
    return "" if value is None else str(value)
