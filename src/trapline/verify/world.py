"""The host of the tests: devices that behave like memory, and a note of each call.

Both runs of a case see the same world: natively through `reference`, in the TD through
TDVMCALLs. With `garbage` the host is one that nobody should trust: each output register that the
guest exposed and that carries nothing, and each bit beyond the width of an answer, is garbage.
"""

from functools import lru_cache
from typing import Final, NamedTuple

from trapline.cpu.engine import Reg
from trapline.machine.vmm.ghci import Status, TdVmCall

M64: Final = (1 << 64) - 1
_WRITE: Final = 1
_IO_SIZES: Final = frozenset({1, 2, 4})
_MMIO_SIZES: Final = frozenset({1, 2, 4, 8})
_MAX_CALLS: Final = 256
# Garbage for output registers; each byte is different.
GARBAGE: Final = 0xE1D2C3B4A5968778

# R11 of a call -> which registers carry its inputs, and which its outputs (GHCI 1.5, 3.1-3.11).
_ARGUMENTS: Final = {
    TdVmCall.CPUID: ((Reg.R12, Reg.R13), (Reg.R12, Reg.R13, Reg.R14, Reg.R15)),
    TdVmCall.HLT: ((Reg.R12,), ()),
    TdVmCall.RDMSR: ((Reg.R12,), (Reg.R11,)),
    TdVmCall.WRMSR: ((Reg.R12, Reg.R13), ()),
}
_ACCESS_CALLS: Final = (TdVmCall.IO, TdVmCall.REQUEST_MMIO)


# R11 of a call -> the register that carries a value to the host.
_VALUES: Final = {
    TdVmCall.IO: Reg.R15,
    TdVmCall.REQUEST_MMIO: Reg.R15,
    TdVmCall.WRMSR: Reg.R13,
}


class Access(NamedTuple):
    """What a device or the host saw. `what` is "mmio", "port", "cpuid", "rdmsr", "wrmsr", "hlt".

    `address` is the offset in the operand pages, the port, MSR or leaf; `value` what was
    written, or for CPUID the sub-leaf, for HLT whether interrupts were blocked.
    """

    what: str
    is_write: bool
    address: int
    size: int
    value: int


class World:
    """Devices; `memory` is behind the MMIO operand pages.

    `port`, `msr` and `cpuid` are what reads of them give.
    """

    def __init__(self, memory: bytes) -> None:
        self.memory = bytearray(memory)
        self.port = 0
        self.msr = 0
        self.cpuid = (0, 0, 0, 0)
        self.accesses: list[Access] = []

    def note(self, access: Access) -> None:
        """Remember an access, up to a limit."""
        if len(self.accesses) < _MAX_CALLS:
            self.accesses.append(access)


def value_register(registers: tuple[int, ...]) -> Reg | None:
    """Return the register that carries a value to the host in a call; None if none does."""
    return next((reg for leaf, reg in _VALUES.items() if leaf == registers[Reg.R11]), None)


def documented_inputs(registers: tuple[int, ...]) -> frozenset[int]:
    """Return the registers that carry a call's inputs; R10 and R11 always do."""
    return _inputs(registers[Reg.R11], is_write=registers[Reg.R13] == _WRITE)


@lru_cache(maxsize=64)
def _inputs(leaf: int, *, is_write: bool) -> frozenset[int]:
    numbers: tuple[int, ...]
    if leaf in _ACCESS_CALLS:
        numbers = (Reg.R12, Reg.R13, Reg.R14)
        if is_write:
            numbers = (*numbers, Reg.R15)
    elif leaf in _ARGUMENTS:
        numbers = _ARGUMENTS[TdVmCall(leaf)][0]
    else:
        numbers = (Reg.R12, Reg.R13, Reg.R14, Reg.R15)
    return frozenset((Reg.R10, Reg.R11, *numbers))


class WorldHost:
    """Answers TDVMCALLs for the world, and notes the registers of each (`services.Answerer`).

    `mmio` is the GPA of the operand pages, with its shared bit, and `size` their size in bytes.
    """

    def __init__(self, mmio: int, size: int) -> None:
        self._window = range(mmio, mmio + size)
        self.world: World | None = None
        self.garbage: int | None = None
        self.calls: list[tuple[int, ...]] = []

    def begin(self, world: World, garbage: int | None) -> None:
        """Answer for this world from now on; `garbage` is for bits beyond an answer's width."""
        self.world = world
        self.garbage = garbage
        self.calls = []

    def answer(self, registers: list[int]) -> bool:
        """Serve one TDVMCALL, if it is about the world."""
        world = self.world
        if world is None:
            return False
        if len(self.calls) < _MAX_CALLS:
            self.calls.append(tuple(registers))
        outputs = self._answer(world, registers)
        if outputs is None:
            return False
        for number in range(16):
            if number in outputs:
                registers[number] = outputs[number]
            elif self.garbage is not None and number not in (Reg.RAX, Reg.RCX, Reg.RSP, Reg.R10):
                registers[number] = GARBAGE * (number + 1) & M64
        registers[Reg.R10] = Status.SUCCESS
        return True

    def _answer(self, world: World, registers: list[int]) -> dict[int, int] | None:
        """Return the output registers; None for a call that is none of the world's."""
        leaf, first, second = registers[Reg.R11], registers[Reg.R12], registers[Reg.R13]
        if registers[Reg.R10]:
            return None
        if leaf in _ACCESS_CALLS:
            return self._access(world, registers)
        if leaf == TdVmCall.CPUID:
            world.note(Access("cpuid", False, first & 0xFFFFFFFF, 4, second & 0xFFFFFFFF))
            top = (self.garbage or 0) & ~0xFFFFFFFF
            return dict(zip(range(Reg.R12, 16), (top | word for word in world.cpuid), strict=True))
        if leaf == TdVmCall.RDMSR:
            world.note(Access("rdmsr", False, first & 0xFFFFFFFF, 8, 0))
            return {Reg.R11: world.msr}
        if leaf == TdVmCall.WRMSR:
            world.note(Access("wrmsr", True, first & 0xFFFFFFFF, 8, second))
            return {}
        if leaf == TdVmCall.HLT:
            world.note(Access("hlt", False, 0, 0, first & 1))
            return {}
        return None

    def _access(self, world: World, registers: list[int]) -> dict[int, int] | None:
        is_mmio = registers[Reg.R11] == TdVmCall.REQUEST_MMIO
        size, is_write, address = registers[Reg.R12], registers[Reg.R13], registers[Reg.R14]
        if is_write > 1 or size not in (_MMIO_SIZES if is_mmio else _IO_SIZES):
            return None
        mask = (1 << 8 * size) - 1
        value = registers[Reg.R15] & mask
        if is_mmio:
            if address not in self._window or address + size > self._window.stop:
                return None
            address -= self._window.start
        world.note(
            Access("mmio" if is_mmio else "port", bool(is_write), address, size, value * is_write)
        )
        if is_write:
            if is_mmio:
                world.memory[address : address + size] = value.to_bytes(size, "little")
            return {}
        answer = world.port & mask
        if is_mmio:
            answer = int.from_bytes(world.memory[address : address + size], "little")
        return {Reg.R11: answer | (self.garbage or 0) & ~mask}
