"""QEMU's devices on a machine: buses, interrupts, time, and the memory that DMA may reach.

The devices live by the wall clock. `QemuBoard` is the machine's `outside.Outside`: it says how
long an idle guest has to wait for them. DMA reaches the shared half of guest memory only, which
is memory of its own: a device that is given the address of a private page reads zeros, and what
it writes goes to a page that is no part of the TD. Such pages are found, since only pages that
the guest shared may hold anything, and reported.
"""

import time
from typing import TYPE_CHECKING, Final, Self

from trapline.cpu import memoryfile
from trapline.machine.devices.ioapic import IoApic
from trapline.machine.loader import gpamap
from trapline.machine.qemu import catalogue
from trapline.machine.qemu.backend import CHIPSET, QemuBackend
from trapline.machine.qemu.process import QemuProcess
from trapline.tdx.sept import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trapline.machine.devices.bus import Bus
    from trapline.machine.devices.lapic import LocalApic
    from trapline.machine.qemu.catalogue import DeviceRequest
    from trapline.machine.qemu.pci import Function, Space
    from trapline.tdx.sept import Sept

# How long after the last access an idle guest waits for a device in real time.
BUSY_SECONDS: Final = 0.05
# After that its idle time passes so much faster than real time, and no faster.
IDLE_SPEED: Final = 20
# One wait, so that limits are looked at; with no timer armed there is nothing else to wait for.
WAIT_SECONDS: Final = 0.05
INSPECT_SECONDS: Final = 0.25
MAX_REFUSED: Final = 64


class _Window:
    """A range of ports or MMIO that QEMU answers; its devices take absolute addresses."""

    def __init__(
        self,
        board: "QemuBoard",
        base: int,
        read: "Callable[[int, int], int]",
        write: "Callable[[int, int, int], None]",
    ) -> None:
        self._board = board
        self._base = base
        self._read = read
        self._write = write

    def read(self, offset: int, size: int) -> int:
        self._board.touch()
        return self._read(self._base + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._board.touch()
        self._write(self._base + offset, size, value)


class QemuBoard:
    """The devices of one machine.

    `memory` is the descriptor of the shared half, `size` its bytes; `frequency` is that of the
    virtual TSC. INTx lines go to `ioapic`, which may be None. `refused` counts the private
    pages that DMA went to; `refused_pages` are the first of their GPAs.
    """

    def __init__(
        self,
        requests: "Sequence[DeviceRequest]",
        memory: int,
        size: int,
        *,
        apic: "LocalApic",
        ioapic: IoApic | None,
        frequency: int,
    ) -> None:
        self.refused = 0
        self.refused_pages: list[int] = []
        self._memory = memory
        self._size = size
        self._frequency = frequency
        self._ioapic = ioapic
        self._sept: Sept | None = None
        self._busy_until = 0.0
        self._inspect_at = 0.0
        arguments = catalogue.arguments(requests)
        self._process = QemuProcess.start(arguments, memory, size, self._on_line)
        try:
            self.backend = QemuBackend(self._process, apic.raise_vector)
            if ioapic is not None:
                self._process.qtest.intercept_irqs("ioapic")
        except BaseException:
            self._process.close()
            raise

    def attach(self, ports: "Bus", mmio: "Bus", sept: "Sept | None" = None) -> None:
        """Put the devices on the buses; `sept` says which pages are shared, None: all."""
        self._sept = sept
        # What QEMU itself wrote to its memory before there was a guest.
        memoryfile.discard(self._memory, 0, self._size)
        backend = self.backend
        config = _Window(self, 0, backend.read_config, backend.write_config)
        ports.add(
            gpamap.PCI_CONFIG_PORTS.start, len(gpamap.PCI_CONFIG_PORTS), "PCI configuration",
            config, width=4,
        )  # fmt: skip
        window = gpamap.PCI_PORTS
        device = _Window(self, window.start, backend.read_port, backend.write_port)
        ports.add(window.start, len(window), "PCI devices", device, width=4)
        window = gpamap.PCI_MMIO
        device = _Window(self, window.start, backend.read_memory, backend.write_memory)
        mmio.add(window.start, len(window), "PCI devices", device, width=8)

    @property
    def functions(self) -> "tuple[Function, ...]":
        """The PCI functions that were asked for: all but QEMU's own chipset."""
        return tuple(f for f in self.backend.functions if f.id not in CHIPSET)

    def function_at(self, space: "Space", address: int) -> "Function | None":
        """Return the function whose BAR holds a port or an MMIO address."""
        for function in self.functions:
            for bar in function.bars:
                if bar.space == space and 0 <= address - bar.address < bar.size:
                    return function
        return None

    def touch(self) -> None:
        """Note that the guest talked to a device, which may answer soon."""
        self._busy_until = time.monotonic() + BUSY_SECONDS

    # Outside.

    def poll(self) -> None:
        """Take in what has happened."""
        self._listen(0.0)

    def wait(self, cycles: int | None) -> int:
        """Let the guest idle for at most `cycles`, None: without end; returns what passed.

        Ends early when something happened.
        """
        start = time.monotonic()
        busy = self._busy_until > start
        speed = 1 if busy else IDLE_SPEED
        seconds = WAIT_SECONDS
        if cycles is not None:
            seconds = min(seconds, cycles / self._frequency / speed)
        happened = self._listen(seconds)
        passed = int((time.monotonic() - start) * self._frequency * speed)
        if cycles is None:
            return passed
        # A wait that ran its course is as long as it was meant to be.
        whole = not happened and seconds < WAIT_SECONDS
        return cycles if whole else min(cycles, passed)

    def _listen(self, seconds: float) -> bool:
        happened = self.backend.poll(seconds)
        now = time.monotonic()
        if happened:
            self._busy_until = now + BUSY_SECONDS
        if now >= self._inspect_at:
            self._inspect_at = now + INSPECT_SECONDS
            self.inspect()
        return happened

    def _on_line(self, line: int, level: bool) -> None:
        if self._ioapic is not None:
            self._ioapic.set_line(line, level)

    # DMA.

    def inspect(self) -> None:
        """Look for pages that hold something though the guest did not share them."""
        sept = self._sept
        if sept is None:
            return
        for start, end in memoryfile.populated(self._memory, self._size):
            for gpa in sept.not_shared(start, end - start):
                self._refuse(gpa)

    def _refuse(self, gpa: int) -> None:
        self.refused += 1
        if len(self.refused_pages) < MAX_REFUSED and gpa not in self.refused_pages:
            self.refused_pages.append(gpa)
        memoryfile.discard(self._memory, gpa, PAGE_SIZE)

    # The end.

    def close(self) -> str:
        """End QEMU; returns what it had to say, the first time."""
        return self.backend.close()

    def __enter__(self) -> Self:
        """Give the board itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End QEMU."""
        self.close()
