"""Takes down the last state of a guest that died, from the engine that holds it."""

from typing import TYPE_CHECKING, Final

from trapline.machine.observe.backtrace import backtrace, current_registers, saved_registers
from trapline.results.splat import Code, Registers, Splat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trapline.cpu.engine import Vcpu
    from trapline.kernel.live.runtime import RuntimeSymbols

# show_opcodes(), arch/x86/kernel/dumpstack.c
_PROLOGUE: Final = 42
_CODE_SIZE: Final = 64
_MSR_FS_BASE: Final = 0xC0000100
_MSR_GS_BASE: Final = 0xC0000101
_MSR_KERNEL_GS_BASE: Final = 0xC0000102
_DR6_RESERVED: Final = 0xFFFF0FF0
_DR7_FIXED: Final = 0x400


def take_splat(
    vcpu: "Vcpu",
    symbols: "RuntimeSymbols",
    *,
    banner: str,
    injected: "Sequence[str]",
    traps: "Sequence[str]",
    reproduce: str,
) -> Splat:
    """Describe a stopped guest; changes nothing, and no guest state makes it fail."""
    places, complete = backtrace(vcpu, symbols)
    return Splat(
        banner=banner,
        injected=tuple(injected),
        registers=_registers(vcpu, places[0].label),
        code=_code(vcpu),
        place=places[0],
        trace=places[1:],
        complete=complete,
        traps=tuple(traps),
        reproduce=reproduce,
    )


def _registers(vcpu: "Vcpu", label: str) -> Registers:
    short = saved_registers(current_registers(vcpu), label)
    bases = {
        "fs": vcpu.msr(_MSR_FS_BASE),
        "gs": vcpu.msr(_MSR_GS_BASE),
        "kernel_gs": vcpu.msr(_MSR_KERNEL_GS_BASE),
    }
    return Registers(
        rip=short.rip,
        cs=short.cs,
        ss=short.ss,
        rflags=short.rflags,
        general=short.general,
        segments={
            name: f"{vcpu.segment(name).selector & 0xFFFF:04x}" for name in ("ds", "es", "fs", "gs")
        },
        bases={name: f"{value:016x}" for name, value in bases.items()},
        control={f"cr{number}": f"{vcpu.cr(number):016x}" for number in (0, 2, 3, 4)},
        debug=_debug_registers(vcpu),
    )


def _debug_registers(vcpu: "Vcpu") -> dict[str, str]:
    """Return the debug registers where they are not as after reset, as the kernel prints them."""
    values = {number: vcpu.dr(number) for number in (0, 1, 2, 3, 6, 7)}
    idle = {0: 0, 1: 0, 2: 0, 3: 0, 6: _DR6_RESERVED, 7: _DR7_FIXED}
    if values == idle:
        return {}
    return {f"dr{number}": f"{value:016x}" for number, value in values.items()}


def _code(vcpu: "Vcpu") -> Code:
    rip = current_registers(vcpu).rip
    for before in (_PROLOGUE, 0):
        start = rip - before
        if start >= 0:
            data = vcpu.read(start, _CODE_SIZE - _PROLOGUE + before)
            if data:
                return Code(bytes=data.hex(), at=before)
    return Code(bytes="", at=0)
