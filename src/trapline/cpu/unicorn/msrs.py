"""MSRs that RDMSR and WRMSR reach without an exit."""

from typing import TYPE_CHECKING, Final

from trapline.cpu.engine import Exit
from trapline.cpu.msrvalues import CHECKED, is_taken
from trapline.cpu.unicorn.clock import Clock
from trapline.cpu.unicorn.control import ControlPages
from trapline.cpu.unicorn.delivery import GP, EventDelivery
from trapline.cpu.unicorn.instruction import InstructionView
from trapline.cpu.unicorn.libunicorn import Svm
from trapline.cpu.unicorn.registerfile import IA32_TSC, RegisterFile, is_core_msr
from trapline.cpu.unicorn.slots import Slot

if TYPE_CHECKING:
    from trapline.cpu.unicorn.parts import Decoders

_INFO: Final = Slot.INFO


class NativeMsrs:
    """The core acts upon the MSRs that it knows; the others are kept here.

    The core does not look at what is written, so that writes of MSRs that have reserved values
    come here too.
    """

    def __init__(
        self,
        control: ControlPages,
        slots: memoryview,
        registers: RegisterFile,
        clock: Clock,
        events: EventDelivery,
        instruction: InstructionView,
    ) -> None:
        self._control = control
        self._slots = slots
        self._registers = registers
        self._clock = clock
        self._events = events
        self._instruction = instruction
        self._reads: set[int] = set()
        self._writes: set[int] = set()
        self.decoders: Decoders = {Svm.MSR: self._exit_msr}

    def native_msr(self, index: int, *, read: bool, write: bool) -> None:
        """Let RDMSR and WRMSR of this MSR act on the CPU's own value, without an exit.

        Reading IA32_TIME_STAMP_COUNTER gives the cycles of the clock.
        """
        core = is_core_msr(index)
        for wanted, emulated, bit in ((read, self._reads, 1), (write, self._writes, 2)):
            passes = core and (emulated is self._reads or index not in CHECKED)
            self._control.pass_msr(index, bit, passes=wanted and passes)
            if wanted and not passes:
                emulated.add(index)
            else:
                emulated.discard(index)

    def _exit_msr(self) -> Exit | None:
        registers = self._registers
        regs = registers.regs
        index = regs[1] & 0xFFFFFFFF
        if self._slots[_INFO]:
            if index not in self._writes:
                return Exit.WRMSR
            value = (regs[2] & 0xFFFFFFFF) << 32 | regs[0] & 0xFFFFFFFF
            if not is_taken(index, value):
                self._events.deliver(GP)
                return None
            registers.set_msr(index, value)
        else:
            if index not in self._reads:
                return Exit.RDMSR
            value = self._clock.cycles if index == IA32_TSC else registers.msr(index)
            regs[0], regs[2] = value & 0xFFFFFFFF, value >> 32
        self._events.advance(self._instruction.length)
        return None
