"""How a rule is told in a few words, in tables and in explanations."""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from trapline.results.rules import Cell, RuleRow

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
_LINUX: Final = {"asks_host": "asks the host", "zeros": "gives zeros", "refuses": "refuses"}
MSR_ACTIONS: Final = {
    "native": "native",
    "ve": "#VE",
    "gp": "#GP(0)",
    "emulated": "module answers",
    "native_unless_gp": "native if {feature}, else #GP(0)",
    "native_unless_emulated": "native if {feature}, else module answers",
    "gp_unless_ve": "#VE if {feature}, else #GP(0)",
    "ve_unless_gp": "#GP(0) if {feature}, else #VE",
    "ve_unless_emulated": "module answers if {feature}, else #VE",
}
# The same, short enough for a table that has a legend.
MSR_SHORT: Final = {
    **MSR_ACTIONS,
    "emulated": "module",
    "native_unless_gp": "{feature} *",
    "native_unless_emulated": "{feature} +",
    "gp_unless_ve": "{feature} -",
    "ve_unless_gp": "{feature} !",
    "ve_unless_emulated": "{feature} =",
}
MSR_LEGEND: Final = (
    "With the feature that is named: * native, without it #GP(0); + native, without it the "
    "module answers; - #VE, without it #GP(0); ! #GP(0), without it #VE; = the module answers, "
    "without it #VE."
)


def answer(name: str, row: "RuleRow") -> str:
    """Say in a few words what the row answers."""
    columns = row.columns
    if name == "msrs":
        text = f"RDMSR {msr_action(columns, 'read')}; WRMSR {msr_action(columns, 'write')}"
        only = {"read": ", read-only", "write": ", write-only"}.get(str(columns["cpu_access"]), "")
        return text + only
    if name == "cpuid":
        text = cpuid_answer(columns)
        return f"{text}; {columns['dynamic']}" if columns["dynamic"] else text
    if name == "tdcalls":
        return _tdcall_answer(columns)
    if name == "tdvmcalls":
        parts = (tdvmcall_status(columns), registers(columns))
        return "; ".join(part for part in parts if part)
    if name == "statuses":
        return f"{columns['value']:#018x}" if columns["kind"] != "operand" else _cell_of(columns)
    if name == "linux":
        case = str(columns["condition"]).replace("_", " ")
        does = _LINUX[str(columns["does"])]
        return f"{does}{'' if case == 'always' else f' ({case})'}, since {columns['since']}"
    if name == "attributes":
        return f"bit {columns['bit']}"
    if name == "fields":
        return (
            f"{columns['code']:#018x}, {columns['elements']} x u64 or less, guest reads "
            f"{mask(columns['read_mask'])}, writes {mask(columns['write_mask'])}"
        )
    outcome = str(columns["outcome"])
    text = _OUTCOMES.get(outcome, outcome.replace("_", " "))
    reason = columns.get("exit_reason")
    return text if reason is None else f"{text}, exit reason {reason}"


def _tdcall_answer(columns: "dict[str, Cell]") -> str:
    status = str(columns["status"])
    text = _OUTCOMES.get(status, status)
    return text + (f" | {columns['operand']}" if columns["operand"] else "")


def tdvmcall_status(columns: "dict[str, Cell]") -> str:
    """Write a status of a TDVMCALL without what all of them begin with."""
    return str(columns["status"]).removeprefix("TDVMCALL_STATUS_")


def registers(columns: "dict[str, Cell]") -> str:
    """Say which registers a TDVMCALL takes and gives."""
    if not columns["inputs"]:
        return ""
    return f"in: {columns['inputs']}; out: {columns['outputs']}"


def cpuid_answer(columns: "dict[str, Cell]") -> str:
    """Say who answers a CPUID leaf."""
    if columns["outcome"] == "ve":
        if not columns["control"]:
            return "#VE"
        text = f"#VE without {str(columns['control']).upper()}, else module"
        return text + (f" unless {str(columns['feature']).upper()}" if columns["feature"] else "")
    return "module, configurable" if columns["configurable"] else "module"


def msr_action(columns: "dict[str, Cell]", way: str, words: "dict[str, str]" = MSR_ACTIONS) -> str:
    """Say what an access of an MSR does; `way` is "read" or "write"."""
    feature = str(columns[f"{way}_feature"]).replace("_", " ").upper()
    return words[str(columns[way])].format(feature=feature)


def span(columns: "dict[str, Cell]") -> str:
    """Write the range of numbers that a row is about."""
    first, last = columns["first"], columns["last"]
    if first is None:
        return "-"
    return f"{first:#x}" if first == last else f"{first:#x}-{last:#x}"


def mask(value: "Cell") -> str:
    """Write which bits of a field can be accessed."""
    if value == (1 << 64) - 1:
        return "all"
    return "-" if not value else f"{value:#x}"


def _cell_of(columns: "dict[str, Cell]") -> str:
    return f"operand {columns['value']}"
