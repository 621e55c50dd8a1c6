"""Which drivers a running kernel has bound to its PCI devices, read from its memory.

Member offsets come from the kernel's BTF. The memory belongs to a guest that may be hostile or
broken: pointers and names are checked, and every walk is bounded.

Layout: `pci_root_buses` lists struct pci_bus, whose `devices` lists struct pci_dev. What a
driver has put below a device (a virtio device below its PCI function) is in `klist_children` of
the device's struct device_private (drivers/base/base.h).
"""

import re
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.kernel.live.modules import ReadMemory
    from trapline.kernel.types.btf import Btf

_MAX_BUSES: Final = 256
_MAX_DEVICES: Final = 1024
_MAX_CHILDREN: Final = 64
_NAME: Final = re.compile(rb"[ -~]{1,63}\0")
_NAME_SIZE: Final = 64
_NEEDED: Final = {
    "pci_bus": ("node", "devices"),
    "pci_dev": ("bus_list", "devfn", "vendor", "device", "driver", "dev"),
    "pci_driver": ("name",),
    "device": ("kobj", "p", "driver"),
    "device_driver": ("name",),
    "device_private": ("klist_children", "knode_parent", "device"),
    "klist": ("k_list",),
    "klist_node": ("n_node",),
    "kobject": ("name",),
}


class ChildDevice(NamedTuple):
    """A device that a driver made, and the driver bound to it."""

    name: str
    driver: str | None


class PciDevice(NamedTuple):
    """A PCI function as the kernel sees it; `driver` is the name of its PCI driver."""

    devfn: int
    vendor: int
    device: int
    driver: str | None
    children: tuple[ChildDevice, ...]

    @property
    def drivers(self) -> tuple[str, ...]:
        """All drivers on it: that of the function, then those of its children."""
        names = [self.driver, *(child.driver for child in self.children)]
        return tuple(dict.fromkeys(name for name in names if name))


class DeviceReader:
    """Reads bus 0; `head` is the run-time address of the symbol `pci_root_buses`.

    `usable` is False where the BTF does not describe devices; then `read` returns nothing.
    """

    def __init__(self, read: "ReadMemory", btf: "Btf", head: int) -> None:
        self._read = read
        self._head = head
        self._at: dict[tuple[str, str], int] = {}
        for name, members in _NEEDED.items():
            found = btf.struct(name) or {}
            for member in members:
                if member in found:
                    self._at[name, member] = found[member].offset
        self.usable = len(self._at) == sum(map(len, _NEEDED.values()))

    def read(self) -> tuple[PciDevice, ...]:
        """Return what is there now, as far as it makes sense."""
        if not self.usable:
            return ()
        at = self._at
        devices = []
        for node in self._list(self._head, _MAX_BUSES):
            bus = node - at["pci_bus", "node"]
            for entry in self._list(bus + at["pci_bus", "devices"], _MAX_DEVICES):
                device = self._device(entry - at["pci_dev", "bus_list"])
                if device is not None:
                    devices.append(device)
        return tuple(devices)

    def _device(self, address: int) -> PciDevice | None:
        at = self._at
        devfn = self._number(address + at["pci_dev", "devfn"], 4)
        vendor = self._number(address + at["pci_dev", "vendor"], 2)
        device = self._number(address + at["pci_dev", "device"], 2)
        driver = self._number(address + at["pci_dev", "driver"], 8)
        if devfn is None or vendor is None or device is None or driver is None:
            return None
        inner = address + at["pci_dev", "dev"]
        return PciDevice(
            devfn & 0xFF,
            vendor,
            device,
            self._name(driver + at["pci_driver", "name"]) if driver else None,
            tuple(self._children(inner)),
        )

    def _children(self, device: int) -> "Iterator[ChildDevice]":
        at = self._at
        private = self._number(device + at["device", "p"], 8)
        if not private:
            return
        head = private + at["device_private", "klist_children"] + at["klist", "k_list"]
        for node in self._list(head, _MAX_CHILDREN):
            owner = node - at["klist_node", "n_node"] - at["device_private", "knode_parent"]
            child = self._number(owner + at["device_private", "device"], 8)
            if not child:
                continue
            name = self._name(child + at["device", "kobj"] + at["kobject", "name"])
            driver = self._number(child + at["device", "driver"], 8)
            if name is not None:
                bound = self._name(driver + at["device_driver", "name"]) if driver else None
                yield ChildDevice(name, bound)

    def _list(self, head: int, limit: int) -> "Iterator[int]":
        """Yield the address of each struct list_head behind `head`."""
        seen = {head}
        link = self._number(head, 8)
        while link and link not in seen and len(seen) <= limit:
            seen.add(link)
            yield link
            link = self._number(link, 8)

    def _name(self, pointer_at: int) -> str | None:
        pointer = self._number(pointer_at, 8)
        if not pointer:
            return None
        # The string may end just before memory that is not there.
        for size in (_NAME_SIZE, 16, 8):
            data = self._bytes(pointer, size)
            match = None if data is None else _NAME.match(data)
            if match is not None:
                return match[0][:-1].decode("ascii")
        return None

    def _number(self, address: int, size: int) -> int | None:
        data = self._bytes(address, size)
        return None if data is None else int.from_bytes(data, "little")

    def _bytes(self, address: int, size: int) -> bytes | None:
        if address < 0 or address + size > 1 << 64:
            return None
        data = self._read(address, size)
        return data if data is not None and len(data) == size else None
