"""Finds the rules about one subject: an instruction, an MSR, a leaf, a status, an event.

What can be asked for:

    HLT, "MOV CR0", IN            an instruction or event of the table instructions
    msr:0x6e0, IA32_TSC_DEADLINE  an MSR by index or name; RDMSR 0x6e0, WRMSR 0x6e0
    cpuid:0x1f, cpuid:4.2         a CPUID leaf, with a sub-leaf; cpuid 0xb
    port:0x71                     what IN and OUT of a port come to
    tdcall:6, TDG.VP.INFO         a TDCALL leaf
    tdvmcall:0x10001, MapGPA      a TDVMCALL function
    memory:pending                accesses to pages in a state, or to a half of the GPA space
    status:0xc000010000000001     a completion code or TDVMCALL status, by name or value
    second-ve, nmi                a question of the table nesting
    TD_CTLS, SEPT_VE_DISABLE      an attribute bit or metadata field
    nmi-held, sdm-rflags-if       a row by the id that reports print

A number alone is what only one table knows: an MSR, a CPUID leaf, a TDCALL leaf or a TDVMCALL
function. What #VE a rule comes to, Linux handles by the table linux, which is told with it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from trapline.base.errors import UsageError
from trapline.base.nearest import nearest
from trapline.results.rules import RuleAnswer, RuleQuestion, RulesExplained
from trapline.rules.documents import row_document, title_of
from trapline.rules.rows import (
    CpuidKind,
    CpuidOutcome,
    CpuidRule,
    Feature,
    InstructionRule,
    LinuxRule,
    MemoryRule,
    MsrAction,
    MsrKind,
    MsrRule,
    Outcome,
    Rule,
)
from trapline.rules.ruleset import TABLES

if TYPE_CHECKING:
    from trapline.rules.ruleset import RuleSet

Found = list[tuple[str, Rule]]  # table and row
_CPUID, _RDMSR, _WRMSR = 10, 31, 32  # exit reasons
_BITMAPS: Final = (range(0x2000), range(0xC000_0000, 0xC000_2000))
_MAX_SUBJECT: Final = 200
_MAX_INDEX: Final = 0xFFFF_FFFF
_MAX_PORT: Final = 0xFFFF
_IO_CALL: Final = 30  # Instruction.IO
_HOST_LEAVES: Final = range(0x4000_0000, 0x5000_0000)
_EXTENDED: Final = range(0x8000_0000, 0x8000_0009)


def explain(rules: "RuleSet", subject: str) -> RulesExplained:
    """Return every rule about `subject`, grouped by the question it answers."""
    if len(subject) > _MAX_SUBJECT:
        raise UsageError("what to explain is too long; name one instruction, MSR or leaf.")
    found = _find(rules, subject.strip())
    if not found:
        raise UsageError(_unknown(rules, subject))
    questions: dict[tuple[str, tuple[object, ...]], list[Rule]] = defaultdict(list)
    for table, row in found:
        questions[table, row.key].append(row)
    return RulesExplained(
        module_version=rules.version,
        subject=subject,
        questions=tuple(_question(rules, table, rows) for (table, _), rows in questions.items()),
    )


def _find(rules: "RuleSet", subject: str) -> Found:
    prefix, colon, rest = subject.partition(":")
    if not colon:
        prefix, _, rest = subject.partition(" ")
    finder = _PREFIXES.get(prefix.lower())
    if finder is not None and rest and (colon or _number(rest.partition(".")[0]) is not None):
        return finder(rules, rest.strip())
    number = _number(subject)
    return _by_name(rules, subject) if number is None else _bare(rules, number, subject)


def _bare(rules: "RuleSet", number: int, text: str) -> Found:
    """Find what a number without a word can be: the only thing that it is, or an MSR."""
    lists = {
        "msr": any(_within(number, row.first, row.last) for row in rules.msrs),
        "cpuid": any(_within(number, row.first, row.last) for row in rules.cpuid),
        "tdcall": any(row.leaf == number for row in rules.tdcalls),
        "tdvmcall": any(row.function == number for row in rules.tdvmcalls),
    }
    known = [prefix for prefix, listed in lists.items() if listed]
    if len(known) > 1:
        ways = [f"{prefix}:{text}" for prefix in dict.fromkeys(("msr", *known))]
        raise UsageError(
            f"{text} is more than one thing: write {', '.join(ways[:-1])} or {ways[-1]}."
        )
    return _PREFIXES[known[0] if known else "msr"](rules, text)


def _msr(rules: "RuleSet", text: str) -> Found:
    index = _number(text)
    if index is None:
        return [each for each in _by_name(rules, text) if each[0] == "msrs"]
    if index > _MAX_INDEX:
        raise UsageError(f"{index:#x} is no MSR index: they have 32 bits.")
    found = [
        row
        for row in rules.msrs
        if row.kind == MsrKind.RANGE and _within(index, row.first, row.last)
    ]
    if not found:
        inside = any(index in bitmap for bitmap in _BITMAPS)
        kind = MsrKind.ABSENT if inside else MsrKind.OUTSIDE
        found = [row for row in rules.msrs if row.kind == kind]
    return _named("msrs", found)


def _port(rules: "RuleSet", text: str) -> Found:
    """IN and OUT trap whatever the port; the VMM serves them all alike."""
    number = _number(text)
    if number is None or number > _MAX_PORT:
        raise UsageError(f"{text!r} is no port; write port:0x71.")
    names = ("IN", "OUT", "INS", "OUTS")
    found = [("instructions", row) for row in rules.instructions if row.mnemonic in names]
    return [*found, *_tdvmcall(rules, str(_IO_CALL))]


def _cpuid(rules: "RuleSet", text: str) -> Found:
    leaf_text, _, subleaf_text = text.partition(".")
    leaf, subleaf = _number(leaf_text), _number(subleaf_text or "0")
    if leaf is None or subleaf is None or max(leaf, subleaf) > _MAX_INDEX:
        raise UsageError(f"{text!r} is no CPUID leaf; write cpuid:0x1f or cpuid:4.2.")
    listed = _cpuid_rows(rules, leaf, subleaf)
    asked = [row for row in rules.cpuid if row.kind == CpuidKind.GUEST_ASKED]
    if any(row.followed for row in listed):
        return _named("cpuid", [*listed, *asked])
    clamp = [row for row in rules.cpuid if row.kind == CpuidKind.CLAMP]
    last = next((row.first for row in clamp if row.followed), None) or 0
    if leaf not in _HOST_LEAVES and leaf not in _EXTENDED and leaf > last:
        listed = [*listed, *clamp, *_cpuid_rows(rules, last, subleaf)]
    else:
        listed = [*listed, *(row for row in rules.cpuid if row.kind == CpuidKind.ABSENT)]
    return _named("cpuid", listed)


def _cpuid_rows(rules: "RuleSet", leaf: int, subleaf: int) -> list[CpuidRule]:
    return [
        row
        for row in rules.cpuid
        if row.kind == CpuidKind.LEAF
        and _within(leaf, row.first, row.last)
        and row.subleaf in {None, subleaf}
    ]


def _tdcall(rules: "RuleSet", text: str) -> Found:
    number = _number(text)
    rows = [
        row
        for row in rules.tdcalls
        if (row.leaf == number if number is not None else row.name.lower() == text.lower())
    ]
    if not rows and number is not None:
        rows = [row for row in rules.tdcalls if row.case == "unknown_leaf"]
    return _named("tdcalls", rows)


def _tdvmcall(rules: "RuleSet", text: str) -> Found:
    number = _number(text)
    rows = [
        row
        for row in rules.tdvmcalls
        if (row.function == number if number is not None else row.name.lower() == text.lower())
    ]
    return _named("tdvmcalls", rows)


def _memory(rules: "RuleSet", text: str) -> Found:
    words = set(text.lower().replace(",", " ").split())
    rows = [row for row in rules.memory if words and words <= {row.access, row.half, row.state}]
    return _named("memory", rows)


def _status(rules: "RuleSet", text: str) -> Found:
    number = _number(text)
    if number is None:
        return _named("statuses", [r for r in rules.statuses if r.name.lower() == text.lower()])
    exact = [r for r in rules.statuses if r.kind != "operand" and r.value == number]
    if exact:
        return _named("statuses", exact)
    code, operand = number & ~_MAX_INDEX, number & _MAX_INDEX
    rows = [r for r in rules.statuses if r.kind == "completion" and r.value == code != 0]
    operands = [r for r in rules.statuses if r.kind == "operand" and r.value == operand]
    return _named("statuses", [*rows, *operands] if rows else [])


def _by_name(rules: "RuleSet", text: str) -> Found:
    wanted = text.lower()
    return [
        (table, row)
        for table in TABLES
        for row in rules.table(table)
        if wanted in {name.lower() for name in _names(row)}
    ]


def _names(row: Rule) -> Iterable[str]:
    """Names by which a row can be asked for, its id among them."""
    yield row.id
    if isinstance(row, MsrRule):
        if row.kind == MsrKind.RANGE:
            yield row.name
            yield row.name.removeprefix("IA32_").removeprefix("MSR_")
        return
    for attribute in ("name", "mnemonic", "question"):
        name = getattr(row, attribute, None)
        if name:
            yield name


_PREFIXES: Final[dict[str, Callable[["RuleSet", str], Found]]] = {
    "msr": _msr,
    "rdmsr": _msr,
    "wrmsr": _msr,
    "port": _port,
    "in": _port,
    "out": _port,
    "cpuid": _cpuid,
    "tdcall": _tdcall,
    "tdvmcall": _tdvmcall,
    "memory": _memory,
    "status": _status,
}


def _named(table: str, rows: Iterable[Rule]) -> Found:
    return [(table, row) for row in rows]


def _within(value: int, first: int | None, last: int | None) -> bool:
    return first is not None and last is not None and first <= value <= last


def _number(text: str) -> int | None:
    # int() also takes signs, spaces and underscores, and long digit strings in quadratic time.
    if not text or len(text) > 20 or not text.isascii() or not text.isalnum():
        return None
    try:
        return int(text, 16) if text.lower().startswith("0x") else int(text)
    except ValueError:
        return None


def _question(rules: "RuleSet", table: str, rows: list[Rule]) -> RuleQuestion:
    rows = sorted(rows, key=lambda row: not row.followed)
    answers = tuple(
        RuleAnswer(row=row_document(row), agrees=row.answer == rows[0].answer) for row in rows
    )
    linux = tuple(row_document(row) for row in _linux(rules, rows[0]))
    return RuleQuestion(table=table, title=title_of(rows[0]), answers=answers, linux=linux)


def _linux(rules: "RuleSet", row: Rule) -> list[LinuxRule]:
    """Return what Linux does with the #VE that a row comes to."""
    found: list[LinuxRule] = []
    for reason, condition in _exits(row):
        listed = [each for each in rules.linux if each.exit_reason == reason]
        exact = [each for each in listed if each.condition == condition]
        other = [each for each in rules.linux if each.condition == "any_other_exit_reason"]
        found += exact or listed or other
    return found


def _exits(row: Rule) -> Iterable[tuple[int, str]]:
    """Yield the exit reasons of the #VE that a row comes to, with Linux's case where known."""
    if isinstance(row, MsrRule):
        for action, reason in ((row.read, _RDMSR), (row.write, _WRMSR)):
            deadline = row.read_feature == Feature.TSC_DEADLINE
            if "ve" in action.value.split("_") and (action != MsrAction.GP_UNLESS_VE or deadline):
                yield reason, ""
    elif isinstance(row, CpuidRule):
        if row.outcome == CpuidOutcome.VE:
            hosts = row.first is not None and row.first in _HOST_LEAVES
            yield _CPUID, "hypervisor_leaf" if hosts else "other_leaf"
    elif isinstance(row, InstructionRule | MemoryRule) and row.outcome == Outcome.VE:
        string = isinstance(row, InstructionRule) and row.mnemonic in {"INS", "OUTS"}
        plain = isinstance(row, InstructionRule) and row.mnemonic in {"IN", "OUT"}
        yield row.exit_reason or 0, "string" if string else "not_string" if plain else ""


def _unknown(rules: "RuleSet", subject: str) -> str:
    names = sorted({name for table in TABLES for row in rules.table(table) for name in _names(row)})
    close = nearest(subject, names)
    hint = (
        f"did you mean {' or '.join(close)}?"
        if close
        else "see 'trapline rules explain --help' for what can be asked."
    )
    return f"no rule about {subject!r}; {hint}"
