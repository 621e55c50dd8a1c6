"""Instructions that trap, carried out by the host call that a paravirtualised guest would make.

Where a kernel calls its host instead of trapping, the access costs one TDVMCALL and no #VE. This
module does at such a site what the converted code would do: the GHCI call with the instruction's
operands, the result into its registers, and on behind it. Forms that a conversion would have to
rewrite otherwise (string I/O, read-modify-write) are refused and trap.
"""

from typing import TYPE_CHECKING, Final

from iced_x86 import Decoder, MemorySizeExt, Mnemonic, OpKind, Register, RegisterExt

from trapline.cpu.engine import Reg
from trapline.machine.vmm.ghci import Status, TdVmCall
from trapline.tdx.vmm_interface import ExitReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from iced_x86 import Instruction
    from iced_x86._iced_x86_py import Register as RegisterValue

    from trapline.cpu.engine import Vcpu
    from trapline.machine.vmm.host import Host
    from trapline.tdx.vmm_interface import VeInfo

MASK32: Final = 0xFFFF_FFFF
MASK64: Final = (1 << 64) - 1
REGISTERS: Final = 16
READ: Final = 0
WRITE: Final = 1
_MAX_LENGTH: Final = 15
_LOADS: Final = frozenset((Mnemonic.MOV, Mnemonic.MOVZX, Mnemonic.MOVSX, Mnemonic.MOVSXD))
_HIGH_BYTES: Final = {
    Register.AH: Reg.RAX, Register.CH: Reg.RCX, Register.DH: Reg.RDX, Register.BH: Reg.RBX,
}  # fmt: skip
_IMMEDIATES: Final = frozenset(
    (
        OpKind.IMMEDIATE8,
        OpKind.IMMEDIATE16,
        OpKind.IMMEDIATE32,
        OpKind.IMMEDIATE8TO16,
        OpKind.IMMEDIATE8TO32,
        OpKind.IMMEDIATE8TO64,
        OpKind.IMMEDIATE32TO64,
    )
)


class ParavirtCalls:
    """Carries out instructions through `host`; each method returns False where it cannot."""

    def __init__(self, vcpu: "Vcpu", host: "Host") -> None:
        self._vcpu = vcpu
        self._host = host
        self._calls: dict[int, Callable[[VeInfo], bool]] = {
            ExitReason.IO_INSTRUCTION: self._io,
            ExitReason.EPT_VIOLATION: self._mmio,
            ExitReason.RDMSR: self._rdmsr,
            ExitReason.WRMSR: self._wrmsr,
            ExitReason.CPUID: self._cpuid,
        }

    def carry_out(self, info: "VeInfo") -> bool:
        """Do what the instruction at RIP asks for; False changes nothing."""
        call = self._calls.get(info.reason)
        return call is not None and self._vcpu.vectoring is None and call(info)

    def _call(self, leaf: int, *arguments: int) -> list[int] | None:
        """Make a TDVMCALL with R12 and following; returns the registers, None if it fails."""
        registers = [0] * REGISTERS
        registers[Reg.R11] = leaf
        registers[Reg.R12 : Reg.R12 + len(arguments)] = arguments
        self._host.tdvmcall(registers)
        return registers if registers[Reg.R10] == Status.SUCCESS else None

    def _io(self, info: "VeInfo") -> bool:
        access, regs = self._vcpu.io, self._vcpu.regs
        if access.is_string:
            return False
        mask = (1 << 8 * access.size) - 1
        if access.is_in:
            answer = self._call(TdVmCall.IO, access.size, READ, access.port)
            if answer is None:
                return False
            self._store(regs, Reg.RAX, answer[Reg.R11], access.size)
        else:
            value = regs[Reg.RAX] & mask
            if self._call(TdVmCall.IO, access.size, WRITE, access.port, value) is None:
                return False
        self._vcpu.advance(info.length)
        return True

    def _rdmsr(self, info: "VeInfo") -> bool:
        regs = self._vcpu.regs
        answer = self._call(TdVmCall.RDMSR, regs[Reg.RCX] & MASK32)
        if answer is None:
            return False
        regs[Reg.RAX] = answer[Reg.R11] & MASK32
        regs[Reg.RDX] = answer[Reg.R11] >> 32 & MASK32
        self._vcpu.advance(info.length)
        return True

    def _wrmsr(self, info: "VeInfo") -> bool:
        regs = self._vcpu.regs
        value = (regs[Reg.RDX] & MASK32) << 32 | regs[Reg.RAX] & MASK32
        if self._call(TdVmCall.WRMSR, regs[Reg.RCX] & MASK32, value) is None:
            return False
        self._vcpu.advance(info.length)
        return True

    def _cpuid(self, info: "VeInfo") -> bool:
        regs = self._vcpu.regs
        answer = self._call(TdVmCall.CPUID, regs[Reg.RAX] & MASK32, regs[Reg.RCX] & MASK32)
        if answer is None:
            return False
        for index, register in enumerate((Reg.RAX, Reg.RBX, Reg.RCX, Reg.RDX)):
            regs[register] = answer[Reg.R12 + index] & MASK32
        self._vcpu.advance(info.length)
        return True

    # MMIO.

    def _mmio(self, info: "VeInfo") -> bool:
        instruction = self._decode()
        if instruction is None or instruction.op_count != 2:
            return False
        if instruction.op0_kind == OpKind.MEMORY:
            return instruction.mnemonic == Mnemonic.MOV and self._store_to(instruction, info.gpa)
        if instruction.op1_kind == OpKind.MEMORY and instruction.mnemonic in _LOADS:
            return self._load_from(instruction, info.gpa)
        return False

    def _decode(self) -> "Instruction | None":
        rip = self._vcpu.regs[Reg.RIP]
        for size in (_MAX_LENGTH, 0x1000 - rip % 0x1000):
            code = self._vcpu.read(rip, size)
            if code:
                instruction = Decoder(64, code, ip=rip).decode()
                return None if instruction.is_invalid else instruction
        return None

    def _store_to(self, instruction: "Instruction", gpa: int) -> bool:
        size = MemorySizeExt.size(instruction.memory_size)
        if instruction.op1_kind == OpKind.REGISTER:
            value = self._register(instruction.op1_register)
        elif instruction.op1_kind in _IMMEDIATES:
            value = instruction.immediate(1)
        else:
            return False
        if value is None or size not in (1, 2, 4, 8):
            return False
        value &= (1 << 8 * size) - 1
        if self._call(TdVmCall.REQUEST_MMIO, size, WRITE, gpa, value) is None:
            return False
        self._vcpu.advance(instruction.len)
        return True

    def _load_from(self, instruction: "Instruction", gpa: int) -> bool:
        size = MemorySizeExt.size(instruction.memory_size)
        target = instruction.op0_register
        if not RegisterExt.is_gpr(target) or target in _HIGH_BYTES or size not in (1, 2, 4, 8):
            return False
        answer = self._call(TdVmCall.REQUEST_MMIO, size, READ, gpa)
        if answer is None:
            return False
        value = answer[Reg.R11] & (1 << 8 * size) - 1
        if instruction.mnemonic in (Mnemonic.MOVSX, Mnemonic.MOVSXD) and value >> 8 * size - 1:
            value -= 1 << 8 * size
        number = RegisterExt.number(RegisterExt.full_register(target))
        self._store(self._vcpu.regs, number, value & MASK64, RegisterExt.size(target))
        self._vcpu.advance(instruction.len)
        return True

    def _register(self, register: "RegisterValue") -> int | None:
        if not RegisterExt.is_gpr(register):
            return None
        if register in _HIGH_BYTES:
            return self._vcpu.regs[_HIGH_BYTES[register]] >> 8
        return self._vcpu.regs[RegisterExt.number(RegisterExt.full_register(register))]

    @staticmethod
    def _store(regs: memoryview, number: int, value: int, size: int) -> None:
        """Write a register of 1, 2, 4 or 8 bytes as the processor does."""
        if size >= 4:
            regs[number] = value & (1 << 8 * size) - 1
        else:
            mask = (1 << 8 * size) - 1
            regs[number] = regs[number] & ~mask & MASK64 | value & mask
