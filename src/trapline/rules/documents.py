"""Rule tables as result documents: shown whole, or compared with another set."""

from dataclasses import fields
from typing import TYPE_CHECKING

from trapline.base.errors import UsageError
from trapline.results.rules import (
    Cell,
    ColumnChange,
    RuleChange,
    RuleProblem,
    RuleRow,
    RulesCompared,
    RulesLinted,
    RulesShown,
    RuleTable,
)
from trapline.rules.rows import Rule, Standing
from trapline.rules.ruleset import TABLES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.rules.ruleset import RuleSet
    from trapline.rules.tables import Problem

_COMMON = frozenset(column.name for column in fields(Rule))
# The module version differs between any two sets, and a place in a source may move.
_NOT_COMPARED = frozenset(("id", "module"))


def columns_of(kind: type[Rule]) -> tuple[str, ...]:
    """Name the columns that only this table has, in the order of the file."""
    return tuple(column.name for column in fields(kind) if column.name not in _COMMON)


def row_document(row: Rule) -> RuleRow:
    """Turn a row into its document."""
    return RuleRow(
        id=row.id,
        claimant=row.claimant.value,
        source=row.source,
        module=row.module,
        followed=row.followed,
        enforced=row.standing is Standing.ENFORCED,
        note=row.note,
        columns={name: _cell(row, name) for name in columns_of(type(row))},
    )


def shown(rules: "RuleSet", table: str | None) -> RulesShown:
    """Return one table, or all."""
    if table is not None and table not in TABLES:
        raise UsageError(f"no table {table!r}; there are {', '.join(TABLES)}.")
    names = TABLES if table is None else (table,)
    return RulesShown(
        module_version=rules.version,
        tables=tuple(
            RuleTable(
                name=name,
                key=TABLES[name].KEY,
                rows=tuple(row_document(row) for row in rules.table(name)),
            )
            for name in names
        ),
    )


def compared(old: "RuleSet", new: "RuleSet", old_name: str, new_name: str) -> RulesCompared:
    """Pair the rows of two sets by id and report what differs."""
    return RulesCompared(
        old=old_name,
        new=new_name,
        changes=tuple(
            change for name in TABLES for change in _changes(name, old.table(name), new.table(name))
        ),
    )


def _changes(
    name: str, old_rows: tuple[Rule, ...], new_rows: tuple[Rule, ...]
) -> "Iterator[RuleChange]":
    old, new = ({row.id: row for row in rows} for rows in (old_rows, new_rows))
    columns = [c.name for c in fields(TABLES[name]) if c.name not in _NOT_COMPARED]
    for row_id in (row_id for row_id in old if row_id not in new):
        cells = tuple(ColumnChange(column=c, old=_cell(old[row_id], c), new=None) for c in columns)
        yield RuleChange(table=name, id=row_id, change="removed", columns=cells)
    for row_id, row in new.items():
        before = old.get(row_id)
        cells = tuple(
            ColumnChange(
                column=c, old=None if before is None else _cell(before, c), new=_cell(row, c)
            )
            for c in columns
            if before is None or _cell(before, c) != _cell(row, c)
        )
        if cells:
            change = RuleChange(
                table=name,
                id=row_id,
                change="added" if before is None else "changed",
                columns=cells,
            )
            yield change


def _cell(row: Rule, name: str) -> Cell:
    value = getattr(row, name)
    cell: Cell = str(value) if isinstance(value, str) else value
    return cell


def linted(problems: "Iterable[Problem]", subject: str) -> RulesLinted:
    """Say what the linter found in what `subject` names."""
    return RulesLinted(
        subject=subject,
        problems=tuple(RuleProblem(table=p.table, line=p.line, text=p.text) for p in problems),
    )
