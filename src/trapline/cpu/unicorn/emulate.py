"""Instructions that the engine executes itself, because the core cannot or may not.

SYSCALL and SYSENTER are stubs in the core; RDTSC and RDRAND would read the host; INT n must
push the address of the next instruction yet fault at its own; writes to CR0 and CR4 are
unchecked by the core. Each method follows the operation section of the SDM, vol. 2.
"""

from typing import Final

import iced_x86 as ix

from trapline.cpu.engine import CrWrite, Exit, Segment
from trapline.cpu.unicorn.events import BP, DB, GP, OF, UD
from trapline.cpu.unicorn.exitinsn import InstructionView, gpr_index
from trapline.cpu.unicorn.layout import Env, HFlags
from trapline.cpu.unicorn.slots import Delivery, Slot
from trapline.cpu.unicorn.state import (
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_SCE,
    IA32_EFER,
    IA32_FMASK,
    IA32_LSTAR,
    IA32_STAR,
    IA32_SYSENTER_CS,
    IA32_SYSENTER_EIP,
    IA32_SYSENTER_ESP,
    RFLAGS_IF,
    RFLAGS_RF,
    RFLAGS_VM,
)

_MASK64: Final = 0xFFFFFFFFFFFFFFFF
_CR0_TS, _CR0_NW, _CR0_CD = 1 << 3, 1 << 29, 1 << 30
_CR4_RESERVED: Final = ~0x1FFFFFFF | 1 << 26 | 1 << 15
# CR4 bits the core can do: VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT FSGSBASE
# OSXSAVE SMEP SMAP.
_CR4_CORE: Final = 0x3507FF
_CODE_64: Final = 0x00AF9B00
_CODE_32: Final = 0x00CF9B00
_DATA: Final = 0x00CF9300
_ARITHMETIC_FLAGS: Final = 0x8D5
_CF: Final = 1
_PAUSE_CYCLES: Final = 140  # since Skylake; SDM vol. 2B, PAUSE
_RDTSC_CYCLES: Final = 25
_RDTSC_CODE: Final = 0x310F  # as Slot.CODE shows it
_TSS_IO_MAP: Final = 0x66


class Emulation(InstructionView):
    """Executes one instruction from Python; a method returns what the handler is told."""

    cycles: int

    def _init_emulation(self, seed: int) -> None:
        self._random = seed & _MASK64
        self._noise = seed & 0x7FFFFFFF
        self._cr_masks = {0: 0, 4: 0}
        self._cr_write = CrWrite(0, 0, 0)
        self._fields.cr_intercepts[0] = 1 << 0 | 1 << 4

    @property
    def cr_write(self) -> CrWrite:
        """The write behind Exit.CR_WRITE."""
        return self._cr_write

    def watch_cr(self, number: int, mask: int) -> None:
        """Exit with CR_WRITE when the guest would change a bit of `mask` in CR0 or CR4."""
        self._cr_masks[number] = mask

    def _exit_rdtsc(self) -> None:
        """RDTSC and RDTSCP: the core exits from the latter as from the former."""
        # Not all reads cost the same: the noise is what entropy collectors feed on, and it
        # comes from the seed.
        self._noise = self._noise * 1103515245 + 12345 & 0x7FFFFFFF
        self.cycles += _RDTSC_CYCLES + (self._noise >> 16 & 31)
        now, regs = self.cycles, self.regs
        regs[0], regs[2] = now & 0xFFFFFFFF, now >> 32
        length = self.length
        if self._slots[Slot.CODE] & 0xFFFF != _RDTSC_CODE and self._is_rdtscp():
            regs[1] = self._env32[Env.TSC_AUX // 4]
        self.advance(length)

    def _is_rdtscp(self) -> bool:
        instruction = self._instruction()
        return instruction is not None and instruction.mnemonic == ix.Mnemonic.RDTSCP

    def _exit_pause(self) -> None:
        self.cycles += _PAUSE_CYCLES
        self.advance(self.length)

    def _draw_random(self, instruction: ix.Instruction) -> None:
        """RDRAND, RDSEED from a seeded splitmix64, so that runs repeat."""
        self._random = self._random + 0x9E3779B97F4A7C15 & _MASK64
        value = self._random
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
        value ^= value >> 31
        index = gpr_index(instruction.op0_register)
        size = ix.RegisterExt.size(instruction.op0_register)
        if size == 2:
            value = self.regs[index] & ~0xFFFF | value & 0xFFFF
        elif size == 4:
            value &= 0xFFFFFFFF
        self.regs[index] = value
        self.rflags = self.rflags & ~_ARITHMETIC_FLAGS | _CF
        self.advance(instruction.len)

    def _exit_software_interrupt(self) -> Exit | None:
        instruction = self._instruction()
        if instruction is None:
            return Exit.UNDEFINED
        vector = {ix.Mnemonic.INT3: BP, ix.Mnemonic.INTO: OF}.get(instruction.mnemonic)
        if vector is None:
            vector = instruction.immediate8
        self._slots[Slot.COUNT] += 1
        next_rip = self.regs[16] + instruction.len & _MASK64
        self._queue(Delivery.SOFTWARE, vector, 0, next_rip)
        return None

    def _exit_icebp(self) -> None:
        self.advance(self.length)
        self._queue(Delivery.EXCEPTION, DB, 0)

    def _exit_syscall(self) -> None:
        flags = self._env32[Env.HFLAGS // 4]
        if not flags & HFlags.CS64 or not self.msr(IA32_EFER) & EFER_SCE:
            self.deliver(UD)
            return
        regs, rflags = self.regs, self.rflags
        regs[1] = regs[16] + self.length & _MASK64
        regs[11] = rflags & ~RFLAGS_RF
        regs[16] = self.msr(IA32_LSTAR)
        self.rflags = rflags & ~self.msr(IA32_FMASK) & ~RFLAGS_RF
        self._enter_ring_0(self.msr(IA32_STAR) >> 32 & 0xFFFC, is_64=True)

    def _exit_sysenter(self) -> None:
        selector = self.msr(IA32_SYSENTER_CS) & 0xFFFC
        if not self.cr(0) & CR0_PE or not selector:
            self.deliver(GP)
            return
        is_64 = bool(self._env32[Env.HFLAGS // 4] & HFlags.LMA)
        mask = _MASK64 if is_64 else 0xFFFFFFFF
        self.regs[4] = self.msr(IA32_SYSENTER_ESP) & mask
        self.regs[16] = self.msr(IA32_SYSENTER_EIP) & mask
        self.rflags &= ~(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF)
        self._enter_ring_0(selector, is_64=is_64)

    def _enter_ring_0(self, selector: int, *, is_64: bool) -> None:
        code = _CODE_64 if is_64 else _CODE_32
        self._load_segment("cs", Segment(selector, 0, 0xFFFFFFFF, code))
        self.set_segment("ss", Segment(selector + 8 & 0xFFFF, 0, 0xFFFFFFFF, _DATA))
        self._slots[Slot.COUNT] += 1

    def _exit_cr(self, number: int) -> Exit | None:
        """MOV to CR0 or CR4, LMSW, CLTS; SDM vol. 3A section 2.5 has the reserved bits."""
        instruction = self._instruction()
        value = None if instruction is None else self._cr_operand(instruction)
        if instruction is None or value is None:
            return Exit.UNDEFINED
        if not self._is_valid_cr(number, value):
            self.deliver(GP)
            return None
        if (value ^ self.cr(number)) & self._cr_masks[number]:
            self._cr_write = CrWrite(number, value, instruction.len)
            return Exit.CR_WRITE
        if number == 4 and value & ~_CR4_CORE:
            self.deliver(GP)
            return None
        self.set_cr(number, value)
        self.advance(instruction.len)
        return None

    def _cr_operand(self, instruction: ix.Instruction) -> int | None:
        if instruction.mnemonic == ix.Mnemonic.CLTS:
            return self.cr(0) & ~_CR0_TS
        if instruction.mnemonic == ix.Mnemonic.MOV:
            value = self.regs[gpr_index(instruction.op1_register)]
            return value if self._bits() == 64 else value & 0xFFFFFFFF
        if instruction.mnemonic != ix.Mnemonic.LMSW:
            return None
        if instruction.op0_kind == ix.OpKind.REGISTER:
            word = self.regs[gpr_index(instruction.op0_register)]
        else:
            memory = self.read(self._memory_operand(instruction), 2)
            if memory is None:
                return None
            word = int.from_bytes(memory, "little")
        # LMSW can set PE but not clear it, and reaches the low four bits only.
        return self.cr(0) & ~0xE | word & 0xF

    def _is_valid_cr(self, number: int, value: int) -> bool:
        if number == 4:
            leaves_pae = self.msr(IA32_EFER) & EFER_LMA and not value & CR4_PAE
            return not value & _CR4_RESERVED and not leaves_pae
        return not (
            value >> 32
            or (value & CR0_PG and not value & CR0_PE)
            or (value & _CR0_NW and not value & _CR0_CD)
            or (self._bits() == 64 and not value & CR0_PG)
        )

    def _may_do_io(self) -> bool:
        """IOPL, then the I/O permission bitmap of the TSS: SDM vol. 1 section 19.5."""
        rflags = self.rflags
        if self.cpl <= rflags >> 12 & 3 and not rflags & RFLAGS_VM:
            return True
        tss = self.segment("tr")
        information = self._slots[Slot.INFO]
        port, size = information >> 16, information >> 4 & 7
        base = self.read(tss.base + _TSS_IO_MAP, 2)
        if base is None or tss.limit <= _TSS_IO_MAP:
            return False
        at = int.from_bytes(base, "little") + port // 8
        bitmap = self.read(tss.base + at, 2)
        if bitmap is None or at + 1 > tss.limit:
            return False
        return not int.from_bytes(bitmap, "little") & (1 << size) - 1 << port % 8
