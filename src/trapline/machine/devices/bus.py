"""Ports and MMIO: who answers at which address.

The port space has 2**16 addresses and accesses of 1, 2 and 4 bytes (SDM 1, 19.3); MMIO has
the guest physical space and up to 8 bytes. An access wider than the device, or one that runs
over the end of its range, is split into bytes as an ISA bridge does. Where no device answers,
reads return all ones and writes are lost, and the bus notes the address for the report.
"""

from bisect import bisect_right
from typing import NamedTuple

from trapline.base.errors import BadMachineError
from trapline.machine.devices.interface import Device

# A hostile guest may touch every address there is; the report needs only the first few.
MAX_NOTED = 1024


class Region(NamedTuple):
    """One device's range: addresses `start` to `start + size - 1`."""

    start: int
    size: int
    name: str
    device: Device
    width: int  # widest access in bytes that the device takes whole


class Bus:
    """One address space of the machine.

    `limit` is the first address behind the space. `unclaimed` counts the accesses that no
    device answered, by address.
    """

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self.unclaimed: dict[int, int] = {}
        self._regions: list[Region] = []
        self._starts: list[int] = []
        self._found: dict[int, Region] = {}  # what `find` has answered

    def add(self, start: int, size: int, name: str, device: Device, *, width: int = 1) -> None:
        """Give a range to a device; refuses empty, outside and overlapping ranges."""
        if size <= 0 or start < 0 or start + size > self.limit:
            raise BadMachineError(
                f"{name} cannot be at {self.name} {start:#x}+{size:#x}: outside the address space."
            )
        for other in self._regions:
            if start < other.start + other.size and other.start < start + size:
                raise BadMachineError(
                    f"{name} and {other.name} both claim {self.name} {max(start, other.start):#x};"
                    " leave one of them out."
                )
        self._found.clear()
        index = bisect_right(self._starts, start)
        self._starts.insert(index, start)
        self._regions.insert(index, Region(start, size, name, device, width))

    @property
    def regions(self) -> tuple[Region, ...]:
        """All ranges, by ascending address."""
        return tuple(self._regions)

    def find(self, address: int) -> Region | None:
        """Return the range that holds `address`."""
        found = self._found.get(address)
        if found is not None:
            return found
        index = bisect_right(self._starts, address) - 1
        if index >= 0:
            region = self._regions[index]
            if address < region.start + region.size:
                if len(self._found) < MAX_NOTED:
                    self._found[address] = region
                return region
        return None

    def read(self, address: int, size: int) -> int:
        """Read `size` bytes (1, 2, 4 or 8), little-endian."""
        region = self.find(address)
        if region is None:
            if size > 1 and self._any_device(address, size):
                return self._read_bytes(address, size)
            self._note(address)
            return (1 << 8 * size) - 1
        offset = address - region.start
        if size > region.width or offset + size > region.size:
            return self._read_bytes(address, size)
        return region.device.read(offset, size) & (1 << 8 * size) - 1

    def write(self, address: int, size: int, value: int) -> None:
        """Write the low `size` bytes (1, 2, 4 or 8) of `value`, little-endian."""
        value &= (1 << 8 * size) - 1
        region = self.find(address)
        if region is None:
            if size > 1 and self._any_device(address, size):
                self._write_bytes(address, size, value)
            else:
                self._note(address)
            return
        offset = address - region.start
        if size > region.width or offset + size > region.size:
            self._write_bytes(address, size, value)
            return
        region.device.write(offset, size, value)

    def _any_device(self, address: int, size: int) -> bool:
        return any(self.find(address + index) is not None for index in range(1, size))

    def _read_bytes(self, address: int, size: int) -> int:
        if size == 1:
            raise AssertionError("a device takes at least bytes")
        value = 0
        for index in range(size):
            value |= self._read_byte(address + index) << 8 * index
        return value

    def _read_byte(self, address: int) -> int:
        # Past the end of the space nothing answers: the address does not wrap.
        return self.read(address, 1) if address < self.limit else 0xFF

    def _write_bytes(self, address: int, size: int, value: int) -> None:
        for index in range(size):
            if address + index < self.limit:
                self.write(address + index, 1, value >> 8 * index)

    def _note(self, address: int) -> None:
        if address in self.unclaimed or len(self.unclaimed) < MAX_NOTED:
            self.unclaimed[address] = self.unclaimed.get(address, 0) + 1
