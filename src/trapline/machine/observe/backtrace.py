"""Back traces of the guest that an engine holds, symbolised."""

import re
from typing import TYPE_CHECKING, Final

from trapline.cpu.engine import Reg
from trapline.kernel.live.unwind import SavedRegisters, StackFrame, unwind, with_guesses
from trapline.results.splat import Place, Registers, Task

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trapline.cpu.engine import Vcpu
    from trapline.kernel.live.runtime import Location, RuntimeSymbols
    from trapline.kernel.live.tasks import LiveTask

_MASK64: Final = (1 << 64) - 1
# What puts a task to sleep, on top of each stack.
_SCHEDULING: Final = re.compile(r"(?:__)?schedule\w*|context_switch|__switch_to\w*")
MAX_TASK_FRAMES: Final = 16
_NO_SYSCALL: Final = _MASK64  # orig_ax of an interrupt
# pt_regs names of the general registers, in the order in which the kernel prints them.
GENERAL: Final = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9"),
    *("r10", "r11", "r12", "r13", "r14", "r15"),
)


def current_registers(vcpu: "Vcpu") -> SavedRegisters:
    """Return the registers of the vCPU in the form in which the kernel saves them."""
    values = {reg.name.lower(): int(vcpu.regs[reg]) & _MASK64 for reg in Reg}
    return SavedRegisters(
        **values,
        orig_rax=_NO_SYSCALL,
        cs=vcpu.segment("cs").selector & ~3 | vcpu.cpl,
        rflags=vcpu.rflags,
        ss=vcpu.segment("ss").selector,
    )


def backtrace(
    vcpu: "Vcpu", symbols: "RuntimeSymbols", registers: SavedRegisters | None = None
) -> tuple[tuple[Place, ...], bool]:
    """Walk the guest's stack from its registers, or from those of a task that does not run.

    The first place is that of RIP. The second value is whether the walk reached the end.
    """
    trace = unwind(registers or current_registers(vcpu), vcpu.read, symbols.find_orc)
    frames = with_guesses(trace, vcpu.read, symbols.is_text)
    places = tuple(_place_of_frame(frame, symbols) for frame in frames)
    return places, trace.complete


def task_traces(vcpu: "Vcpu", symbols: "RuntimeSymbols", tasks: "Iterable[LiveTask]") -> list[Task]:
    """Say where each task is: what it runs, or what it waits for, the scheduler left out."""
    running = unwind(current_registers(vcpu), vcpu.read, symbols.find_orc).frames
    found = []
    for task in tasks:
        is_running = any(task.is_on(frame.sp) for frame in running)  # or below an interrupt
        places: tuple[Place, ...] = ()
        if is_running or task.registers is not None:
            places, _ = backtrace(vcpu, symbols, None if is_running else task.registers)
        known = [place for place in places if not place.is_guess]
        while not is_running and len(known) > 1 and _SCHEDULING.match(known[0].label):
            known.pop(0)
        found.append(
            Task(
                pid=task.pid,
                comm=task.comm,
                state=task.state,
                is_running=is_running,
                trace=tuple(place.label for place in known[:MAX_TASK_FRAMES]),
            )
        )
    return found


def place_of(
    location: "Location", *, is_guess: bool = False, registers: Registers | None = None
) -> Place:
    """Turn a location into its part of a result document."""
    link = location.link_address
    return Place(
        address=f"{location.address:#x}",
        label=location.label,
        image=location.image,
        link_address=None if link is None else f"{link:#x}",
        frames=location.frames,
        is_guess=is_guess,
        registers=registers,
    )


def saved_registers(registers: SavedRegisters, label: str) -> Registers:
    """Turn registers that were found on a stack into their part of a result document."""
    general = {name: f"{getattr(registers, name):016x}" for name in GENERAL}
    return Registers(
        rip=label,
        cs=f"{registers.cs & 0xFFFF:04x}",
        ss=f"{registers.ss & 0xFFFF:04x}",
        rflags=f"{registers.rflags & 0xFFFFFFFF:08x}",
        general=general | {"rsp": f"{registers.rsp:016x}"},
    )


def _place_of_frame(frame: StackFrame, symbols: "RuntimeSymbols") -> Place:
    location = symbols.locate(frame.address, is_call=frame.is_call, is_user=frame.is_user)
    registers = None
    if frame.registers is not None and frame.slot is not None:
        registers = saved_registers(frame.registers, location.label)
    return place_of(location, is_guess=frame.is_guess, registers=registers)
