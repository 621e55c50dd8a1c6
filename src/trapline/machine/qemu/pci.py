"""The PCI bus of QEMU's machine: enumerated and configured as firmware would.

Configuration mechanism 1 (ports 0xCF8 and 0xCFC; PCI Local Bus Specification 3.0, 3.2.2.3.2).
Bus 0 only: no bridge is ever attached.
"""

from dataclasses import dataclass
from typing import Final, Literal

from trapline.base.errors import BadMachineError
from trapline.machine.loader import gpamap
from trapline.machine.loader.acpi import pci_gsi
from trapline.machine.qemu.qtest import Qtest

ADDRESS_PORT: Final = 0xCF8
DATA_PORT: Final = 0xCFC
IO_WINDOW: Final = gpamap.PCI_PORTS
MMIO_WINDOW: Final = gpamap.PCI_MMIO

VENDOR: Final = 0x00
COMMAND: Final = 0x04
STATUS: Final = 0x06
CLASS_REVISION: Final = 0x08
HEADER_TYPE: Final = 0x0E
BAR0: Final = 0x10
BAR_END: Final = 0x28
SUBSYSTEM: Final = 0x2C
CAPABILITIES: Final = 0x34
INTERRUPT_LINE: Final = 0x3C
INTERRUPT_PIN: Final = 0x3D
COMMAND_IO_MEMORY_MASTER: Final = 7
STATUS_CAPABILITIES: Final = 0x10
CAPABILITY_MSI: Final = 0x05
CAPABILITY_MSIX: Final = 0x11
HEADER_ENDPOINT: Final = 0
_MAX_CAPABILITIES: Final = 48
ISA_BRIDGE: Final = 0x7000_8086  # PIIX3
PIRQ_ROUTES: Final = 0x60  # one byte each for PIRQA to PIRQD (PIIX3 data sheet, 2.2.9)

Space = Literal["io", "memory"]


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register as assigned; `size` in bytes."""

    index: int
    space: Space
    address: int
    size: int
    is_64bit: bool


@dataclass(frozen=True, slots=True)
class MsixCapability:
    """Where a function keeps its MSI-X table: BAR number, offset in it, entries."""

    position: int
    bar: int
    offset: int
    entries: int


@dataclass(frozen=True, slots=True)
class Function:
    """A PCI function; `devfn` is device << 3 | function, `msi` the place of its MSI capability."""

    devfn: int
    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    class_code: int
    bars: tuple[Bar, ...]
    msix: MsixCapability | None
    interrupt_pin: int
    msi: int | None = None

    @property
    def id(self) -> str:
        """Vendor and device, as `lspci -n` prints them."""
        return f"{self.vendor:04x}:{self.device:04x}"

    @property
    def slot(self) -> str:
        """Bus, device and function, as Linux names the device."""
        return f"0000:00:{self.devfn >> 3:02x}.{self.devfn & 7}"

    @property
    def modalias(self) -> str:
        """Give what the kernel writes to the device's `modalias` file."""
        return (
            f"pci:v{self.vendor:08X}d{self.device:08X}"
            f"sv{self.subsystem_vendor:08X}sd{self.subsystem:08X}"
            f"bc{self.class_code >> 16:02X}sc{self.class_code >> 8 & 255:02X}"
            f"i{self.class_code & 255:02X}"
        )


class ConfigSpace:
    """Reads and writes of configuration registers through the two ports."""

    def __init__(self, qtest: Qtest) -> None:
        self._qtest = qtest

    def read(self, devfn: int, register: int, size: int) -> int:
        """Read 1, 2 or 4 bytes; all ones where there is no function."""
        self._select(devfn, register)
        return self._qtest.read_port(DATA_PORT + (register & 3), size)

    def write(self, devfn: int, register: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 bytes."""
        self._select(devfn, register)
        self._qtest.write_port(DATA_PORT + (register & 3), size, value)

    def _select(self, devfn: int, register: int) -> None:
        address = 1 << 31 | devfn << 8 | register & 0xFC
        self._qtest.write_port(ADDRESS_PORT, 4, address)


class Firmware:
    """Finds the functions of bus 0 and gives each BAR an address, lowest first."""

    def __init__(self, config: ConfigSpace) -> None:
        self._config = config
        self._next = {"io": IO_WINDOW.start, "memory": MMIO_WINDOW.start}

    def configure(self) -> tuple[Function, ...]:
        """Enumerate, assign and enable all functions."""
        return tuple(self._function(devfn) for devfn in self._present())

    def _present(self) -> list[int]:
        found = []
        for device in range(32):
            if self._config.read(device << 3, VENDOR, 2) == 0xFFFF:
                continue
            several = self._config.read(device << 3, HEADER_TYPE, 1) & 0x80
            for function in range(8 if several else 1):
                devfn = device << 3 | function
                if self._config.read(devfn, VENDOR, 2) != 0xFFFF:
                    found.append(devfn)
        return found

    def _function(self, devfn: int) -> Function:
        config = self._config
        identity = config.read(devfn, VENDOR, 4)
        if config.read(devfn, HEADER_TYPE, 1) & 0x7F != HEADER_ENDPOINT:
            raise BadMachineError(
                f"PCI device {identity & 0xFFFF:04x}:{identity >> 16:04x} is a bridge; devices "
                "can be on bus 0 only: leave it out."
            )
        bars = self._assign(devfn)
        config.write(devfn, COMMAND, 2, COMMAND_IO_MEMORY_MASTER)
        places = self._capabilities(devfn)
        pin = config.read(devfn, INTERRUPT_PIN, 1)
        if identity == ISA_BRIDGE:
            for index, gsi in enumerate(gpamap.PCI_GSIS):
                config.write(devfn, PIRQ_ROUTES + index, 1, gsi)
        elif pin:
            config.write(devfn, INTERRUPT_LINE, 1, pci_gsi(devfn >> 3, pin - 1))
        subsystem = config.read(devfn, SUBSYSTEM, 4)
        return Function(
            devfn=devfn,
            vendor=identity & 0xFFFF,
            device=identity >> 16,
            subsystem_vendor=subsystem & 0xFFFF,
            subsystem=subsystem >> 16,
            class_code=config.read(devfn, CLASS_REVISION, 4) >> 8,
            bars=bars,
            msix=self._msix(devfn, places.get(CAPABILITY_MSIX)),
            interrupt_pin=pin,
            msi=places.get(CAPABILITY_MSI),
        )

    def _assign(self, devfn: int) -> tuple[Bar, ...]:
        bars = []
        register = BAR0
        while register < BAR_END:
            bar = self._size(devfn, register)
            register += 4
            if bar is not None:
                bars.append(bar)
                register += 4 * bar.is_64bit
        return tuple(bars)

    def _size(self, devfn: int, register: int) -> Bar | None:
        config = self._config
        config.write(devfn, register, 4, 0xFFFF_FFFF)
        mask = config.read(devfn, register, 4)
        is_io = bool(mask & 1)
        is_64bit = not is_io and mask & 6 == 4
        size = -(mask & (~3 if is_io else ~15)) & (0xFFFF if is_io else 0xFFFF_FFFF)
        if mask == 0 or size == 0:
            config.write(devfn, register, 4, 0)
            return None
        space: Space = "io" if is_io else "memory"
        address = self._allocate(space, size)
        config.write(devfn, register, 4, address)
        if is_64bit:
            config.write(devfn, register + 4, 4, 0)
        return Bar((register - BAR0) // 4, space, address, size, is_64bit)

    def _allocate(self, space: Space, size: int) -> int:
        window = IO_WINDOW if space == "io" else MMIO_WINDOW
        address = (self._next[space] + size - 1) & -size
        if address + size > window.stop:
            raise BadMachineError(
                f"the devices need more {space} space than the PCI window has; attach fewer."
            )
        self._next[space] = address + size
        return address

    def _capabilities(self, devfn: int) -> dict[int, int]:
        """Find the place of each capability by its id; the first of equals."""
        config = self._config
        places: dict[int, int] = {}
        if not config.read(devfn, STATUS, 2) & STATUS_CAPABILITIES:
            return places
        position = config.read(devfn, CAPABILITIES, 1) & 0xFC
        for _ in range(_MAX_CAPABILITIES):
            if position == 0:
                break
            header = config.read(devfn, position, 2)
            places.setdefault(header & 0xFF, position)
            position = header >> 8 & 0xFC
        return places

    def _msix(self, devfn: int, position: int | None) -> MsixCapability | None:
        if position is None:
            return None
        header = self._config.read(devfn, position, 4)
        table = self._config.read(devfn, position + 4, 4)
        return MsixCapability(position, table & 7, table & ~7, (header >> 16 & 0x7FF) + 1)
