"""Takes down the last state of a guest that died, from the engine that holds it."""

import re
from typing import TYPE_CHECKING, Final, Literal

from trapline.linux import names
from trapline.machine.observe.backtrace import backtrace, current_registers, saved_registers
from trapline.results.splat import Code, Registers, Splat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trapline.cpu.engine import Vcpu
    from trapline.kernel.live.runtime import RuntimeSymbols
    from trapline.results.splat import Place

# show_opcodes(), arch/x86/kernel/dumpstack.c
_PROLOGUE: Final = 42
_CODE_SIZE: Final = 64
_MSR_FS_BASE: Final = 0xC0000100
_MSR_GS_BASE: Final = 0xC0000101
_MSR_KERNEL_GS_BASE: Final = 0xC0000102
_DR6_RESERVED: Final = 0xFFFF0FF0
_DR7_FIXED: Final = 0x400
_USER: Final = 3
_EXCEPTION: Final = re.compile(r"(?:noist_|user_|kernel_)?exc_")
# What a complaint is about: the exception that the kernel could not handle, or whatever was
# interrupted when it looked at the clock.
Blame = Literal["exception", "event"]


def take_splat(
    vcpu: "Vcpu",
    symbols: "RuntimeSymbols",
    *,
    banner: str,
    injected: "Sequence[str]",
    traps: "Sequence[str]",
    reproduce: str,
    blame: "Blame | None" = None,
) -> Splat:
    """Describe a stopped guest; changes nothing, and no guest state makes it fail.

    `blame` says that its kernel is printing what went wrong: then it is about what was interrupted
    by that, if anything was, as the kernel's own splats are.
    """
    places, complete = backtrace(vcpu, symbols)
    first = 0 if blame is None else _blamed(places, blame)
    head = places[first].registers if first else None
    now = current_registers(vcpu)
    registers = _registers(vcpu, head or saved_registers(now, places[0].label))
    return Splat(
        banner=banner,
        injected=tuple(injected),
        registers=registers,
        code=_code(vcpu, int(places[first].address, 16)),
        place=places[first],
        trace=places[first + 1 :],
        complete=complete,
        traps=tuple(traps),
        reproduce=reproduce,
    )


def _blamed(places: "Sequence[Place]", blame: "Blame") -> int:
    """Return which place was interrupted: 0 where the kernel says it of its own accord.

    An exception is to blame that was taken before the kernel began to print: those of the printing
    itself (a console's #VE) are nearer.
    """
    functions = ["" if place.is_guess else place.label.partition("+")[0] for place in places]
    printing = [index for index, name in enumerate(functions) if name in names.PRINTING]
    start = printing[-1] + 1 if printing else 0
    caught = (_EXCEPTION if blame == "exception" else names.KernelNames().handlers).match
    for index in range(start, len(places)):
        registers = places[index].registers
        if registers is None:
            continue
        if int(registers.cs, 16) & _USER:
            return 0
        return index if any(map(caught, functions[start:index])) else 0
    return 0


def _registers(vcpu: "Vcpu", short: Registers) -> Registers:
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


def _code(vcpu: "Vcpu", rip: int) -> Code:
    for before in (_PROLOGUE, 0):
        start = rip - before
        if start >= 0:
            data = vcpu.read(start, _CODE_SIZE - _PROLOGUE + before)
            if data:
                return Code(bytes=data.hex(), at=before)
    return Code(bytes="", at=0)
