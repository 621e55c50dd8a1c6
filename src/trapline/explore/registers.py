"""All registers that code can tell apart, and which of them a run must leave alone.

The processor's and the local APIC's: an interrupt that its handler does not end blocks all of
its class and below from then on.
"""

from collections.abc import Collection
from typing import Final

from trapline.cpu.engine import Reg
from trapline.machine.machine import Machine

# Status flags and IF, DF, NT, AC; RF is for the processor, the others are fixed.
_RFLAGS: Final = 0x3F7FD7 & ~(1 << 16)
_SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs")
_TABLES: Final = ("gdtr", "idtr", "tr", "ldtr")
_MSRS: Final = {
    "FS.base": 0xC0000100,
    "GS.base": 0xC0000101,
    "KERNEL_GS_BASE": 0xC0000102,
    "EFER": 0xC0000080,
    "STAR": 0xC0000081,
    "LSTAR": 0xC0000082,
    "FMASK": 0xC0000084,
    "PAT": 0x277,
}
FPU: Final = "x87 and SSE"


def registers(machine: Machine) -> dict[str, int]:
    """Take all registers; `FPU` stands for those of x87 and SSE together.

    User mode owns them. Kernel code may save them and leave its own there until it goes back to
    user mode: what they hold at CPL 0 is judged as memory is, not here.
    """
    vcpu = machine.vcpu
    values = {reg.name: int(vcpu.regs[reg]) for reg in Reg}
    values["RFLAGS"] = vcpu.rflags & _RFLAGS
    values["CPL"] = vcpu.cpl
    values |= {name: vcpu.segment(name).selector & 0xFFFF for name in _SEGMENTS}
    values |= {f"{name.upper()}.base": vcpu.segment(name).base for name in _TABLES}
    values |= {name: vcpu.msr(index) for name, index in _MSRS.items()}
    # An NMI between a page fault and its handler must leave CR2 alone.
    values |= {f"CR{number}": vcpu.cr(number) for number in (0, 2, 3, 4)}
    values |= {f"DR{number}": vcpu.dr(number) for number in (0, 1, 2, 3, 6, 7)}
    values["NMI blocked"] = int(vcpu.nmi_blocked)
    values["interrupts in service"] = machine.apic.in_service
    if vcpu.cpl == 3:
        values[FPU] = int.from_bytes(vcpu.fpu, "little")
    return values


def differing_registers(
    reference: dict[str, int], found: dict[str, int], events: Collection[str]
) -> tuple[str, ...]:
    """Describe registers that differ, but for those that one of the events may change.

    An interrupt handler may fault: interrupts are off until a page fault's own has read CR2.
    """
    if reference == found:
        return ()
    ignored = {"CR2"} if any(event.startswith(("irq:", "int80")) for event in events) else set()
    return tuple(
        f"the {name} registers are not as they were"
        if name == FPU
        else f"{name} is {found[name]:#x}, {value:#x} expected"
        for name, value in reference.items()
        if found[name] != value and name not in ignored
    )
