"""The one virtual CPU on Unicorn: its parts put together, and the loop that runs it.

See `trapline.cpu.engine.Vcpu`. Methods of that protocol are those of the parts.
"""

from typing import TYPE_CHECKING, Final

from trapline.base.errors import EngineMismatchError
from trapline.cpu.engine import CrWrite, EptViolation, Exit, ExitHandler, Fault, IoAccess
from trapline.cpu.unicorn.boundaries import Boundaries
from trapline.cpu.unicorn.clock import BYTES_PER_CYCLE, Clock
from trapline.cpu.unicorn.codehooks import CodeHooks
from trapline.cpu.unicorn.control import ControlPages
from trapline.cpu.unicorn.core import Core
from trapline.cpu.unicorn.crwrites import CrWrites
from trapline.cpu.unicorn.delivery import EventDelivery
from trapline.cpu.unicorn.emulate import InstructionEmulator
from trapline.cpu.unicorn.entropy import Entropy
from trapline.cpu.unicorn.exits import PLAIN, Exits
from trapline.cpu.unicorn.instruction import InstructionView
from trapline.cpu.unicorn.libunicorn import EXCP_VMEXIT, Env, HFlags
from trapline.cpu.unicorn.linear import LinearMemory
from trapline.cpu.unicorn.memory import UnicornMemory
from trapline.cpu.unicorn.msrs import NativeMsrs
from trapline.cpu.unicorn.native import NativeHooks
from trapline.cpu.unicorn.registerfile import RFLAGS_FIXED, RFLAGS_WRITABLE, RegisterFile
from trapline.cpu.unicorn.slots import IN_DELIVERY_FLAG, DeliveryKind, Slot

if TYPE_CHECKING:
    from trapline.cpu.unicorn.parts import Decoder, Stateful

_EXIT: Final = Slot.EXIT
_BYTES: Final = Slot.BYTES
_HFLAGS: Final = Env.HFLAGS // 4
_RFLAGS: Final = Env.EFLAGS // 8
_CPL: Final = HFlags.CPL


class UnicornVcpu:
    """A CPU in the state of reset, in real mode; `seed` is for what chance decides."""

    def __init__(self, core: Core, memory: UnicornMemory, control: ControlPages, seed: int) -> None:
        self.memory = memory
        self._core = core
        self._env32, self._env64 = core.fields.env32, core.fields.env64
        self.hooks = hooks = NativeHooks(core, memory)
        self._slots = slots = hooks.slots
        self._stopping = False
        self._stuck_at = -1
        self._closed = False

        self._registers = registers = RegisterFile(core)
        self._linear = linear = LinearMemory(core, registers, memory)
        self._clock = clock = Clock(slots)
        self._events = events = EventDelivery(core, slots)
        self._instruction = instruction = InstructionView(slots, registers, linear)
        self._boundaries = boundaries = Boundaries(core, slots, registers, events)
        entropy = Entropy(seed)
        code = CodeHooks(core, hooks, clock, boundaries)
        msrs = NativeMsrs(control, slots, registers, clock, events, instruction)
        emulation = InstructionEmulator(slots, registers, clock, events, instruction, entropy)
        self._cr_writes = CrWrites(core, registers, events, instruction, linear)
        self._exits = Exits(
            core,
            control,
            slots,
            registers,
            linear,
            events,
            instruction,
            emulation,
        )
        self._decoders: dict[int, Decoder] = {
            EXCP_VMEXIT + number: decoder
            for part in (boundaries, code, msrs, emulation, self._cr_writes, self._exits)
            for number, decoder in part.decoders.items()
        }
        # Those with a state that is not in the core's or in the slots.
        self.stateful: tuple[Stateful, ...] = (
            registers,
            clock,
            events,
            boundaries,
            entropy,
            self._cr_writes,
            self._exits,
        )

        self.regs = registers.regs
        self.cr, self.set_cr, self.dr = registers.cr, registers.set_cr, registers.dr
        self.segment, self.set_segment = registers.segment, registers.set_segment
        self.msr, self.set_msr = registers.msr, registers.set_msr
        self.native_msr = msrs.native_msr
        self.translate, self.read, self.write = linear.translate, linear.read, linear.write
        self.intercept_exceptions = events.intercept_exceptions
        self.deliver = events.deliver
        self.deliver_interrupt = events.deliver_interrupt
        self.deliver_nmi = events.deliver_nmi
        self.advance = events.advance
        self.request_interrupt_window = events.request_interrupt_window
        self.request_nmi_window = boundaries.request_nmi_window
        self.request_boundary = boundaries.request_boundary
        self.set_time_budget = boundaries.set_time_budget
        self.watch_cr = self._cr_writes.watch_cr
        self.set_instruction_budget = code.set_instruction_budget
        self.set_breakpoints = code.set_breakpoints
        self.watch_entries = code.watch_entries
        self.watch_iret = boundaries.watch_iret
        self.reseed = entropy.reseed
        self.exact_counts = code.exact_counts

    # `cycles`, `rflags` and `cpl` are asked for several times a trap: what a call of the part's own
    # would cost is saved.

    @property
    def cycles(self) -> int:
        """Virtual TSC."""
        return self._clock.base + self._slots[_BYTES] // BYTES_PER_CYCLE

    @cycles.setter
    def cycles(self, value: int) -> None:
        self._clock.cycles = value

    @property
    def instructions(self) -> int:
        """Instructions retired; without exact_counts() estimated from code bytes."""
        return self._clock.instructions

    @property
    def cpuid_features(self) -> dict[tuple[int, int, str], int]:
        """The CPUID feature bits that the core can execute now."""
        return self._registers.cpuid_features

    @property
    def rflags(self) -> int:
        """RFLAGS, complete."""
        return self._env64[_RFLAGS]

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._env64[_RFLAGS] = value & RFLAGS_WRITABLE | RFLAGS_FIXED

    @property
    def fpu(self) -> bytes:
        """The x87 and SSE registers with their control words."""
        return self._registers.fpu

    @fpu.setter
    def fpu(self, value: bytes) -> None:
        self._registers.fpu = value

    @property
    def cpl(self) -> int:
        """Current privilege level."""
        return self._env32[_HFLAGS] & _CPL

    @property
    def interrupt_shadow(self) -> bool:
        """The instruction before was STI (with IF clear) or MOV/POP SS."""
        return self._registers.interrupt_shadow

    @property
    def nmi_blocked(self) -> bool:
        """An NMI was delivered and no IRET executed since."""
        return self._events.nmi_blocked

    @property
    def vectoring(self) -> int | None:
        """Vector of the event whose delivery ended in the exit at hand, if any."""
        return self._events.vectoring

    # Details of the exit at hand.

    @property
    def length(self) -> int:
        """Length of the instruction that exited; 0 if it cannot be read or decoded."""
        return self._instruction.length

    @property
    def io(self) -> IoAccess:
        """The port access behind Exit.IO."""
        return self._instruction.io

    @property
    def cr_write(self) -> CrWrite:
        """The write behind Exit.CR_WRITE."""
        return self._cr_writes.last

    @property
    def fault(self) -> Fault:
        """The exception behind Exit.EXCEPTION."""
        return self._exits.fault

    @property
    def ept(self) -> EptViolation:
        """The access behind Exit.EPT_VIOLATION."""
        return self._exits.ept

    # Running.

    def run(self, handler: ExitHandler) -> None:
        """Run until `stop`, calling `handler` on each exit."""
        self._start()
        core, events = self._core, self._events
        enter, slots, plain, decode = self.hooks.enter, self._slots, PLAIN, self._decode
        while not self._stopping:
            if core.stale_tlb:
                core.flush_tlb()
            enter()
            kind = plain.get(slots[0]) or decode()
            if kind is None:
                continue
            handler(kind)
            if events.vectoring is not None:
                events.requeue()
            if events.triple_fault:
                events.triple_fault = False
                handler(Exit.TRIPLE_FAULT)

    def stop(self) -> None:
        """Make `run` return when the handler does; callable from the handler only."""
        self._stopping = True

    def step(self, handler: ExitHandler) -> None:
        """Execute one instruction, or deliver one event; exits on the way go to `handler`."""
        self._start()
        core, events, boundaries = self._core, self._events, self._boundaries
        boundaries.is_stepping = True
        try:
            while boundaries.is_stepping and not self._stopping:
                if core.stale_tlb:
                    core.flush_tlb()
                boundaries.arm_step()
                rip = self.regs[16]
                self.hooks.enter()
                kind = PLAIN.get(self._slots[0]) or self._decode()
                if kind is not None:
                    handler(kind)
                if events.vectoring is not None:
                    events.requeue()
                elif self._slots[Slot.KIND] == DeliveryKind.NONE and self.regs[16] != rip:
                    boundaries.is_stepping = False
        finally:
            boundaries.end_step()

    def close(self) -> None:
        """Free the hooks; the core must be gone."""
        self._closed = True
        self.hooks.close()

    def _start(self) -> None:
        if self._closed:
            raise ValueError("the engine is closed")
        self._stopping = False
        self._boundaries.enter()

    def _decode(self) -> Exit | None:
        """Name the exit, or handle it and return None."""
        slots = self._slots
        code = slots[_EXIT]
        if code & IN_DELIVERY_FLAG:
            code ^= IN_DELIVERY_FLAG
            slots[Slot.EXIT] = code
            self._events.vectoring = slots[Slot.IN_VECTOR]
            self._events.interrupted = slots[Slot.IN_KIND]
            slots[Slot.IN_KIND] = DeliveryKind.NONE
            if code in PLAIN:
                return PLAIN[code]
        decoder = self._decoders.get(code)
        if decoder is None:
            self._no_exit(code)
            return None
        return decoder()

    def _no_exit(self, code: int) -> None:
        """Go on after a return without exit, unless the guest makes no progress."""
        entered = self._slots[Slot.BYTES]
        if entered == self._stuck_at:
            raise EngineMismatchError(
                f"the CPU core stopped at {self.regs[16]:#x} for a reason that trapline does "
                f"not know ({code:#x}): report it with the guest that caused it"
            )
        self._stuck_at = entered
