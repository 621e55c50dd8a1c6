"""What the host of an explored TD plays along with: #VEs that stand for nothing.

A synthetic #VE must change nothing, or its effect could not be told from a fault. So the host
accepts the WRMSR that the guest makes of a synthetic WRMSR #VE, and answers a synthetic MMIO
#VE with what is in memory, as if the page had been a device that behaves like memory. Both are
for `Services.expect`.
"""

from typing import Final, NamedTuple

from trapline.cpu.engine import Memory, Reg
from trapline.machine.vmm.ghci import Status, TdVmCall

_WRITE: Final = 1
_MASK32: Final = (1 << 32) - 1


class ExpectedWrmsr(NamedTuple):
    """The call that Linux makes of a WRMSR #VE.

    R12 is RCX, and R13 is RAX with RDX in its upper half: whole registers (write_msr(),
    arch/x86/coco/tdx/tdx.c), of which only ECX is looked at here.
    """

    msr: int

    def answer(self, registers: list[int]) -> bool:
        """Accept it."""
        is_it = registers[Reg.R11] == TdVmCall.WRMSR and registers[Reg.R12] & _MASK32 == self.msr
        if is_it:
            registers[Reg.R10] = Status.SUCCESS
        return is_it


class ExpectedMmio(NamedTuple):
    """The call that Linux makes of a #VE for a shared GPA; the bytes are at `at` in memory."""

    gpa: int
    at: int
    memory: Memory

    def answer(self, registers: list[int]) -> bool:
        """Do to memory what the guest asks of the device."""
        if registers[Reg.R11] != TdVmCall.REQUEST_MMIO or registers[Reg.R14] != self.gpa:
            return False
        size = registers[Reg.R12] & 15
        ram, at = self.memory.shared_ram, self.at
        if at + size > len(ram):
            return False
        if registers[Reg.R13] == _WRITE:
            data = (registers[Reg.R15] & (1 << 8 * size) - 1).to_bytes(size, "little")
            ram[at : at + size] = data
            self.memory.code_changed(at, size)
        else:
            registers[Reg.R11] = int.from_bytes(ram[at : at + size], "little")
        registers[Reg.R10] = Status.SUCCESS
        return True
