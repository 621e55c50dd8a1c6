"""The instruction behind an exit: its bytes, length and operands."""

from typing import TYPE_CHECKING, Final

import iced_x86 as ix

from trapline.cpu.engine import IoAccess
from trapline.cpu.unicorn.delivery import UD
from trapline.cpu.unicorn.libunicorn import EXCP_VMEXIT, Svm
from trapline.cpu.unicorn.linear import LinearMemory
from trapline.cpu.unicorn.registerfile import RegisterFile
from trapline.cpu.unicorn.slots import Slot

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Register as RegisterValue

TDCALL: Final = 0xCC010F66  # 66 0F 01 CC, as Slot.CODE shows it

# Length by exit, for the encoding without prefixes: (mask, bytes, length).
_SHORT: Final = {
    EXCP_VMEXIT + Svm.CPUID: (0xFFFF, 0xA20F, 2),
    EXCP_VMEXIT + Svm.MSR: (0xFDFF, 0x300F, 2),  # WRMSR 0F 30, RDMSR 0F 32
    EXCP_VMEXIT + Svm.HLT: (0xFF, 0xF4, 1),
    EXCP_VMEXIT + Svm.SYSCALL: (0xFFFF, 0x050F, 2),
    EXCP_VMEXIT + Svm.RDTSC: (0xFFFF, 0x310F, 2),
    EXCP_VMEXIT + Svm.PAUSE: (0xFFFF, 0x90F3, 2),
    EXCP_VMEXIT + Svm.EXCEPTION + UD: (0xFFFFFFFF, TDCALL, 4),
}
_EXIT, _CODE, _INFO = Slot.EXIT, Slot.CODE, Slot.INFO
_IOIO: Final = EXCP_VMEXIT + Svm.IOIO
_STRING_IO: Final = frozenset({0x6C, 0x6D, 0x6E, 0x6F})
_IMMEDIATE_IO: Final = frozenset({0xE4, 0xE5, 0xE6, 0xE7})
_MAX_LENGTH: Final = 15
_PAGE: Final = 4096
_CACHED: Final = 4096

_GPR: Final[dict[int, int]] = {
    getattr(ix.Register, name): index
    for index, name in enumerate(
        ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{n}" for n in range(8, 16)))
    )
}
_SEGMENTS: Final[dict[int, str]] = {
    getattr(ix.Register, name.upper()): name for name in ("es", "cs", "ss", "ds", "fs", "gs")
}


def gpr_index(register: "RegisterValue") -> int:
    """Index in Vcpu.regs of a general register of any width."""
    return _GPR[ix.RegisterExt.full_register(register)]


class InstructionView:
    """Looks at the instruction at RIP; has no effect on the guest."""

    def __init__(self, slots: memoryview, registers: RegisterFile, linear: LinearMemory) -> None:
        self._slots = slots
        self._registers = registers
        self._regs = registers.regs
        self._read = linear.read
        self._io_cache: dict[int, IoAccess] = {}

    @property
    def length(self) -> int:
        """Length of the instruction that exited; 0 if it cannot be read or decoded."""
        slots = self._slots
        exit_code = slots[_EXIT]
        short = _SHORT.get(exit_code)
        if short is not None and slots[_CODE] & short[0] == short[1]:
            return short[2]
        if exit_code == _IOIO:
            return self.io.length
        instruction = self.decode()
        return 0 if instruction is None else instruction.len

    @property
    def io(self) -> IoAccess:
        """The port access behind Exit.IO."""
        slots = self._slots
        key = slots[_CODE] << 32 | slots[_INFO]
        access = self._io_cache.get(key)
        if access is None:
            access = self._io_access(slots[_INFO])
            if len(self._io_cache) > _CACHED:
                self._io_cache.clear()
            if slots[_CODE]:
                self._io_cache[key] = access
        return access

    def _io_access(self, information: int) -> IoAccess:
        """Describe IN, OUT, INS or OUTS; `information` is port << 16, size << 4, bit 0 IN."""
        instruction = self.decode()
        opcode = 0 if instruction is None else instruction.op_code().op_code
        return IoAccess(
            port=information >> 16 & 0xFFFF,
            size=information >> 4 & 7,
            is_in=bool(information & 1),
            is_string=opcode in _STRING_IO,
            has_rep=instruction is not None
            and (instruction.has_rep_prefix or instruction.has_repne_prefix),
            immediate=opcode in _IMMEDIATE_IO,
            length=0 if instruction is None else instruction.len,
        )

    def decode(self) -> ix.Instruction | None:
        """Decode the instruction; None if it cannot be read or is none."""
        instruction = ix.Decoder(self._registers.bits, self._code_bytes()).decode()
        return None if instruction.is_invalid else instruction

    def _code_bytes(self) -> bytes:
        """Up to 15 bytes at RIP; fewer where the next page is not mapped."""
        gla = self._regs[16]
        if self._registers.bits != 64:
            gla = gla + self._registers.segment("cs").base & 0xFFFFFFFF
        in_page = min(_MAX_LENGTH, _PAGE - gla % _PAGE)
        return self._read(gla, _MAX_LENGTH) or self._read(gla, in_page) or b""

    def memory_operand(self, instruction: ix.Instruction) -> int:
        """Linear address of the instruction's explicit memory operand."""
        if instruction.memory_base in {ix.Register.RIP, ix.Register.EIP}:
            # iced decoded at address 0 and has added the length already.
            address = self._regs[16] + instruction.memory_displacement
        else:
            address = instruction.memory_displacement
            if instruction.memory_base != ix.Register.NONE:
                address += self._regs[gpr_index(instruction.memory_base)]
            if instruction.memory_index != ix.Register.NONE:
                index = self._regs[gpr_index(instruction.memory_index)]
                address += index * instruction.memory_index_scale
        name = _SEGMENTS[instruction.memory_segment]
        if self._registers.bits == 64:
            base = self._registers.segment(name).base if name in {"fs", "gs"} else 0
            return address + base & 0xFFFFFFFFFFFFFFFF
        return (address & 0xFFFFFFFF) + self._registers.segment(name).base & 0xFFFFFFFF
