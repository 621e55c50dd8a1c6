"""Writes to CR0 and CR4, which the core does not check: MOV, LMSW, CLTS."""

from typing import TYPE_CHECKING, Final

import iced_x86 as ix

from trapline.cpu.engine import CrWrite, Exit
from trapline.cpu.unicorn.core import Core
from trapline.cpu.unicorn.delivery import GP, EventDelivery
from trapline.cpu.unicorn.instruction import InstructionView, gpr_index
from trapline.cpu.unicorn.libunicorn import Svm
from trapline.cpu.unicorn.linear import LinearMemory
from trapline.cpu.unicorn.registerfile import (
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    IA32_EFER,
    RegisterFile,
)

if TYPE_CHECKING:
    from trapline.cpu.unicorn.parts import Decoders

_CR0_TS, _CR0_NW, _CR0_CD = 1 << 3, 1 << 29, 1 << 30
_CR4_RESERVED: Final = ~0x1FFFFFFF | 1 << 26 | 1 << 15
# CR4 bits the core can do: VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT FSGSBASE
# OSXSAVE SMEP SMAP.
_CR4_CORE: Final = 0x3507FF


class CrWrites:
    """Carries them out, or tells of them. `last` is the one behind Exit.CR_WRITE."""

    def __init__(
        self,
        core: Core,
        registers: RegisterFile,
        events: EventDelivery,
        instruction: InstructionView,
        linear: LinearMemory,
    ) -> None:
        self._registers = registers
        self._events = events
        self._instruction = instruction
        self._read = linear.read
        self._masks = {0: 0, 4: 0}
        self.last = CrWrite(0, 0, 0)
        core.fields.cr_intercepts[0] = 1 << 0 | 1 << 4
        self.decoders: Decoders = {
            Svm.CR_WRITE + 0: lambda: self._exit_cr(0),
            Svm.CR_WRITE + 4: lambda: self._exit_cr(4),
        }

    def watch_cr(self, number: int, mask: int) -> None:
        """Exit with CR_WRITE when the guest would change a bit of `mask` in CR0 or CR4."""
        self._masks[number] = mask

    def save(self) -> CrWrite:
        """Return the details of the exit at hand."""
        return self.last

    def load(self, saved: CrWrite) -> None:
        """Return to a saved state."""
        self.last = saved

    def _exit_cr(self, number: int) -> Exit | None:
        """SDM vol. 3A section 2.5 has the reserved bits."""
        instruction = self._instruction.decode()
        value = None if instruction is None else self._operand(instruction)
        if instruction is None or value is None:
            return Exit.UNDEFINED
        # An exit comes before the check of the value: SDM vol. 3C section 26.1.1.
        if (value ^ self._registers.cr(number)) & self._masks[number]:
            self.last = CrWrite(number, value, instruction.len)
            return Exit.CR_WRITE
        if not self._is_valid(number, value) or (number == 4 and value & ~_CR4_CORE):
            self._events.deliver(GP)
            return None
        self._registers.set_cr(number, value)
        self._events.advance(instruction.len)
        return None

    def _operand(self, instruction: ix.Instruction) -> int | None:
        registers = self._registers
        if instruction.mnemonic == ix.Mnemonic.CLTS:
            return registers.cr(0) & ~_CR0_TS
        if instruction.mnemonic == ix.Mnemonic.MOV:
            value = registers.regs[gpr_index(instruction.op1_register)]
            return value if registers.bits == 64 else value & 0xFFFFFFFF
        if instruction.mnemonic != ix.Mnemonic.LMSW:
            return None
        if instruction.op0_kind == ix.OpKind.REGISTER:
            word = registers.regs[gpr_index(instruction.op0_register)]
        else:
            memory = self._read(self._instruction.memory_operand(instruction), 2)
            if memory is None:
                return None
            word = int.from_bytes(memory, "little")
        # LMSW can set PE but not clear it, and reaches the low four bits only.
        return registers.cr(0) & ~0xE | word & 0xF

    def _is_valid(self, number: int, value: int) -> bool:
        registers = self._registers
        if number == 4:
            leaves_pae = registers.msr(IA32_EFER) & EFER_LMA and not value & CR4_PAE
            return not value & _CR4_RESERVED and not leaves_pae
        return not (
            value >> 32
            or (value & CR0_PG and not value & CR0_PE)
            or (value & _CR0_NW and not value & _CR0_CD)
            or (registers.bits == 64 and not value & CR0_PG)
        )
