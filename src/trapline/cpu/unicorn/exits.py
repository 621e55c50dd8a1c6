"""From the core's exits to `Exit`: what the handler is told."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import iced_x86 as ix

from trapline.cpu.engine import EptViolation, Exit, Fault
from trapline.cpu.unicorn.control import ControlPages
from trapline.cpu.unicorn.core import Core
from trapline.cpu.unicorn.delivery import GP, TS, UD, EventDelivery
from trapline.cpu.unicorn.emulate import InstructionEmulator
from trapline.cpu.unicorn.instruction import TDCALL, InstructionView
from trapline.cpu.unicorn.libunicorn import (
    EXCP_VMEXIT,
    NPF_FETCH,
    NPF_WRITE,
    Env,
    HFlags,
    Svm,
)
from trapline.cpu.unicorn.linear import LinearMemory
from trapline.cpu.unicorn.registerfile import RFLAGS_VM, RegisterFile
from trapline.cpu.unicorn.slots import DeliveryKind, FailedWalk, Slot

if TYPE_CHECKING:
    from trapline.cpu.unicorn.parts import Decoders

_CODE: Final = Slot.CODE
_HFLAGS: Final = Env.HFLAGS // 4
_CPL, _CS64 = HFlags.CPL, HFlags.CS64
_CPL_CS64: Final = HFlags.CPL | HFlags.CS64
_SYSRETQ: Final = 0x070F48  # as Slot.CODE shows it
_IDT: Final = 2  # in an error code: it is about a gate
_TSS_IO_MAP: Final = 0x66


def _by_index(table: Mapping[int, Exit]) -> dict[int, Exit]:
    return {EXCP_VMEXIT + code: kind for code, kind in table.items()}


# Exits that need nothing but their name.
PLAIN: Final = _by_index(
    {
        Svm.CPUID: Exit.CPUID,
        Svm.HLT: Exit.HLT,
        Svm.INVD: Exit.INVD,
        Svm.RDPMC: Exit.RDPMC,
        Svm.MONITOR: Exit.MONITOR,
        Svm.MWAIT: Exit.MWAIT,
        Svm.VINTR: Exit.INTERRUPT_WINDOW,
        Svm.SHUTDOWN: Exit.TRIPLE_FAULT,
    }
)


class Exits:
    """Exits with details, and those that privilege decides upon.

    `fault` and `ept` are what is behind Exit.EXCEPTION and Exit.EPT_VIOLATION. `emulation`
    executes RDRAND, RDSEED and SYSRET.
    """

    def __init__(
        self,
        core: Core,
        control: ControlPages,
        slots: memoryview,
        registers: RegisterFile,
        linear: LinearMemory,
        events: EventDelivery,
        instruction: InstructionView,
        emulation: InstructionEmulator,
    ) -> None:
        self._env32 = core.fields.env32
        self._control = control
        self._slots = slots
        self._registers = registers
        self._linear = linear
        self._events = events
        self._instruction = instruction
        self._emulation = emulation
        self.fault = Fault(0, 0)
        self.ept = EptViolation(0, 0, is_write=False, is_fetch=False, is_walk=False)
        self.decoders: Decoders = {
            Svm.EXCEPTION + vector: self._exit_exception for vector in range(32)
        }
        self.decoders |= {
            Svm.EXCEPTION + UD: self._exit_undefined,
            Svm.IOIO: self._exit_io,
            Svm.NPF: self._exit_ept,
            Svm.WBINVD: self._exit_wbinvd,
        }

    def save(self) -> tuple[Fault, EptViolation]:
        """Return the details of the exit at hand."""
        return self.fault, self.ept

    def load(self, saved: tuple[Fault, EptViolation]) -> None:
        """Return to a saved state."""
        self.fault, self.ept = saved

    def _exit_wbinvd(self) -> Exit:
        """Tell WBINVD and INVD apart: the core takes one for the other (translate.c, 0x108)."""
        instruction = self._instruction.decode()
        if instruction is not None and instruction.mnemonic == ix.Mnemonic.INVD:
            return Exit.INVD
        return Exit.WBINVD

    def _exit_undefined(self) -> Exit | None:
        if self._slots[_CODE] & 0xFFFFFFFF == TDCALL:
            flags = self._env32[_HFLAGS]
            return Exit.TDCALL if flags & _CPL_CS64 == _CS64 else self._exit_tdcall()
        if self._slots[_CODE] & 0xFFFFFF == _SYSRETQ:
            self._emulation.sysret(is_64=True)
            return None
        instruction = self._instruction.decode()
        if instruction is None:
            return Exit.UNDEFINED
        if instruction.mnemonic == ix.Mnemonic.TDCALL:
            return self._exit_tdcall()
        if instruction.mnemonic == ix.Mnemonic.VMCALL:
            return Exit.VMCALL
        if instruction.mnemonic in {ix.Mnemonic.RDRAND, ix.Mnemonic.RDSEED}:
            self._emulation.draw_random(instruction)
            return None
        if instruction.mnemonic in {ix.Mnemonic.SYSRET, ix.Mnemonic.SYSRETQ}:
            self._emulation.sysret(is_64=instruction.mnemonic == ix.Mnemonic.SYSRETQ)
            return None
        return Exit.UNDEFINED

    def _exit_tdcall(self) -> Exit | None:
        """TDCALL is for 64-bit code at CPL 0; elsewhere it is a #GP(0)."""
        if self._env32[_HFLAGS] & _CPL_CS64 != _CS64:
            self._events.deliver(GP)
            return None
        return Exit.TDCALL

    def _exit_io(self) -> Exit | None:
        if self._env32[_HFLAGS] & _CPL and not self._may_do_io():
            self._events.deliver(GP)
            return None
        return Exit.IO

    def _may_do_io(self) -> bool:
        """IOPL, then the I/O permission bitmap of the TSS: SDM vol. 1 section 19.5."""
        registers, read = self._registers, self._linear.read
        rflags = registers.rflags
        if registers.cpl <= rflags >> 12 & 3 and not rflags & RFLAGS_VM:
            return True
        tss = registers.segment("tr")
        information = self._slots[Slot.INFO]
        port, size = information >> 16, information >> 4 & 7
        base = read(tss.base + _TSS_IO_MAP, 2)
        if base is None or tss.limit <= _TSS_IO_MAP:
            return False
        at = int.from_bytes(base, "little") + port // 8
        bitmap = read(tss.base + at, 2)
        if bitmap is None or at + 1 > tss.limit:
            return False
        return not int.from_bytes(bitmap, "little") & (1 << size) - 1 << port % 8

    def _exit_ept(self) -> Exit:
        slots = self._slots
        gpa, gla, information = self._control.fault_gpa, slots[Slot.GLA], slots[Slot.INFO]
        walk = slots[Slot.WALK]
        if walk == FailedWalk.UNKNOWN:
            target = self._linear.translate(gla)
            walk = (
                FailedWalk.PAGE
                if target is not None and (target ^ gpa) >> 12 == 0
                else FailedWalk.TABLE
            )
        is_walk = walk == FailedWalk.TABLE
        self.ept = EptViolation(
            gpa=gpa,
            gla=gla,
            is_write=bool(information & NPF_WRITE) and not is_walk,
            is_fetch=bool(information & NPF_FETCH),
            is_walk=is_walk,
        )
        return Exit.EPT_VIOLATION

    def _exit_exception(self) -> Exit:
        slots = self._slots
        vector = slots[Slot.EXIT] - EXCP_VMEXIT - Svm.EXCEPTION
        self.fault = Fault(vector, self._error_code(vector, slots[Slot.INFO]))
        return Exit.EXCEPTION

    def _error_code(self, vector: int, code: int) -> int:
        """Correct what the native code corrects of a fault that does not exit."""
        if self._events.vectoring is None or not TS <= vector <= GP:
            return code
        if code & _IDT and self._env32[_HFLAGS] & HFlags.LMA:
            code = code >> 1 & ~7 | code & 7
        return code | (self._events.interrupted != DeliveryKind.SOFTWARE)
