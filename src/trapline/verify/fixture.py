"""One booted guest, on which every case starts from the same state."""

from contextlib import ExitStack
from typing import Final, Literal, NamedTuple

from trapline.base.errors import BadMachineError
from trapline.cpu.engine import Exit, Reg
from trapline.guest.frozen import FrozenMachine
from trapline.guest.target import Target
from trapline.linux.names import REFUSALS
from trapline.machine.machine import Machine
from trapline.machine.vmm.host import VECTOR_DOUBLE_FAULT
from trapline.tdx.vmm_interface import ExitReason, TrapListener, VeInfo
from trapline.verify import reference
from trapline.verify.testpages import (
    CODE_GPA,
    END,
    MMIO_GPA,
    OPERAND_AT,
    OPERAND_GPA,
    OPERAND_SIZE,
    PAGE,
    STACK_GPA,
    STACK_SIZE,
    USER_END,
    Window,
)
from trapline.verify.world import Access, World, WorldHost

# Handlers take some thousand cycles.
_BUDGET: Final = 4_000_000
# A handler may emulate a repeated instruction one step at a time, and return to it.
_MAX_TRAPS: Final = 64
_VECTOR_PF: Final = 14
_ALL_EXCEPTIONS: Final = frozenset(range(32))
_UD2: Final = b"\x0f\x0b"
_FNINIT: Final = b"\xdb\xe3"
_FLD1: Final = b"\xd9\xe8"

Ending = Literal["done", "fault", "refused", "hang", "dead"]


class Setup(NamedTuple):
    """The state in front of the instruction.

    `regs` are the 16 general registers. `operand` fills the operand pages, `above` the stack
    from RSP up to its end, `below` what is dead under it. `rewritten` replaces the instruction
    between the trap and the handler. `inject` makes the trap by hand, for what the engine
    cannot decode: the GLA of the access. `mmio` says which operand pages of a trapped run are MMIO:
    what traps by itself, as INS does, has its operand in plain memory.
    """

    code: bytes
    regs: tuple[int, ...]
    rflags: int
    operand: bytes
    stack: bytes
    world: World
    garbage: int | None = None
    rewritten: bytes = b""
    inject: int | None = None
    inject_write: bool = False
    mmio: tuple[bool, ...] = (True, True)


class Outcome(NamedTuple):
    """The state after it. `detail` is what faulted or refused; `traps` counts #VEs at it.

    `memory` are the operand pages as memory or device hold them, `stack` what was above RSP,
    `fpu` the x87 and SSE registers.
    """

    ending: Ending
    detail: str
    regs: tuple[int, ...]
    rflags: int
    memory: bytes
    stack: bytes
    fpu: bytes
    accesses: tuple[Access, ...]
    calls: tuple[tuple[int, ...], ...]
    traps: int
    exits: tuple[VeInfo, ...]


class _Watch(TrapListener):
    """Counts the #VEs of the instruction under test."""

    def __init__(self) -> None:
        self.rip = -1
        self.infos: list[VeInfo] = []
        self.doubled = False

    def on_ve(self, rip: int, info: VeInfo, *, double_fault: bool) -> None:
        self.doubled |= double_fault
        if rip == self.rip:
            self.infos.append(info)

    def on_tdcall(self, rip: int, leaf: int, status: int) -> None:
        pass

    def on_tdvmcall(self, rip: int, registers: list[int]) -> None:
        pass


class Stage:
    """A guest in front of our code, in the kernel or in ring 3."""

    def __init__(self, machine: Machine, target: Target, *, user: bool) -> None:
        self.machine = machine
        self.vcpu = machine.vcpu
        self.end = USER_END if user else END
        self.segments = {name: self.vcpu.segment(name).base for name in ("fs", "gs")}
        vcpu = self.vcpu
        self._ram = vcpu.memory.ram
        self._window = Window(vcpu, user=user)
        self._refusals = target.addresses(REFUSALS)
        if not self._refusals:
            raise BadMachineError("the kernel has none of the functions that end an oops.")
        self._watch = _Watch()
        self._host = WorldHost(MMIO_GPA | vcpu.memory.shared_bit, OPERAND_SIZE)
        with ExitStack() as held:
            held.enter_context(machine.apic.holding())
            held.enter_context(machine.module.listening(self._watch, alone=True))
            held.enter_context(machine.host.services.answering(self._host))
            vcpu.set_breakpoints(frozenset((self.end, *self._refusals)))
            vcpu.set_time_budget(_BUDGET)
            vcpu.intercept_exceptions(_ALL_EXCEPTIONS)
            self._window.enter()
            self._frozen = FrozenMachine(machine)
            self._held = held.pop_all()
        self._start = 0
        self._ending: tuple[Ending, str] | None = None
        self._fpu = vcpu.fpu
        poison = self._poisoned_fpu()
        self._frozen.restore()
        vcpu.fpu = poison
        self._frozen.keep_cpu()

    def leave(self) -> None:
        """Let the guest go on from where the stage found it."""
        vcpu = self.vcpu
        self._frozen.restore()
        self._window.leave()
        vcpu.fpu = self._fpu
        self._held.close()
        vcpu.set_breakpoints(frozenset())
        vcpu.intercept_exceptions(frozenset({VECTOR_DOUBLE_FAULT}))
        vcpu.set_time_budget(1)

    def _poisoned_fpu(self) -> bytes:
        """Return x87 and SSE registers of which none is zero; those at hand without SSE."""
        loads = b"".join(
            bytes([0xF3, *([0x44] if number > 7 else []), 0x0F, 0x6F, 0x83 | (number & 7) << 3])
            + (number * 16).to_bytes(4, "little")
            for number in range(16)
        )
        code = _FNINIT + _FLD1 * 8 + loads  # movdqu xmmN, [rbx + 16 N]
        memory = bytes(number % 251 + 1 for number in range(OPERAND_SIZE))
        regs = [0] * 16
        regs[Reg.RBX] = (self.end & -PAGE) + OPERAND_AT
        regs[Reg.RSP] = self.stack_top
        loaded = self.native(Setup(code, tuple(regs), 2, memory, b"", World(memory)))
        return loaded.fpu if loaded.ending == "done" else self._fpu

    def native(self, setup: Setup) -> Outcome:
        """Execute the instruction on plain memory, or on the devices themselves."""
        self._prepare(setup, (False, False))
        self._world = setup.world
        self.vcpu.run(self._on_native_exit)
        return self._outcome(setup, self._plain_memory())

    def trapped(self, setup: Setup) -> Outcome:
        """Execute it through the kernel's handler; with `setup.mmio`, the operand is on MMIO."""
        self._prepare(setup, setup.mmio)
        self._rewritten = setup.rewritten
        if setup.inject is not None:
            offset = (setup.inject - OPERAND_AT) % OPERAND_SIZE
            gpa = (MMIO_GPA | self.vcpu.memory.shared_bit) + offset
            self.machine.module.inject_ve(
                VeInfo(ExitReason.EPT_VIOLATION, 0x180 | 1 + setup.inject_write, setup.inject, gpa)
            )
        self.vcpu.run(self._on_trapped_exit)
        sides = (self._plain_memory(), bytes(setup.world.memory))
        memory = b"".join(
            sides[is_mmio][page * PAGE : (page + 1) * PAGE]
            for page, is_mmio in enumerate(setup.mmio)
        )
        return self._outcome(setup, memory)

    def _plain_memory(self) -> bytes:
        return bytes(self._ram[OPERAND_GPA : OPERAND_GPA + OPERAND_SIZE])

    def _prepare(self, setup: Setup, mmio: tuple[bool, ...]) -> None:
        vcpu = self.vcpu
        self._frozen.restore()
        if any(mmio):
            self._window.aim(mmio)
        self._start = self.end - len(setup.code)
        # A block of code ends with UD2, or hundreds of zero bytes would be translated each time.
        self._write(CODE_GPA + (self._start & PAGE - 1), setup.code + _UD2)
        self._write(OPERAND_GPA, setup.operand)
        self._write(STACK_GPA + STACK_SIZE - len(setup.stack), setup.stack)
        regs = vcpu.regs
        for number, value in enumerate(setup.regs):
            regs[number] = value
        regs[Reg.RIP] = self._start
        vcpu.rflags = setup.rflags
        self._watch.rip = self._start
        self._watch.infos.clear()
        self._watch.doubled = False
        self._ending = None
        self._rewritten = b""
        self._host.begin(setup.world, setup.garbage)
        setup.world.accesses.clear()

    def _write(self, gpa: int, data: bytes) -> None:
        self._ram[gpa : gpa + len(data)] = data
        self.vcpu.memory.code_changed(gpa, len(data))

    def _outcome(self, setup: Setup, memory: bytes) -> Outcome:
        assert self._ending is not None
        vcpu = self.vcpu
        used = min(max(self.stack_top - setup.regs[Reg.RSP], 0), STACK_SIZE)
        end = STACK_GPA + STACK_SIZE
        return Outcome(
            *self._ending,
            tuple(vcpu.regs[:16]),
            vcpu.rflags,
            memory,
            bytes(self._ram[end - used : end]),
            vcpu.fpu,
            tuple(setup.world.accesses),
            tuple(self._host.calls),
            len(self._watch.infos),
            tuple(self._watch.infos[:2]),
        )

    @property
    def stack_top(self) -> int:
        """The address behind our stack."""
        return (self.end & -PAGE) + 0x4000 + STACK_SIZE

    def _finish(self, ending: Ending, detail: str = "") -> None:
        if self._ending is None:
            self._ending = (ending, detail)
        self.vcpu.stop()

    def _on_native_exit(self, exit_: Exit) -> None:
        if exit_ is Exit.BREAKPOINT:
            self._on_breakpoint()
        elif exit_ is Exit.EXCEPTION:
            self._finish("fault", str(self.vcpu.fault.vector))
        elif exit_ is Exit.UNDEFINED:
            self._finish("fault", "6")
        elif exit_ in reference.SERVED:
            if not reference.serve(self.vcpu, exit_, self._world):
                self._finish("fault", str(_VECTOR_PF))
        else:
            self._finish("dead", exit_.name.lower())

    def _on_trapped_exit(self, exit_: Exit) -> None:
        vcpu = self.vcpu
        if exit_ is Exit.BREAKPOINT:
            self._on_breakpoint()
        elif exit_ is Exit.BOUNDARY:
            self._finish("hang", "the handler does not return")
        elif exit_ is Exit.EXCEPTION and vcpu.regs[Reg.RIP] == self._start:
            self._finish("fault", str(vcpu.fault.vector))
        else:
            if exit_ is Exit.UNDEFINED and vcpu.regs[Reg.RIP] == self._start:
                self._finish("fault", "6")
                return
            self.machine.module.on_exit(exit_)
            if self._watch.doubled:
                self._finish("dead", "double fault")
            elif self.machine.host.outcome is not None:
                self._finish("dead", self.machine.host.outcome.detail)
            elif len(self._watch.infos) > _MAX_TRAPS:
                self._finish("hang", "the instruction traps again and again")
            elif self._rewritten and self._watch.infos:
                self._write(CODE_GPA + (self._start & PAGE - 1), self._rewritten)
                self._rewritten = b""

    def _on_breakpoint(self) -> None:
        rip = int(self.vcpu.regs[Reg.RIP])
        if rip == self.end:
            self._finish("done")
        else:
            self._finish("refused", self._refusals.get(rip, ""))
