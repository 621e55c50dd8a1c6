"""Instructions that the engine executes itself, because the core cannot or may not.

SYSCALL and SYSENTER are stubs in the core, and its SYSRET does not look at RCX; RDTSC and RDRAND
would read the host; INT n must push the address of the next instruction yet fault at its own. Each
method follows the operation section of the SDM, vol. 2.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import iced_x86 as ix

from trapline.cpu.engine import Exit, SegmentRegister
from trapline.cpu.msrvalues import is_canonical
from trapline.cpu.unicorn.clock import Clock
from trapline.cpu.unicorn.delivery import BP, DB, GP, OF, UD, EventDelivery
from trapline.cpu.unicorn.entropy import Entropy
from trapline.cpu.unicorn.instruction import InstructionView, gpr_index
from trapline.cpu.unicorn.libunicorn import Svm
from trapline.cpu.unicorn.registerfile import (
    CR0_PE,
    EFER_LMA,
    EFER_SCE,
    IA32_EFER,
    IA32_FMASK,
    IA32_LSTAR,
    IA32_STAR,
    IA32_SYSENTER_CS,
    IA32_SYSENTER_EIP,
    IA32_SYSENTER_ESP,
    IA32_TSC_AUX,
    RFLAGS_IF,
    RFLAGS_RF,
    RFLAGS_VM,
    RegisterFile,
)
from trapline.cpu.unicorn.slots import DeliveryKind, Slot

if TYPE_CHECKING:
    from trapline.cpu.unicorn.parts import Decoders

_MASK64: Final = 0xFFFFFFFFFFFFFFFF
_CODE_64: Final = 0x00AF9B00
_CODE_32: Final = 0x00CF9B00
_DATA: Final = 0x00CF9300
_DPL_3: Final = 3 << 13
_SYSRET_FLAGS: Final = 0x3C7FD7
_ARITHMETIC_FLAGS: Final = 0x8D5
_CF: Final = 1
_PAUSE_CYCLES: Final = 140  # since Skylake; SDM vol. 2B, PAUSE
_RDTSC_CYCLES: Final = 25
_COUNT: Final = Slot.COUNT
_RDTSC_CODE: Final = 0x310F  # as Slot.CODE shows it


class InstructionEmulator:
    """Executes one instruction from Python."""

    def __init__(
        self,
        slots: memoryview,
        registers: RegisterFile,
        clock: Clock,
        events: EventDelivery,
        instruction: InstructionView,
        entropy: Entropy,
    ) -> None:
        self._slots = slots
        self._registers = registers
        self._regs = registers.regs
        self._clock = clock
        self._events = events
        self._instruction = instruction
        self._entropy = entropy
        self.decoders: Decoders = {
            Svm.RDTSC: self._exit_rdtsc,
            Svm.PAUSE: self._exit_pause,
            Svm.SWINT: self._exit_software_interrupt,
            Svm.ICEBP: self._exit_icebp,
            Svm.SYSCALL: self._exit_syscall,
            Svm.SYSENTER: self._exit_sysenter,
        }

    def _exit_rdtsc(self) -> None:
        """RDTSC and RDTSCP: the core exits from the latter as from the former."""
        clock = self._clock
        now = clock.cycles + _RDTSC_CYCLES + self._entropy.delay()
        clock.cycles = now
        regs = self._regs
        regs[0], regs[2] = now & 0xFFFFFFFF, now >> 32
        length = self._instruction.length
        if self._slots[Slot.CODE] & 0xFFFF != _RDTSC_CODE and self._is_rdtscp():
            regs[1] = self._registers.msr(IA32_TSC_AUX) & 0xFFFFFFFF
        self._events.advance(length)

    def _is_rdtscp(self) -> bool:
        instruction = self._instruction.decode()
        return instruction is not None and instruction.mnemonic == ix.Mnemonic.RDTSCP

    def _exit_pause(self) -> None:
        self._clock.cycles += _PAUSE_CYCLES
        self._events.advance(self._instruction.length)

    def draw_random(self, instruction: ix.Instruction) -> None:
        """RDRAND or RDSEED, which always succeed."""
        regs, registers = self._regs, self._registers
        value = self._entropy.draw()
        index = gpr_index(instruction.op0_register)
        size = ix.RegisterExt.size(instruction.op0_register)
        if size == 2:
            value = regs[index] & ~0xFFFF | value & 0xFFFF
        elif size == 4:
            value &= 0xFFFFFFFF
        regs[index] = value
        registers.rflags = registers.rflags & ~_ARITHMETIC_FLAGS | _CF
        self._events.advance(instruction.len)

    def _exit_software_interrupt(self) -> Exit | None:
        instruction = self._instruction.decode()
        if instruction is None:
            return Exit.UNDEFINED
        vector = {ix.Mnemonic.INT3: BP, ix.Mnemonic.INTO: OF}.get(instruction.mnemonic)
        if vector is None:
            vector = instruction.immediate8
        self._slots[Slot.COUNT] += 1
        next_rip = self._regs[16] + instruction.len & _MASK64
        self._events.queue(DeliveryKind.SOFTWARE, vector, 0, next_rip)
        return None

    def _exit_icebp(self) -> None:
        self._events.advance(self._instruction.length)
        self._events.queue(DeliveryKind.EXCEPTION, DB, 0)

    def _exit_syscall(self) -> None:
        registers = self._registers
        if registers.bits != 64 or not registers.msr(IA32_EFER) & EFER_SCE:
            self._events.deliver(UD)
            return
        regs, rflags = self._regs, registers.rflags
        regs[1] = regs[16] + self._instruction.length & _MASK64
        regs[11] = rflags & ~RFLAGS_RF
        regs[16] = registers.msr(IA32_LSTAR)
        registers.rflags = rflags & ~registers.msr(IA32_FMASK) & ~RFLAGS_RF
        self._enter_ring_0(registers.msr(IA32_STAR) >> 32 & 0xFFFC, is_64=True)

    def sysret(self, *, is_64: bool) -> None:
        """SYSRET, with REX.W if `is_64`.

        The operand is looked at before the privilege changes: an RCX that is not canonical is a
        #GP at CPL 0, while RSP is the user's already.
        """
        registers, regs = self._registers, self._regs
        if registers.bits != 64 or not registers.msr(IA32_EFER) & EFER_SCE:
            self._events.deliver(UD)
            return
        target = regs[1] if is_64 else regs[1] & 0xFFFFFFFF
        if registers.cpl or not is_canonical(target):
            self._events.deliver(GP)
            return
        regs[16] = target
        registers.rflags = regs[11] & _SYSRET_FLAGS
        base = registers.msr(IA32_STAR) >> 48
        code = (_CODE_64 if is_64 else _CODE_32) | _DPL_3
        self._load(base + 16 if is_64 else base, base + 8, 3, code, _DATA | _DPL_3)

    def _exit_sysenter(self) -> None:
        registers = self._registers
        selector = registers.msr(IA32_SYSENTER_CS) & 0xFFFC
        if not registers.cr(0) & CR0_PE or not selector:
            self._events.deliver(GP)
            return
        is_64 = bool(registers.msr(IA32_EFER) & EFER_LMA)
        mask = _MASK64 if is_64 else 0xFFFFFFFF
        self._regs[4] = registers.msr(IA32_SYSENTER_ESP) & mask
        self._regs[16] = registers.msr(IA32_SYSENTER_EIP) & mask
        registers.rflags &= ~(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF)
        self._enter_ring_0(selector, is_64=is_64)

    def _enter_ring_0(self, selector: int, *, is_64: bool) -> None:
        self._load(selector, selector + 8, 0, _CODE_64 if is_64 else _CODE_32, _DATA)

    def _load(self, cs: int, ss: int, rpl: int, code: int, data: int) -> None:
        """Load flat CS and SS with these attributes, and count the instruction."""
        self._registers.load_segment("cs", _flat(cs & 0xFFFF | rpl, code))
        self._registers.set_segment("ss", _flat(ss & 0xFFFF | rpl, data))
        self._slots[_COUNT] += 1


@lru_cache(64)
def _flat(selector: int, attributes: int) -> SegmentRegister:
    return SegmentRegister(selector, 0, 0xFFFFFFFF, attributes)
