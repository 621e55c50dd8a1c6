"""Rules shown, explained, compared and linted, as plain text of 80 columns."""

from typing import TYPE_CHECKING, Final

from trapline.report.table import counted, paragraph, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.results.rules import (
        Cell,
        ColumnChange,
        RuleQuestion,
        RuleRow,
        RulesCompared,
        RulesExplained,
        RulesLinted,
        RulesShown,
        RuleTable,
    )

_OUTCOMES: Final = {
    "native": "native, no exit",
    "emulated": "the module carries it out",
    "ve": "#VE",
    "gp": "#GP(0)",
    "ud": "#UD",
    "pf": "#PF",
    "df": "#DF(0)",
    "triple_fault": "triple fault",
    "td_exit": "TD exit to the VMM",
    "td_fatal": "TD exit, the TD or VCPU cannot be entered again",
    "module_fatal": "fatal error of the module",
    "see_cpuid": "see 'trapline rules show cpuid'",
    "see_msrs": "see 'trapline rules show msrs'",
    "see_tdcalls": "see 'trapline rules show tdcalls'",
    "rf_set": "RFLAGS.RF set",
    "loop": "no progress",
}
_MSR_ACTIONS: Final = {
    "native": "native",
    "ve": "#VE",
    "gp": "#GP(0)",
    "emulated": "module answers",
    "native_unless_gp": "native if {feature}, else #GP(0)",
    "native_unless_emulated": "native if {feature}, else module answers",
    "gp_unless_ve": "#VE if {feature}, else #GP(0)",
}
# The same, short enough for a table that has a legend.
_MSR_SHORT: Final = {
    **_MSR_ACTIONS,
    "emulated": "module",
    "native_unless_gp": "{feature} *",
    "native_unless_emulated": "{feature} +",
    "gp_unless_ve": "{feature} -",
}
_MSR_LEGEND: Final = (
    "With the feature that is named: * native, without it #GP(0); + native, without it the "
    "module answers; - #VE, without it #GP(0)."
)
_INDENT: Final = " " * 11


def render_shown(shown: "RulesShown", verbosity: int = 0) -> "Iterator[bytes]":
    """Yield one table, or a list of the tables."""
    del verbosity
    yield from _encoded(_shown_lines(shown))


def render_explained(explained: "RulesExplained", verbosity: int = 0) -> "Iterator[bytes]":
    """Yield each question with its answers, the followed one first."""
    del verbosity
    yield from _encoded(_explained_lines(explained))


def render_compared(compared: "RulesCompared", verbosity: int = 0) -> "Iterator[bytes]":
    """Yield each row that differs with its cells."""
    del verbosity
    yield from _encoded(_compared_lines(compared))


def render_problems(linted: "RulesLinted", verbosity: int = 0) -> "Iterator[bytes]":
    """Yield what the linter found, or one line that says that all is well."""
    del verbosity
    texts = [f"{one.table}.csv:{one.line}: {one.text}" for one in linted.problems]
    for text in texts or [f"{linted.subject}: no problems."]:
        yield from _encoded(paragraph(text, hanging="    "))


def _encoded(lines: "Iterable[str]") -> "Iterator[bytes]":
    for line in lines:
        yield line.encode("ascii", "backslashreplace") + b"\n"


# Tables.


def _shown_lines(shown: "RulesShown") -> "Iterator[str]":
    if len(shown.tables) == 1:
        yield from _table_lines(shown.tables[0], shown.module_version)
        return
    yield f"Rules of TDX module {shown.module_version}"
    yield ""
    rows = [
        (
            one.name,
            len(one.rows),
            sum(not row.followed for row in one.rows),
            ", ".join(one.key),
        )
        for one in shown.tables
    ]
    yield from table(("table", "rows", "not followed", "asked by"), rows)


def _table_lines(one: "RuleTable", version: str) -> "Iterator[str]":
    others = sum(not row.followed for row in one.rows)
    yield f"{one.name}, TDX module {version}: {counted(len(one.rows), 'row')}"
    yield ""
    header, cells = _layout(one)
    marked = [(*cells(row), "" if row.followed else row.claimant) for row in one.rows]
    if others:
        yield from table((*header, "only says"), marked)
        yield ""
        yield from paragraph(
            "Rows with a name in the last column are what that source says; the software TD "
            "does not follow them."
        )
    else:
        yield from table(header, [row[:-1] for row in marked])
    if one.name == "msrs":
        yield ""
        yield from paragraph(_MSR_LEGEND)
    yield ""
    yield from paragraph(
        "Sources and notes: 'trapline rules explain', or this command with --format csv."
    )


def _layout(one: "RuleTable") -> "tuple[tuple[str, ...], _Cells]":
    if one.name == "msrs":
        return ("MSR", "index", "RDMSR", "WRMSR"), _msr_cells
    if one.name == "cpuid":
        return ("leaf", "what", "answer", "dynamic"), _cpuid_cells
    if one.name == "fields":
        return ("scope", "field", "identifier", "elements", "guest reads", "writes"), _field_cells
    if one.name == "tdvmcalls":
        return ("function", "name", "registers"), _tdvmcall_cells
    return (*one.key, "answer"), lambda row: (
        *(_cell(row.columns[name]) for name in one.key),
        _answer(one.name, row),
    )


if TYPE_CHECKING:
    from collections.abc import Callable

    _Cells = Callable[[RuleRow], tuple[str | int, ...]]


def _msr_cells(row: "RuleRow") -> tuple[str, ...]:
    columns = row.columns
    span = _span(columns)
    read, write = (_msr_action(columns, way, _MSR_SHORT) for way in ("read", "write"))
    return str(columns["name"]), span, read, write


def _cpuid_cells(row: "RuleRow") -> tuple[str, ...]:
    columns = row.columns
    span = _span(columns)
    if columns["subleaf"] is not None:
        span += f".{columns['subleaf']:x}"
    return span, str(columns["name"]), _cpuid_answer(columns), str(columns["dynamic"])


def _tdvmcall_cells(row: "RuleRow") -> tuple[str, ...]:
    columns = row.columns
    return f"{columns['function']:#x}", str(columns["name"]), _answer("tdvmcalls", row)


def _field_cells(row: "RuleRow") -> tuple[str | int, ...]:
    columns = row.columns
    elements = columns["elements"]
    assert isinstance(elements, int)
    return (
        str(columns["scope"]),
        str(columns["name"]),
        f"{columns['code']:#018x}",
        elements,
        _mask(columns["read_mask"]),
        _mask(columns["write_mask"]),
    )


# Explanations.


def _explained_lines(explained: "RulesExplained") -> "Iterator[str]":
    disputed = sum(question.is_disputed for question in explained.questions)
    summary = f"{explained.subject}, TDX module {explained.module_version}: "
    summary += counted(len(explained.questions), "rule")
    if disputed:
        summary += f", {disputed} disputed"
    yield from paragraph(summary)
    for question in explained.questions:
        yield ""
        yield from _question_lines(question)


def _question_lines(question: "RuleQuestion") -> "Iterator[str]":
    yield from paragraph(f"{question.table}: {question.title}")
    for answer in question.answers:
        row = answer.row
        word = "follows" if row.followed else "agrees" if answer.agrees else "DIFFERS"
        yield from paragraph(
            f"  {word:<7}  {_answer(question.table, row)}  [{row.claimant}]", hanging=_INDENT
        )
        yield from paragraph(row.source, indent=_INDENT)
        if row.note:
            yield from paragraph(row.note, indent=_INDENT)


def _answer(name: str, row: "RuleRow") -> str:
    """Say in a few words what the row answers."""
    columns = row.columns
    if name == "msrs":
        text = f"RDMSR {_msr_action(columns, 'read')}; WRMSR {_msr_action(columns, 'write')}"
        only = {"read": ", read-only", "write": ", write-only"}.get(str(columns["cpu_access"]), "")
        return text + only
    if name == "cpuid":
        text = _cpuid_answer(columns)
        return f"{text}; {columns['dynamic']}" if columns["dynamic"] else text
    if name == "tdcalls":
        return _tdcall_answer(columns)
    if name == "tdvmcalls":
        kvm = "KVM answers it" if columns["kvm"] else "KVM does not answer it"
        return f"in: {columns['inputs']}; out: {columns['outputs']}; {kvm}"
    if name == "statuses":
        return f"{columns['value']:#018x}" if columns["kind"] != "operand" else _cell_of(columns)
    if name == "attributes":
        return f"bit {columns['bit']}"
    if name == "fields":
        return (
            f"{columns['code']:#018x}, {columns['elements']} x u64 or less, guest reads "
            f"{_mask(columns['read_mask'])}, writes {_mask(columns['write_mask'])}"
        )
    outcome = str(columns["outcome"])
    text = _OUTCOMES.get(outcome, outcome.replace("_", " "))
    reason = columns.get("exit_reason")
    return text if reason is None else f"{text}, exit reason {reason}"


def _tdcall_answer(columns: "dict[str, Cell]") -> str:
    status = str(columns["status"])
    text = _OUTCOMES.get(status, status)
    if columns["operand"]:
        text += f" | {columns['operand']}"
    return text + {"no": " (not modelled)", "partly": " (modelled in part)"}.get(
        str(columns["modelled"]), ""
    )


def _cpuid_answer(columns: "dict[str, Cell]") -> str:
    if columns["outcome"] == "ve":
        return "#VE"
    return "module, configurable" if columns["configurable"] else "module"


def _msr_action(
    columns: "dict[str, Cell]", way: str, words: "dict[str, str]" = _MSR_ACTIONS
) -> str:
    feature = str(columns[f"{way}_feature"]).replace("_", " ").upper()
    return words[str(columns[way])].format(feature=feature)


def _span(columns: "dict[str, Cell]") -> str:
    first, last = columns["first"], columns["last"]
    if first is None:
        return "-"
    return f"{first:#x}" if first == last else f"{first:#x}-{last:#x}"


def _mask(value: "Cell") -> str:
    if value == (1 << 64) - 1:
        return "all"
    return "-" if not value else f"{value:#x}"


def _cell_of(columns: "dict[str, Cell]") -> str:
    return f"operand {columns['value']}"


def _cell(value: "Cell") -> str | int:
    if value is None:
        return "any"
    return value if isinstance(value, int) and not isinstance(value, bool) else str(value)


# Differences.


def _compared_lines(compared: "RulesCompared") -> "Iterator[str]":
    yield from paragraph(
        f"{compared.old} and {compared.new}: {counted(len(compared.changes), 'row')} differ"
        if compared.changes
        else f"{compared.old} and {compared.new}: no differences"
    )
    for change in compared.changes:
        yield ""
        yield f"{change.table}: {change.id} {change.change}"
        for column in change.columns:
            yield from _column_lines(column, change.change)


def _column_lines(column: "ColumnChange", change: str) -> "Iterator[str]":
    old, new = _written(column.old), _written(column.new)
    text = {"added": new, "removed": old}.get(change, f"{old} -> {new}")
    if change != "changed" and text == "-":
        return
    yield from paragraph(f"  {column.column}: {text}", hanging="    ")


def _written(value: "Cell") -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:#x}" if isinstance(value, int) and value > 9 else str(value)
