"""The host of an explored TD: it plays along with #VEs that stand for nothing.

A synthetic #VE must change nothing, or its effect could not be told from a fault. So the host
accepts the WRMSR that the guest makes of a synthetic WRMSR #VE, and answers a synthetic MMIO
#VE with what is in memory, as if the page had been a device that behaves like memory.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

from trapline.cpu.engine import Reg
from trapline.machine.machine import Machine
from trapline.machine.vmm.ghci import Status, TdVmCall
from trapline.machine.vmm.services import Services

_WRITE: Final = 1
_MASK32: Final = (1 << 32) - 1


class ExpectedWrmsr(NamedTuple):
    """The call that Linux makes of a WRMSR #VE.

    R12 is RCX, and R13 is RAX with RDX in its upper half: whole registers (write_msr(),
    arch/x86/coco/tdx/tdx.c), of which only ECX is looked at here.
    """

    msr: int


class ExpectedMmio(NamedTuple):
    """The call that Linux makes of a #VE for a shared GPA; `memory` is where the bytes are."""

    gpa: int
    memory: int


class ExploredServices(Services):
    """GHCI services that answer the next expected call themselves."""

    expected: ExpectedWrmsr | ExpectedMmio | None = None
    announce: Callable[[int, int], None]

    def call(self, registers: list[int]) -> None:
        """Serve one TDVMCALL."""
        expected = self.expected
        if expected is not None and self._answers(expected, registers):
            self.expected = None
            registers[Reg.R10] = Status.SUCCESS
            return
        super().call(registers)

    def _answers(self, expected: ExpectedWrmsr | ExpectedMmio, registers: list[int]) -> bool:
        leaf, first, second = registers[Reg.R11], registers[Reg.R12], registers[Reg.R13]
        if isinstance(expected, ExpectedWrmsr):
            return leaf == TdVmCall.WRMSR and first & _MASK32 == expected.msr
        if leaf != TdVmCall.REQUEST_MMIO or registers[Reg.R14] != expected.gpa:
            return False
        size = first & 15
        at = expected.memory
        if at + size > len(self._ram):
            return False
        if second == _WRITE:
            data = (registers[Reg.R15] & (1 << 8 * size) - 1).to_bytes(size, "little")
            self._ram[at : at + size] = data
            self.announce(at, size)
        else:
            registers[Reg.R11] = int.from_bytes(self._ram[at : at + size], "little")
        return True


def take_over(machine: Machine) -> ExploredServices:
    """Replace the services of a machine that has not started."""
    services = ExploredServices(
        ports=machine.ports,
        mmio=machine.mmio,
        apic=machine.apic,
        sept=machine.module.sept,
        ram=machine.memory.shared_ram,
        shared_bit=machine.memory.shared_bit,
        events=machine.host,
    )
    services.announce = machine.memory.code_changed
    machine.host.services = services
    return services
