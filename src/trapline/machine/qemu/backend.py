"""QEMU's devices on the TD's buses: ports, MMIO, interrupts."""

import select
from collections.abc import Callable
from typing import Final, Self

from trapline.machine.qemu.doorbell import DOORBELL_OFFSET, VECTORS
from trapline.machine.qemu.msix import ENTRY, MsixShadow, MsixTable
from trapline.machine.qemu.pci import (
    ADDRESS_PORT,
    BAR0,
    BAR_END,
    COMMAND,
    DATA_PORT,
    ConfigSpace,
    Firmware,
    Function,
)
from trapline.machine.qemu.process import QemuProcess

IVSHMEM: Final = "1af4:1110"
IDE: Final = "8086:7010"  # part of the chipset; its ports are not those of a TD
# QEMU's own chipset, without which Linux finds no PCI host bridge; no driver binds to the ISA
# bridge's legacy devices, they are switched off.
CHIPSET: Final = frozenset({"8086:1237", "8086:7000"})
MSI_WINDOW: Final = range(0xFEE0_0000, 0xFEF0_0000)

RaiseVector = Callable[[int], None]


class QemuBackend:
    """A running QEMU as the host's PCI bus.

    `raise_vector` is called with the local APIC vector of each MSI-X message, from `poll`.
    `visible` decides which functions the guest's configuration cycles reach.
    """

    def __init__(self, process: QemuProcess, raise_vector: RaiseVector) -> None:
        self._process = process
        self._qtest = process.qtest
        self._raise = raise_vector
        self._config = ConfigSpace(self._qtest)
        functions = Firmware(self._config).configure()
        (bell,) = (f for f in functions if f.id == IVSHMEM)
        self.functions = tuple(f for f in functions if f.id not in (IVSHMEM, IDE))
        self._hidden = {f.devfn for f in functions if f.id in (IVSHMEM, IDE)}
        # MSI messages would end in QEMU's own APIC. Drivers then use MSI-X, or the INTx line.
        self._msi = {f.devfn: f.msi for f in functions if f.msi is not None}
        self._msix = MsixShadow(self._qtest, bell.bars[0].address + DOORBELL_OFFSET, self.functions)
        self._bases: dict[int, tuple[int, MsixTable]] = {}
        self._selected = 0
        self._map_tables()
        self._epoll = select.epoll()
        self._others: set[int] = set()
        self._slots = {fd: slot for slot, fd in enumerate(process.doorbell.eventfds)}
        for descriptor in (*self._slots, self._qtest.fileno()):
            self._epoll.register(descriptor, select.EPOLLIN)

    def hide(self, function: Function) -> None:
        """Make a function's configuration space read as if nothing were there.

        It decodes no addresses either, and does no DMA.
        """
        self._hidden.add(function.devfn)
        self._config.write(function.devfn, COMMAND, 2, 0)

    # Configuration ports 0xCF8-0xCFF (trapline.machine.devices.interface.Device).

    def read_config(self, offset: int, size: int) -> int:
        """Serve an IN of the configuration ports."""
        port = ADDRESS_PORT + offset
        if port < DATA_PORT:
            return self._selected >> 8 * offset & (1 << 8 * size) - 1
        if not self._reaches():
            return (1 << 8 * size) - 1
        devfn, register = self._selected >> 8 & 0xFF, self._register(port)
        value = self._config.read(devfn, register, size)
        msi = self._msi.get(devfn)
        if msi is not None and register <= msi < register + size:
            value &= ~(0xFF << 8 * (msi - register))  # id 0: the null capability
        return value

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Serve an OUT of the configuration ports."""
        port = ADDRESS_PORT + offset
        if port == ADDRESS_PORT and size == 4:
            self._selected = value
        elif port >= DATA_PORT and self._reaches():
            register = self._register(port)
            self._config.write(self._selected >> 8 & 0xFF, register, size, value)
            if BAR0 <= register < BAR_END:
                self._map_tables()

    def _register(self, port: int) -> int:
        return (self._selected & 0xFC) | port & 3

    def _reaches(self) -> bool:
        """Only bus 0 exists, and the enable bit must be set."""
        devfn = self._selected >> 8 & 0xFF
        return self._selected >> 16 == 0x8000 and devfn not in self._hidden

    # The I/O and MMIO windows; addresses are absolute.

    def read_port(self, port: int, size: int) -> int:
        """Serve an IN inside the I/O window."""
        return self._qtest.read_port(port, size)

    def write_port(self, port: int, size: int, value: int) -> None:
        """Serve an OUT inside the I/O window."""
        self._qtest.write_port(port, size, value)

    def read_memory(self, address: int, size: int) -> int:
        """Serve a load inside the MMIO window."""
        found = self._table_at(address)
        if found is not None:
            base, table = found
            return self._msix.read(table, address - base, size)
        return self._qtest.read_memory(address, size)

    def write_memory(self, address: int, size: int, value: int) -> None:
        """Serve a store inside the MMIO window."""
        found = self._table_at(address)
        if found is None:
            self._qtest.write_memory(address, size, value)
        else:
            base, table = found
            self._msix.write(table, base, address - base, size, value)

    def _table_at(self, address: int) -> tuple[int, MsixTable] | None:
        found = self._bases.get(address >> 12)
        if found is None:
            return None
        base, table = found
        return found if base <= address < base + len(table.words) // 4 * ENTRY else None

    def _map_tables(self) -> None:
        """Look where the guest has put the MSI-X tables; each is within one or more pages."""
        self._bases = {}
        for table in self._msix.tables:
            msix = table.function.msix
            assert msix is not None
            low = self._config.read(table.function.devfn, BAR0 + 4 * msix.bar, 4) & ~15
            base = low + msix.offset
            last = base + len(table.words) // 4 * ENTRY - 1
            for page in range(base >> 12, (last >> 12) + 1):
                self._bases[page] = (base, table)

    # Interrupts.

    def wake_for(self, descriptor: int) -> None:
        """Have `poll` end early, too, when there is something to read from a descriptor."""
        self._others.add(descriptor)
        self._epoll.register(descriptor, select.EPOLLIN)

    def wake_no_more(self, descriptor: int) -> None:
        """Take back what `wake_for` did."""
        self._others.discard(descriptor)
        self._epoll.unregister(descriptor)

    def poll(self, seconds: float = 0.0) -> bool:
        """Pass on what QEMU has signalled, waiting up to `seconds`; say if there was anything."""
        events = self._epoll.poll(seconds, VECTORS + 1)
        for descriptor, _ in events:
            slot = self._slots.get(descriptor)
            if descriptor in self._others:
                continue
            if slot is None:
                self._qtest.poll()
            elif self._process.doorbell.take(slot):
                message = self._msix.message(slot)
                # A message elsewhere than to an APIC is a DMA write that hardware would do;
                # Linux programs none.
                if message is not None and message.address in MSI_WINDOW:
                    self._raise(message.data & 0xFF)
        return bool(events)

    def close(self) -> str:
        """End QEMU; returns what it had to say, the first time."""
        if self._epoll.closed:
            return ""
        self._epoll.close()
        return self._process.close()

    def __enter__(self) -> Self:
        """Give the back end itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End QEMU."""
        self.close()
