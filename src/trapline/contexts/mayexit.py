"""What one instruction may do in a TD: leave the guest by its nature, or touch memory that may.

The first is the rules' to say, and where the number of an MSR or a CPUID leaf is known there, for
that number. The second is by where the operand lies: the kernel's own memory is private and
accepted, what user mode or a device chose is not.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

from iced_x86 import InstructionInfoFactory, Mnemonic, OpAccess, Register

from trapline.contexts import execute
from trapline.contexts.processor import ENTRY_TOP, GS_KERNEL, RSP_USER, Processor
from trapline.isa import traps
from trapline.rules.rows import CpuidKind, CpuidOutcome, MsrAction, MsrKind, Outcome

if TYPE_CHECKING:
    from iced_x86 import Instruction

    from trapline.kernel.binary import Binary
    from trapline.results.contexts import AccessKind, TrapAnswer
    from trapline.results.trapclass import TrapClass
    from trapline.rules.rows import InstructionRule, MsrRule
    from trapline.rules.ruleset import RuleSet

M32: Final = 0xFFFF_FFFF
_NO_TRAP: Final = frozenset(
    (MsrAction.NATIVE, MsrAction.EMULATED, MsrAction.NATIVE_UNLESS_EMULATED)
)
_WRITES_MSR: Final = frozenset((Mnemonic.WRMSR, Mnemonic.WRMSRNS))
_HARMLESS: Final = frozenset((Outcome.NATIVE, Outcome.EMULATED))
_QUESTIONS: Final = ("always", "cpl_0")
# Fixmap up to the vsyscall page: local APIC, I/O APICs, early ioremap (Documentation/arch/x86/
# x86_64/mm.rst, arch/x86/include/asm/fixmap.h).
_FIXMAP: Final = range(0xFFFF_FFFF_FF00_0000, 0xFFFF_FFFF_FFE0_0000)
_USER_HALF: Final = range(0x1_0000, 1 << 47)
_ACCESSES: Final = frozenset(
    (
        *(OpAccess.READ, OpAccess.COND_READ, OpAccess.WRITE, OpAccess.COND_WRITE),
        *(OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE),
    )
)
_info = InstructionInfoFactory()


class Exits(NamedTuple):
    """How an instruction leaves the guest.

    `answer` is "ve" where the rules say that it is a #VE (or as bad), "may" where they cannot as
    a number is not known, "no" where the module answers. `rule` is the row; `subject` the number
    of the MSR or leaf.
    """

    trap: "TrapClass"
    answer: "TrapAnswer"
    rule: str
    subject: str


def may_exit(instruction: "Instruction") -> bool:
    """Whether an instruction leaves the guest, or may, by its nature."""
    return traps.classify(instruction) is not None


def touches_memory(instruction: "Instruction") -> bool:
    """Whether an instruction reads or writes memory, the stack that it implies included."""
    return any(used.access in _ACCESSES for used in _info.info(instruction).used_memory())


class Traps:
    """Asks the rules of one module version."""

    def __init__(self, rules: "RuleSet") -> None:
        self._instructions: dict[tuple[str, str], InstructionRule] = {
            (row.mnemonic, row.condition): row for row in rules.instructions if row.followed
        }
        self._msrs = [row for row in rules.msrs if row.followed]
        self._leaves = [row for row in rules.cpuid if row.followed]

    def of(self, instruction: "Instruction", state: Processor) -> Exits | None:
        """Say how an instruction leaves the guest by its nature; None where it does not."""
        trap = traps.classify(instruction)
        if trap is None or trap.kind == "tdcall":
            return None
        if trap.kind == "msr":
            return self._msr(execute.get(state, Register.ECX), instruction)
        if trap.kind == "cpuid":
            return self._cpuid(execute.get(state, Register.EAX), execute.get(state, Register.ECX))
        name = _NAMES.get(instruction.mnemonic, "")
        for condition in _QUESTIONS:
            row = self._instructions.get((name, condition))
            if row is not None:
                return Exits(trap.kind, "no" if row.outcome in _HARMLESS else "ve", row.id, "")
        return Exits(trap.kind, "may", "", "")

    def _msr(self, index: int | None, instruction: "Instruction") -> Exits:
        if index is None:
            return Exits("msr", "may", "", "")
        row = self._msr_row(index)
        action = row.write if instruction.mnemonic in _WRITES_MSR else row.read
        return Exits("msr", "no" if action in _NO_TRAP else "ve", row.id, f"{index:#x}")

    def _msr_row(self, index: int) -> "MsrRule":
        absent = None
        for row in self._msrs:
            if row.kind == MsrKind.ABSENT:
                absent = row
            elif row.first is not None and row.last is not None and row.first <= index <= row.last:
                return row
        assert absent is not None, "the tables have a row for all other MSRs"
        return absent

    def _cpuid(self, leaf: int | None, subleaf: int | None) -> Exits:
        if leaf is None:
            return Exits("cpuid", "may", "", "")
        for row in self._leaves:
            if row.kind != CpuidKind.LEAF or row.first is None or row.last is None:
                continue
            if row.first <= leaf <= row.last and row.subleaf in {None, subleaf}:
                answer: TrapAnswer = "no" if row.outcome == CpuidOutcome.MODULE else "ve"
                return Exits("cpuid", answer, row.id, f"{leaf:#x}")
        absent = next((row.id for row in self._leaves if row.kind == CpuidKind.ABSENT), "")
        return Exits("cpuid", "ve", absent, f"{leaf:#x}")


_NAMES: Final = {
    value: name.removesuffix("B").removesuffix("W").removesuffix("D")
    if name.startswith(("INS", "OUTS"))
    else name
    for name, value in vars(Mnemonic).items()
    if isinstance(value, int)
}


def accesses(
    instruction: "Instruction", state: Processor, binary: "Binary"
) -> "frozenset[AccessKind]":
    """Say what kinds of memory an instruction touches, the stack that it implies included."""
    found: set[AccessKind] = set()
    for used in _info.info(instruction).used_memory():
        if used.access not in _ACCESSES:
            continue
        if used.base == Register.RSP and used.index == Register.NONE:
            found.add(_stack(state))
        elif used.segment == Register.GS:
            found.add("per-CPU" if state.gs == GS_KERNEL else "user GS")
        else:
            linear = execute.address(instruction, state)
            found.add("pointer" if linear is None else _where(linear, binary))
    return frozenset(found)


def _stack(state: Processor) -> "AccessKind":
    stack = state.stack
    return "user stack" if stack in {"user", "none"} else "stack"


def _where(linear: int, binary: "Binary") -> "AccessKind":
    if linear in _FIXMAP:
        return "device"
    if linear in _USER_HALF:
        return "user memory"
    if binary.is_mapped(linear):
        return "kernel data"
    return "stack" if linear >= ENTRY_TOP - 0x1000 or linear > RSP_USER else "pointer"
