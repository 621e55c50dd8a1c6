"""What is said of the rules of a TDX module: one table, or a list of the tables."""

from typing import TYPE_CHECKING

from trapline.report.blocks import Gap, Heading, Paragraph, Table
from trapline.report.pages.rule_words import (
    MSR_LEGEND,
    MSR_SHORT,
    answer,
    cpuid_answer,
    mask,
    msr_action,
    registers,
    span,
    tdvmcall_status,
)
from trapline.report.words import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trapline.report.blocks import Block
    from trapline.results.rules import Cell, RuleRow, RulesShown, RuleTable

    _Cells = Callable[[RuleRow], tuple[str | int, ...]]


def page(shown: "RulesShown", verbosity: int = 0) -> "Iterator[Block]":
    """Yield one table, or a list of the tables."""
    del verbosity
    if len(shown.tables) == 1:
        yield from _table(shown.tables[0], shown.module_version)
        return
    yield Heading(f"Rules of TDX module {shown.module_version}")
    yield Gap()
    rows = [
        (
            one.name,
            len(one.rows),
            sum(row.enforced for row in one.rows),
            sum(row.followed and not row.enforced for row in one.rows),
            sum(not row.followed for row in one.rows),
            ", ".join(one.key),
        )
        for one in shown.tables
    ]
    yield Table(("table", "rows", "enforced", "described", "claimed", "asked by"), tuple(rows))
    yield Gap()
    yield Paragraph(
        "Enforced: the software TD takes its answer from the row. Described: true and sourced, "
        "and nothing here asks it. Claimed: what somebody says besides."
    )


def _table(one: "RuleTable", version: str) -> "Iterator[Block]":
    others = sum(not row.enforced for row in one.rows)
    yield Heading(f"{one.name}, TDX module {version}: {counted(len(one.rows), 'row')}")
    yield Gap()
    header, cells = _layout(one)
    marked = [(*cells(row), _mark(row)) for row in one.rows]
    if others:
        yield Table((*header, "not enforced"), tuple(marked))
        yield Gap()
        yield Paragraph(
            "Without a word in the last column: the software TD takes its answer from the row. "
            "'described': true, and not asked by it. A name: what that source says besides."
        )
    else:
        yield Table(header, tuple(row[:-1] for row in marked))
    if one.name == "msrs":
        yield Gap()
        yield Paragraph(MSR_LEGEND)
    yield Gap()
    yield Paragraph(
        "Sources and notes: 'trapline rules explain', or this command with --format csv."
    )


def _mark(row: "RuleRow") -> str:
    if row.enforced:
        return ""
    return "described" if row.followed else row.claimant


def _layout(one: "RuleTable") -> "tuple[tuple[str, ...], _Cells]":
    if one.name == "msrs":
        return ("MSR", "index", "RDMSR", "WRMSR"), _msr_cells
    if one.name == "cpuid":
        return ("leaf", "what", "answer", "dynamic"), _cpuid_cells
    if one.name == "fields":
        return ("scope", "field", "identifier", "elements", "guest reads", "writes"), _field_cells
    if one.name == "tdvmcalls":
        return ("function", "name", "case", "status", "registers"), _tdvmcall_cells
    return (*one.key, "answer"), lambda row: (
        *(_cell(row.columns[name]) for name in one.key),
        answer(one.name, row),
    )


def _msr_cells(row: "RuleRow") -> tuple[str, ...]:
    columns = row.columns
    read, write = (msr_action(columns, way, MSR_SHORT) for way in ("read", "write"))
    return str(columns["name"]), span(columns), read, write


def _cpuid_cells(row: "RuleRow") -> tuple[str, ...]:
    columns = row.columns
    leaves = span(columns)
    if columns["subleaf"] is not None:
        leaves += f".{columns['subleaf']:x}"
    return leaves, str(columns["name"]), cpuid_answer(columns), str(columns["dynamic"])


def _tdvmcall_cells(row: "RuleRow") -> tuple[str, ...]:
    columns = row.columns
    function = columns["function"]
    return (
        "other" if function is None else f"{function:#x}",
        str(columns["name"]),
        str(columns["case"]),
        tdvmcall_status(columns),
        registers(columns),
    )


def _field_cells(row: "RuleRow") -> tuple[str | int, ...]:
    columns = row.columns
    elements = columns["elements"]
    assert isinstance(elements, int)
    return (
        str(columns["scope"]),
        str(columns["name"]),
        f"{columns['code']:#018x}",
        elements,
        mask(columns["read_mask"]),
        mask(columns["write_mask"]),
    )


def _cell(value: "Cell") -> str | int:
    if value is None:
        return "any"
    return value if isinstance(value, int) and not isinstance(value, bool) else str(value)
