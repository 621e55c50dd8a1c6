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
_TABLES: Final = 6  # from here on they are tables, or in one, and have a limit in 64-bit mode
_SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs", "gdtr", "idtr", "tr", "ldtr")
_MSRS: Final = {
    "KERNEL_GS_BASE": 0xC0000102,
    "EFER": 0xC0000080,
    "STAR": 0xC0000081,
    "LSTAR": 0xC0000082,
    "FMASK": 0xC0000084,
    "PAT": 0x277,
}
_CRS: Final = (0, 2, 3, 4)
_DRS: Final = (0, 1, 2, 3, 6, 7)
FPU: Final = "x87 and SSE"


# The bases of the others mean nothing in 64-bit mode.
_NAMES: Final = (
    *(reg.name for reg in Reg),
    "RFLAGS",
    "CPL",
    *_SEGMENTS,
    *(f"{name.upper()}.base" for name in _SEGMENTS[4:]),
    *(f"{name.upper()}.limit" for name in _SEGMENTS[_TABLES:]),
    *_MSRS,
    *(f"CR{number}" for number in _CRS),
    *(f"DR{number}" for number in _DRS),
    "NMI blocked",
    "interrupts in service",
    FPU,
)

# System V psABI for x86-64, 3.2.1: a function need not keep these. RAX and RDX have what it
# returns.
_SCRATCH: Final = frozenset(("RCX", "RSI", "RDI", "R8", "R9", "R10", "R11"))
_STATUS: Final = 0x8D5  # CF, PF, AF, ZF, SF, OF

Registers = tuple[int, ...]


def registers(machine: Machine) -> Registers:
    """Take all registers; the last stands for those of x87 and SSE together.

    User mode owns these. Kernel code may save them and leave its own there until it goes back to
    user mode: what they hold at CPL 0 is judged as memory is, not here.
    """
    vcpu = machine.vcpu
    cpl = vcpu.cpl
    segments = [vcpu.segment(name) for name in _SEGMENTS]
    return (
        *vcpu.regs,
        vcpu.rflags & _RFLAGS,
        cpl,
        *(segment.selector & 0xFFFF for segment in segments),
        *(segment.base for segment in segments[4:]),
        *(segment.limit for segment in segments[_TABLES:]),
        *map(vcpu.msr, _MSRS.values()),
        # An NMI between a page fault and its handler must leave CR2 alone.
        *map(vcpu.cr, _CRS),
        *map(vcpu.dr, _DRS),
        int(vcpu.nmi_blocked),
        machine.apic.in_service,
        int.from_bytes(vcpu.fpu, "little") if cpl == 3 else 0,
    )


def differing_registers(
    reference: Registers, found: Registers, events: Collection[str], *, is_return: bool
) -> tuple[str, ...]:
    """Describe registers that differ, but for those that one of the events may change.

    An interrupt handler may fault: interrupts are off until a page fault's own has read CR2.
    `is_return`: the window is a function of the kernel, and closes where it has returned; what is
    then in registers that a function may leave as it likes says nothing.
    """
    if reference == found:
        return ()
    ignored: frozenset[str] = _SCRATCH if is_return else frozenset()
    if any(event.startswith(("irq:", "int80")) for event in events):
        ignored |= {"CR2"}
    texts = []
    for name, was, now in zip(_NAMES, reference, found, strict=True):
        mask = ~_STATUS if is_return and name == "RFLAGS" else -1
        if (was ^ now) & mask and name not in ignored:
            texts.append(
                f"the {name} registers are not as they were"
                if name == FPU
                else f"{name} is {now:#x}, {was:#x} expected"
            )
    return tuple(texts)
