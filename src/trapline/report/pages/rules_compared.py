"""What is said of two sets of rules: what a guest sees that changed, table by table."""

from typing import TYPE_CHECKING, Final

from trapline.report.blocks import Gap, Heading, Paragraph
from trapline.report.pages.rule_words import answer
from trapline.report.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.report.blocks import Block
    from trapline.results.rules import RuleChange, RuleRow, RulesCompared

_NAMES: Final = {
    "instructions": "Instructions and events",
    "msrs": "MSRs",
    "cpuid": "CPUID leaves",
    "memory": "Memory accesses",
    "tdcalls": "TDCALL leaves",
    "tdvmcalls": "TDVMCALL functions",
    "statuses": "Completion codes and statuses",
    "nesting": "Events that meet",
    "attributes": "Attributes and controls",
    "fields": "Metadata fields",
    "linux": "What Linux does with a #VE",
}


def page(compared: "RulesCompared", verbosity: int = 0) -> "Iterator[Block]":
    """Yield the rows whose answers changed, by table, and count those with other words only."""
    del verbosity
    told = [change for change in compared.changes if change.answers]
    quiet = len(compared.changes) - len(told)
    if not compared.changes:
        yield Paragraph(f"{compared.old} and {compared.new}: no differences")
        return
    yield Paragraph(
        f"From {compared.old} to {compared.new}: {counted(len(told), 'rule')} with another answer"
        + (f", and {quiet} with another source or note only" if quiet else "")
    )
    for table in dict.fromkeys(change.table for change in told):
        yield Gap()
        yield Heading(_NAMES.get(table, table))
        for change in (each for each in told if each.table == table):
            yield from _entry(change)


def _entry(change: "RuleChange") -> "Iterator[Block]":
    old, new = (_words(change.table, row) for row in (change.old, change.new))
    if old is None:
        text = f"new: {new}"
    elif new is None:
        text = f"gone (was: {old})"
    elif old != new:
        text = f"{old} -> {new}"
    else:
        text = "; ".join(
            f"{cell.column}: {_written(cell.old)} -> {_written(cell.new)}"
            for cell in change.columns
            if cell.column not in {"source", "note", "claimant", "index"}
        )
    yield Paragraph(f"{change.title}: {text}", indent=2, hanging=2)
    note = None if change.new is None else change.new.note
    if note and (change.old is None or note != change.old.note):
        yield Paragraph(note, indent=6)


def _words(table: str, row: "RuleRow | None") -> str | None:
    if row is None:
        return None
    standing = "" if row.enforced else " [described]" if row.followed else f" [{row.claimant}]"
    return answer(table, row) + standing


def _written(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:#x}" if isinstance(value, int) and value > 9 else str(value)
