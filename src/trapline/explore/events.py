"""The events that a scenario may inject: what each does to the machine, and which rule it obeys.

`decide` asks the rules of the TDX module (tables `nesting`, `memory`, `instructions`) whether an
event may come before an instruction. What the host can cause at any time (an NMI, an interrupt) is
always allowed, and may be held back by the module or the processor. A #VE comes from an instruction
that traps: at any other one it is beyond the rules, and so is a machine check, which ends a TD.
"""

from collections.abc import Callable
from itertools import product
from typing import Final, NamedTuple

import iced_x86 as ix

from trapline.cpu.engine import Reg, Vcpu
from trapline.guest.playalong import ExpectedMmio, ExpectedWrmsr
from trapline.isa.operands import memory_operand
from trapline.machine.devices.lapic import ApicMsr
from trapline.machine.machine import Machine
from trapline.rules.rows import InstructionRule, MemoryRule, NestingRule, Outcome
from trapline.rules.ruleset import RuleSet, choose
from trapline.tdx.vmm_interface import ExitReason, TdExit, VeInfo

NMI: Final = "nmi"
INT80_VECTOR: Final = 0x80
VECTOR_MC: Final = 18
VECTOR_VE: Final = 20
_VECTORS: Final = {NMI: 2, "int80": INT80_VECTOR, "mce": VECTOR_MC}
_VECTOR_MASK: Final = 0xFF
_READ: Final = 1
_WRITE: Final = 2
_MASK32: Final = (1 << 32) - 1
_MASK64: Final = (1 << 64) - 1
_MAX_INSTRUCTION: Final = 15
_PAGE: Final = 4096
_RFLAGS_IF: Final = 1 << 9


class Decision(NamedTuple):
    """What the rules say: `rule` is the id of the row that decided."""

    allowed: bool
    rule: str


class Conditions(NamedTuple):
    """What holds events back before an instruction.

    `ve_valid`: VE_INFO has not been collected. `shadow`: the instruction before was STI or
    wrote SS.
    """

    ve_valid: bool
    nmi_blocked: bool
    interrupt_flag: bool
    shadow: bool


def conditions(machine: Machine) -> Conditions:
    """Take the conditions before the instruction that the machine is at."""
    vcpu = machine.vcpu
    return Conditions(
        machine.module.ve_info is not None,
        vcpu.nmi_blocked,
        bool(vcpu.rflags & _RFLAGS_IF),
        vcpu.interrupt_shadow,
    )


def is_hosts(event: str) -> bool:
    """Whether the host may cause the event whenever it likes."""
    return event in (NMI, "int80") or event.startswith("irq:")


def decide(rules: RuleSet, event: str, here: Conditions) -> Decision:
    """Say whether the event may come here, and by which rule."""
    row, can = _row(rules, event, here)
    return Decision(is_hosts(event) or choose(row, can), row.id)


def is_open(rules: RuleSet, event: str, here: Conditions) -> bool:
    """Whether an event that waits is delivered here."""
    return not is_hosts(event) or choose(*_row(rules, event, here))


def ask_all(rules: RuleSet) -> None:
    """Ask every row that may decide about an event."""
    for event in (NMI, "int80", "ve:wrmsr", "ve:mmio", "ve:notification", "mce"):
        for flags in product((False, True), repeat=len(Conditions._fields)):
            decide(rules, event, Conditions(*flags))
            is_open(rules, event, Conditions(*flags))


# What a row may say of an event: for the host's, whether it is delivered; else whether it may come.
_HOST: Final = {Outcome.DELIVERED: True, Outcome.HELD: False}
_MACHINE_CHECK: Final = {Outcome.NATIVE: True, Outcome.TD_EXIT: False, Outcome.TD_FATAL: False}
_NOTIFICATION: Final = {Outcome.VE: True, Outcome.NOT_INJECTED: False}
_MAPPED: Final = {Outcome.VE: True, Outcome.NATIVE: False}
_SECOND: Final = dict.fromkeys((Outcome.DF, Outcome.GP, Outcome.TD_EXIT), False) | {
    Outcome.VE: True
}


def _row(
    rules: RuleSet, event: str, here: Conditions
) -> tuple[NestingRule | InstructionRule | MemoryRule, dict[Outcome, bool]]:
    """Return the row that decides about an event, and what its outcomes mean."""
    if event == NMI:
        if here.ve_valid:
            condition = "ve_info_valid"
        elif here.nmi_blocked:
            condition = "nmi_blocked"
        else:
            condition = "interrupt_shadow" if here.shadow else "after_veinfo_get"
        return rules.ask(NestingRule, "nmi", condition), _HOST
    if is_hosts(event):
        if not here.interrupt_flag:
            condition = "rflags_if_clear"
        else:
            condition = "interrupt_shadow" if here.shadow else "ve_info_valid"
        return rules.ask(NestingRule, "interrupts", condition), _HOST
    if event == "mce":
        return rules.ask(InstructionRule, "machine check", "always"), _MACHINE_CHECK
    if event == "ve:notification":
        return rules.ask(NestingRule, "notification-ve", "linux_guest"), _NOTIFICATION
    if here.ve_valid:
        by = "delivered_by_cpu_mmio" if event == "ve:mmio" else "injected_by_module"
        return rules.ask(NestingRule, "second-ve", by), _SECOND
    return rules.ask(MemoryRule, "any", "private", "mapped", "always"), _MAPPED


def vector_of(machine: Machine, event: str) -> int:
    """Return the vector that an event has in this guest."""
    if event.startswith("irq:"):
        name = event.partition(":")[2]
        if name == "timer":
            return (machine.apic.read_msr(ApicMsr.LVT_TIMER) or 0) & _VECTOR_MASK
        return int(name, 16)
    return _VECTORS.get(event, VECTOR_VE)


def applies(machine: Machine, event: str) -> bool:
    """Whether the event makes sense before the instruction that the machine is at."""
    return event != "ve:mmio" or mmio_access(machine.vcpu) is not None


def inject(machine: Machine, event: str) -> None:
    """Cause the event before the instruction that the machine is at."""
    if event.startswith("irq:"):
        _post(machine, vector_of(machine, event))
    else:
        _EVENTS[event](machine)


def _post(machine: Machine, vector: int) -> None:
    machine.apic.raise_vector(vector)
    machine.host.settle()


def _synthetic_wrmsr(machine: Machine) -> None:
    """Inject a #VE that says WRMSR, of no length.

    Linux hands RCX, RDX and RAX to the host, which ignores them (`host`), and goes on at the
    same instruction.
    """
    machine.host.services.expect(ExpectedWrmsr(machine.vcpu.regs[Reg.RCX] & _MASK32))
    machine.module.inject_ve(VeInfo(ExitReason.WRMSR))


def _mmio(machine: Machine) -> None:
    """Make the memory operand of the instruction MMIO, this once.

    While VE_INFO is valid the processor cannot convert the EPT violation; it exits.
    """
    access = mmio_access(machine.vcpu)
    if access is None:
        return
    gla, gpa, is_write = access
    shared = gpa | machine.memory.shared_bit
    qualification = _WRITE if is_write else _READ
    if machine.module.ve_info is not None:
        machine.host.ept_violation(
            TdExit(0, ExitReason.EPT_VIOLATION, qualification, gpa=shared & -_PAGE)
        )
        return
    machine.host.services.expect(ExpectedMmio(shared, gpa, machine.memory))
    machine.module.inject_ve(VeInfo(ExitReason.EPT_VIOLATION, qualification, gla, shared))


def mmio_access(vcpu: Vcpu) -> tuple[int, int, bool] | None:
    """Return GLA, GPA and direction of the explicit memory operand of the instruction at RIP.

    None for an instruction without one, or where it is not mapped.
    """
    rip = int(vcpu.regs[Reg.RIP])
    data = vcpu.read(rip, _MAX_INSTRUCTION) or vcpu.read(rip, -rip % _PAGE or 1)
    if data is None:
        return None
    instruction = ix.Decoder(64, data, ip=rip).decode()
    operand = memory_operand(instruction)
    if instruction.is_invalid or operand is None:
        return None
    gla = operand.displacement
    if not operand.is_rip_relative:
        gla += _value(vcpu, operand.base) + _value(vcpu, operand.index_register) * operand.scale
    if operand.segment in ("fs", "gs"):
        gla += vcpu.segment(operand.segment).base
    gla &= _MASK64
    gpa = vcpu.translate(gla)
    if gpa is None:
        return None
    return gla, gpa & ~vcpu.memory.shared_bit, operand.access != "read"


def _value(vcpu: Vcpu, register: str | None) -> int:
    """Return a 64-bit register by name; others are no addresses of a 64-bit kernel."""
    return 0 if register is None else int(vcpu.regs[Reg[register.upper()]])


def _notification(machine: Machine) -> None:
    """Inject the #VE of TDH.VP.ENTER after suspected zero-stepping: no GLA, a private GPA."""
    vcpu = machine.vcpu
    gpa = vcpu.translate(int(vcpu.regs[Reg.RIP])) or 0
    if not machine.module.notify_ept_fault(gpa & -_PAGE):
        machine.module.inject_ve(VeInfo(ExitReason.EPT_VIOLATION, _READ, 0, gpa & -_PAGE))


_EVENTS: Final[dict[str, Callable[[Machine], None]]] = {
    NMI: lambda machine: machine.module.pend_nmi(),
    "int80": lambda machine: _post(machine, INT80_VECTOR),
    "ve:wrmsr": _synthetic_wrmsr,
    "ve:mmio": _mmio,
    "ve:notification": _notification,
    "mce": lambda machine: machine.vcpu.deliver(VECTOR_MC),
}
