"""What is explored: a kernel image with its symbols, and how to boot it.

The explorer asks a guest for nothing but a vmlinux with a symbol table. Where it looks for
Linux's own functions (`trapline.linux.names`) and a guest has none of that name, it does without.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Self

from trapline.base.errors import NoDebugInfoError
from trapline.cpu.engine import MAX_ENTRIES
from trapline.kernel.binary import Binary
from trapline.kernel.elf.functions import Symbol
from trapline.kernel.live.orc import OrcTable
from trapline.kernel.live.runtime import KERNEL_MAP, RuntimeSymbols
from trapline.linux.names import KernelNames
from trapline.machine.loader import kernelimage
from trapline.machine.loader.acpi import Board
from trapline.machine.machine import Machine, MachineConfig
from trapline.results.scan import Frame

MIB: Final = 1 << 20
KERNEL_HALF: Final = 1 << 63  # addresses from here on
# A console costs time and is what no scenario but that of consoles is about.
COMMAND_LINE: Final = "quiet"
DEFAULT_MEMORY: Final = 256 * MIB
# A guest that waits for something that never comes must not be waited for for ever.
_VIRTUAL_SECONDS: Final = 60


@dataclass(frozen=True, slots=True)
class TargetSource:
    """Where a target comes from: small, and can be sent to another process.

    `kernel` is what the user called it, and `options` are the others that make a boot what it is,
    both for command lines that reproduce a run.
    """

    kernel: str
    vmlinux: Path
    initrd: bytes
    release: str | None = None
    memory: int = DEFAULT_MEMORY
    command_line: str = COMMAND_LINE
    module_version: str = "1.5.01"
    options: tuple[str, ...] = ()

    def open(self) -> "Target":
        """Read the kernel. Raises BadImageError, NotATdxKernelError, NoDebugInfoError."""
        return Target(self)


class _Image:
    """A vmlinux without its DWARF: functions, but no source lines; workers stay small."""

    def __init__(self, binary: Binary) -> None:
        self.name = binary.name
        self.text = binary.text
        self._binary = binary

    def symbol_at(self, address: int) -> Symbol | None:
        return self._binary.symbol_at(address)

    def chain(self, address: int) -> tuple[Frame, ...]:
        symbol = self._binary.symbol_at(address)
        return () if symbol is None else (Frame(function=symbol.name, file=None, line=None),)


class Target:
    """One kernel, ready to be booted as often as needed. Use as a context manager."""

    names = KernelNames()

    def __init__(self, source: TargetSource) -> None:
        self.source = source
        self.image = kernelimage.open_image(source.vmlinux)
        self.binary = Binary.open_vmlinux(source.vmlinux)
        if not len(self.binary.functions):
            raise NoDebugInfoError(
                f"{source.vmlinux}: has no symbols; windows and verdicts need those of the "
                "unstripped vmlinux."
            )
        self._addresses: dict[str, int | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.binary.close()

    def machine(self, append: str, *, mmio_uart: bool = False) -> Machine:
        """Build a TD that is about to start, with `append` on its command line."""
        source = self.source
        return Machine(
            MachineConfig(
                image=self.image,
                command_line=f"{source.command_line} {append}".strip(),
                initrd=source.initrd,
                memory=source.memory,
                module_version=source.module_version,
                board=Board(mmio_uart=mmio_uart),
                virtual_seconds=_VIRTUAL_SECONDS,
            )
        )

    def address(self, name: str) -> int | None:
        """Return the run-time address of a symbol of any kind: a vmlinux is not moved."""
        if name not in self._addresses:
            self._addresses[name] = self.binary.address_of(name)
        return self._addresses[name]

    def addresses(self, names: tuple[str, ...]) -> dict[int, str]:
        """Return address -> name of those that the kernel has."""
        found = {name: self.address(name) for name in names}
        return {address: name for name, address in found.items() if address is not None}

    @cached_property
    def handlers(self) -> dict[int, str]:
        """Address -> name of the kernel's handlers of events, those in C."""
        names, functions = self.names, self.binary.functions
        stubs = functions.matching(re.compile(f"{names.stub}\\w+")).values()
        behind = {name.removeprefix(names.stub) for name in stubs}
        handlers = functions.matching(names.handlers) | functions.addresses_of(sorted(behind))
        kept = sorted(address for address in handlers if address >= KERNEL_HALF)[:MAX_ENTRIES]
        return {address: handlers[address] for address in kept}

    def span(self, name: str) -> range | None:
        """Return the addresses of a function."""
        address = self.address(name)
        symbol = None if address is None else self.binary.symbol_at(address)
        if address is None or symbol is None:
            return None
        return range(address, address + max(symbol.size, 1))

    @cached_property
    def symbols(self) -> RuntimeSymbols:
        """Functions by run-time address."""
        symbols = RuntimeSymbols()
        orc = OrcTable.of_vmlinux(self.binary.elf, self.source.release)
        symbols.place_vmlinux(_Image(self.binary), 0, orc, self.physical_base)
        return symbols

    @cached_property
    def physical_base(self) -> int:
        """GPA of link-time KERNEL_MAP."""
        for segment in self.binary.elf.segments:
            if segment.type == 1 and segment.virtual_address >= KERNEL_MAP:  # PT_LOAD
                return segment.physical_address - (segment.virtual_address - KERNEL_MAP)
        return 0
