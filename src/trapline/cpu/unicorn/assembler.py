"""A few lines over iced-x86's encoder, so that native hooks read like assembler.

Only the forms that `native` uses are here. Labels are names; every branch is near and is
fixed up by iced's block encoder when the code is placed.
"""

import ctypes
import mmap
from typing import TYPE_CHECKING

from iced_x86 import BlockEncoder, Code, Instruction, MemoryOperand, Register, RegisterExt

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Code as CodeValue
    from iced_x86._iced_x86_py import Register as RegisterValue

# Fake addresses while the code is being written: one slot for each instruction.
_SLOT = 16


class Assembler:
    """Collects instructions and labels, then encodes them for one address."""

    def __init__(self) -> None:
        self._instructions: list[Instruction] = []
        self._labels: dict[str, int] = {}
        self._branches: list[tuple[int, str]] = []

    def emit(self, instruction: Instruction) -> None:
        """Append one instruction."""
        instruction.ip = (len(self._instructions) + 1) * _SLOT
        self._instructions.append(instruction)

    def label(self, name: str) -> None:
        """Name the instruction that comes next."""
        assert name not in self._labels, name
        self._labels[name] = (len(self._instructions) + 1) * _SLOT

    def jump(self, code: "CodeValue", label: str) -> None:
        """Branch (Code.JMP_REL32_64, Code.JE_REL32_64, ...) to a label, forward or back."""
        self._branches.append((len(self._instructions), label))
        self.emit(Instruction.create_branch(code, 0))

    def set(self, register: "RegisterValue", value: int) -> None:
        """Mov register, 64-bit immediate."""
        self.emit(Instruction.create_reg_u64(Code.MOV_R64_IMM64, register, value))

    def move(self, target: "RegisterValue", source: "RegisterValue") -> None:
        """Mov target, source; both 64 bits wide, or both 32 (which clears the upper half)."""
        wide = RegisterExt.is_gpr64(target)
        code = Code.MOV_R64_RM64 if wide else Code.MOV_R32_RM32
        self.emit(Instruction.create_reg_reg(code, target, source))

    def load(self, target: "RegisterValue", base: "RegisterValue", offset: int) -> None:
        """Mov target, [base + offset], as wide as target."""
        wide = RegisterExt.is_gpr64(target)
        code = Code.MOV_R64_RM64 if wide else Code.MOV_R32_RM32
        self.emit(Instruction.create_reg_mem(code, target, _at(base, offset)))

    def store(self, base: "RegisterValue", offset: int, source: "RegisterValue") -> None:
        """Mov [base + offset], source, as wide as source."""
        wide = RegisterExt.is_gpr64(source)
        code = Code.MOV_RM64_R64 if wide else Code.MOV_RM32_R32
        self.emit(Instruction.create_mem_reg(code, _at(base, offset), source))

    def store_imm(self, base: "RegisterValue", offset: int, value: int, size: int) -> None:
        """Mov [base + offset], value; `size` bytes, 64-bit values sign-extended from 32."""
        code = {
            1: Code.MOV_RM8_IMM8,
            4: Code.MOV_RM32_IMM32,
            8: Code.MOV_RM64_IMM32,
        }[size]
        self.emit(Instruction.create_mem_i32(code, _at(base, offset), value))

    def mem_reg(
        self, code: "CodeValue", base: "RegisterValue", offset: int, register: "RegisterValue"
    ) -> None:
        """Do any `op [base + offset], register`."""
        self.emit(Instruction.create_mem_reg(code, _at(base, offset), register))

    def reg_mem(
        self, code: "CodeValue", register: "RegisterValue", base: "RegisterValue", offset: int
    ) -> None:
        """Do any `op register, [base + offset]`."""
        self.emit(Instruction.create_reg_mem(code, register, _at(base, offset)))

    def mem_imm(self, code: "CodeValue", base: "RegisterValue", offset: int, value: int) -> None:
        """Do any `op [base + offset], immediate`."""
        self.emit(Instruction.create_mem_i32(code, _at(base, offset), value))

    def mem(self, code: "CodeValue", base: "RegisterValue", offset: int) -> None:
        """Do any `op [base + offset]`."""
        self.emit(Instruction.create_mem(code, _at(base, offset)))

    def reg(self, code: "CodeValue", register: "RegisterValue") -> None:
        """Do any `op register`."""
        self.emit(Instruction.create_reg(code, register))

    def load_index(
        self, target: "RegisterValue", base: "RegisterValue", index: "RegisterValue"
    ) -> None:
        """Mov target, [base + index * 8]."""
        operand = MemoryOperand(base, index, 8)
        self.emit(Instruction.create_reg_mem(Code.MOV_R64_RM64, target, operand))

    def reg_reg(self, code: "CodeValue", target: "RegisterValue", source: "RegisterValue") -> None:
        """Do any `op target, source`."""
        self.emit(Instruction.create_reg_reg(code, target, source))

    def reg_imm(self, code: "CodeValue", register: "RegisterValue", value: int) -> None:
        """Do any `op register, immediate`."""
        self.emit(Instruction.create_reg_i32(code, register, value))

    def store_index(
        self,
        base: "RegisterValue",
        index: "RegisterValue",
        offset: int,
        source: "RegisterValue",
    ) -> None:
        """Mov [base + index * 8 + offset], source."""
        operand = MemoryOperand(base, index, 8, offset, 8)
        self.emit(Instruction.create_mem_reg(Code.MOV_RM64_R64, operand, source))

    def push(self, register: "RegisterValue") -> None:
        """Push a 64-bit register."""
        self.emit(Instruction.create_reg(Code.PUSH_R64, register))

    def pop(self, register: "RegisterValue") -> None:
        """Pop a 64-bit register."""
        self.emit(Instruction.create_reg(Code.POP_R64, register))

    def call(self, address: int) -> None:
        """Call a host address; uses RAX."""
        self.set(Register.RAX, address)
        self.emit(Instruction.create_reg(Code.CALL_RM64, Register.RAX))

    def ret(self) -> None:
        """Return to the caller."""
        self.emit(Instruction.create(Code.RETNQ))

    def encode(self, address: int) -> bytes:
        """Encode for `address`; each label must have been placed."""
        for index, label in self._branches:
            self._instructions[index].near_branch64 = self._labels[label]
        encoder = BlockEncoder(64)
        encoder.add_many(self._instructions)
        return encoder.encode(address)


class CodePage:
    """Executable memory that holds assembled functions; released with `close`."""

    def __init__(self, size: int = mmap.PAGESIZE) -> None:
        self._map = mmap.mmap(-1, size, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._anchor = (ctypes.c_char * size).from_buffer(self._map)
        self._base = ctypes.addressof(self._anchor)
        self._used = 0

    def place(self, code: Assembler) -> int:
        """Encode a function and return its address."""
        address = self._base + self._used
        encoded = code.encode(address)
        self._map[self._used : self._used + len(encoded)] = encoded
        self._used = (self._used + len(encoded) + 15) & ~15
        return address

    def close(self) -> None:
        """Unmap; no placed function may run afterwards."""
        del self._anchor
        self._map.close()


def _at(base: "RegisterValue", offset: int) -> MemoryOperand:
    return MemoryOperand(base, displ=offset, displ_size=8)
