"""From the core's exits to `Exit`: what is told to the handler, what the engine does itself."""

from collections.abc import Callable, Mapping
from typing import Final

import iced_x86 as ix

from trapline.cpu.engine import EptViolation, Exit, Fault
from trapline.cpu.unicorn.control import ControlPages
from trapline.cpu.unicorn.emulate import Emulation
from trapline.cpu.unicorn.events import GP, TS, UD
from trapline.cpu.unicorn.exitinsn import TDCALL
from trapline.cpu.unicorn.layout import (
    EXCP_VMEXIT,
    NPF_FETCH,
    NPF_WRITE,
    Env,
    HFlags,
    Svm,
)
from trapline.cpu.unicorn.slots import Delivery, Slot, Walk
from trapline.cpu.unicorn.state import IA32_TSC, is_core_msr

_CODE, _INFO = Slot.CODE, Slot.INFO
_HFLAGS: Final = Env.HFLAGS // 4
_CPL, _CS64 = HFlags.CPL, HFlags.CS64
_CPL_CS64: Final = HFlags.CPL | HFlags.CS64
_IDT: Final = 2  # in an error code: it is about a gate

Decoder = Callable[[], Exit | None]


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


class Exits(Emulation):
    """Decoding of exits. Each `_exit_*` returns what the handler is told, or None."""

    _control: ControlPages

    def _init_exits(self, seed: int) -> None:
        self._init_instructions()
        self._init_emulation(seed)
        self._fault = Fault(0, 0)
        self._ept = EptViolation(0, 0, is_write=False, is_fetch=False, is_walk=False)
        self._reads: set[int] = set()
        self._writes: set[int] = set()
        decoders: dict[int, Decoder] = {
            Svm.EXCEPTION + vector: self._exit_exception for vector in range(32)
        }
        decoders |= {
            Svm.MSR: self._exit_msr,
            Svm.EXCEPTION + UD: self._exit_undefined,
            Svm.IOIO: self._exit_io,
            Svm.NPF: self._exit_ept,
            Svm.RDTSC: self._exit_rdtsc,
            Svm.PAUSE: self._exit_pause,
            Svm.WBINVD: self._exit_wbinvd,
            Svm.SWINT: self._exit_software_interrupt,
            Svm.ICEBP: self._exit_icebp,
            Svm.SYSCALL: self._exit_syscall,
            Svm.SYSENTER: self._exit_sysenter,
            Svm.CR_WRITE + 0: lambda: self._exit_cr(0),
            Svm.CR_WRITE + 4: lambda: self._exit_cr(4),
        }
        self._decoders = {EXCP_VMEXIT + code: decoder for code, decoder in decoders.items()}

    @property
    def fault(self) -> Fault:
        """The exception behind Exit.EXCEPTION."""
        return self._fault

    @property
    def ept(self) -> EptViolation:
        """The access behind Exit.EPT_VIOLATION."""
        return self._ept

    def native_msr(self, index: int, *, read: bool, write: bool) -> None:
        """Let RDMSR and WRMSR of this MSR act on the CPU's own value, without an exit.

        The core acts upon those it knows; the engine keeps the others. Reading
        IA32_TIME_STAMP_COUNTER gives `cycles`.
        """
        core = is_core_msr(index)
        for wanted, emulated, bit in ((read, self._reads, 1), (write, self._writes, 2)):
            self._control.pass_msr(index, bit, passes=wanted and core)
            if wanted and not core:
                emulated.add(index)
            else:
                emulated.discard(index)

    def _exit_msr(self) -> Exit | None:
        regs = self.regs
        index = regs[1] & 0xFFFFFFFF
        if self._slots[_INFO]:
            if index not in self._writes:
                return Exit.WRMSR
            self.set_msr(index, (regs[2] & 0xFFFFFFFF) << 32 | regs[0] & 0xFFFFFFFF)
        else:
            if index not in self._reads:
                return Exit.RDMSR
            value = self.cycles if index == IA32_TSC else self.msr(index)
            regs[0], regs[2] = value & 0xFFFFFFFF, value >> 32
        self.advance(self.length)
        return None

    def _exit_wbinvd(self) -> Exit:
        """Tell WBINVD and INVD apart: the core takes one for the other (translate.c, 0x108)."""
        instruction = self._instruction()
        if instruction is not None and instruction.mnemonic == ix.Mnemonic.INVD:
            return Exit.INVD
        return Exit.WBINVD

    def _exit_undefined(self) -> Exit | None:
        if self._slots[_CODE] & 0xFFFFFFFF == TDCALL:
            flags = self._env32[_HFLAGS]
            return Exit.TDCALL if flags & _CPL_CS64 == _CS64 else self._exit_tdcall()
        instruction = self._instruction()
        if instruction is None:
            return Exit.UNDEFINED
        if instruction.mnemonic == ix.Mnemonic.TDCALL:
            return self._exit_tdcall()
        if instruction.mnemonic == ix.Mnemonic.VMCALL:
            return Exit.VMCALL
        if instruction.mnemonic in {ix.Mnemonic.RDRAND, ix.Mnemonic.RDSEED}:
            self._draw_random(instruction)
            return None
        return Exit.UNDEFINED

    def _exit_tdcall(self) -> Exit | None:
        """TDCALL is for 64-bit code at CPL 0; elsewhere it is a #GP(0)."""
        flags = self._env32[Env.HFLAGS // 4]
        if flags & HFlags.CPL or not flags & HFlags.CS64:
            self.deliver(GP)
            return None
        return Exit.TDCALL

    def _exit_io(self) -> Exit | None:
        if self._env32[_HFLAGS] & _CPL and not self._may_do_io():
            self.deliver(GP)
            return None
        return Exit.IO

    def _exit_ept(self) -> Exit:
        slots = self._slots
        gpa, gla, information = self._control.fault_gpa, slots[Slot.GLA], slots[Slot.INFO]
        walk = slots[Slot.WALK]
        if walk == Walk.UNKNOWN:
            target = self.translate(gla)
            walk = Walk.PAGE if target is not None and (target ^ gpa) >> 12 == 0 else Walk.TABLE
        is_walk = walk == Walk.TABLE
        self._ept = EptViolation(
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
        self._fault = Fault(vector, self._error_code(vector, slots[Slot.INFO]))
        return Exit.EXCEPTION

    def _error_code(self, vector: int, code: int) -> int:
        """Correct what the native code corrects of a fault that does not exit."""
        if self._vectoring is None or not TS <= vector <= GP:
            return code
        if code & _IDT and self._env32[Env.HFLAGS // 4] & HFlags.LMA:
            code = code >> 1 & ~7 | code & 7
        return code | (self._interrupted != Delivery.SOFTWARE)
