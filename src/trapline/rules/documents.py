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
from trapline.rules.rows import (
    CpuidKind,
    CpuidRule,
    FieldRule,
    MsrRule,
    Rule,
    Standing,
    TdcallRule,
    TdvmcallRule,
)
from trapline.rules.ruleset import TABLES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.rules.ruleset import RuleSet
    from trapline.rules.tables import Problem

_COMMON = frozenset(column.name for column in fields(Rule))
# The module version differs between any two sets, and a place in a source may move.
_TOLD = ("read_feature", "write_feature", "cpu_access", "special", "dynamic", "exit_reason")
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
        yield _change(name, old[row_id], None, cells)
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
            yield _change(name, before, row, cells)


def _change(
    name: str, old: Rule | None, new: Rule | None, cells: tuple[ColumnChange, ...]
) -> RuleChange:
    row = new or old
    assert row is not None
    told = {"standing", *type(row).ANSWER, *type(row).KEY, *_TOLD}
    return RuleChange(
        table=name,
        id=row.id,
        title=title_of(row),
        change="added" if old is None else "removed" if new is None else "changed",
        answers=old is None or new is None or any(cell.column in told for cell in cells),
        old=None if old is None else row_document(old),
        new=None if new is None else row_document(new),
        columns=cells,
    )


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


def title_of(row: Rule) -> str:
    """Say the question in the columns' own words."""
    if isinstance(row, MsrRule):
        return row.name if row.first is None else f"{row.name} ({_span(row)})"
    if isinstance(row, CpuidRule):
        if row.kind != CpuidKind.LEAF:
            return row.name
        subleaf = "" if row.subleaf is None else f".{row.subleaf:x}"
        return f"leaf {_span(row)}{subleaf}, {row.name}"
    parts = [row.name] if isinstance(row, TdcallRule | TdvmcallRule | FieldRule) else []
    for column in row.KEY:
        value = getattr(row, column)
        if isinstance(value, int):
            parts.append(f"{column} {value:#x}")
        elif value:
            parts.append(value if column == "name" else str(value).replace("_", " "))
    return ", ".join(parts)


def _span(row: MsrRule | CpuidRule) -> str:
    return f"{row.first:#x}" if row.first == row.last else f"{row.first:#x}-{row.last:#x}"
