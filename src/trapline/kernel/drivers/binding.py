"""The drivers of a kernel, and which of them an allow list lets bind to a device.

A driver here is a Kbuild module, loadable or built in, that lies below drivers/ or sound/ or that
has aliases on a device bus. Its aliases say what it binds to; a list of PCI ids lets in:

- drivers on the PCI bus with an alias that an entry overlaps;
- through virtio_pci, the virtio drivers of the device types that these ids stand for.

An id does not tell all of a device, and the host chooses the rest. Two of its choices let in more
drivers than a list names; `Admission` tells them apart as loopholes:

- the PCI class: a driver that binds by class (nvme, ahci, xhci) takes any vendor and device id;
- the PCI subsystem id of a transitional virtio device (1af4:1000 to 1af4:103f): Linux takes the
  virtio device type from it.

Sources: drivers/virtio/virtio_pci_legacy_dev.c `vp_legacy_probe()`, virtio_pci_modern_dev.c
`vp_modern_probe()`, drivers/virtio/virtio.c `virtio_dev_match()` (v6.12).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from trapline.allowlist import virtio
from trapline.allowlist.entries import AllowEntry, AllowList, DeviceAlias
from trapline.kernel.drivers.modinfo import ModuleInfo

# Buses whose devices the host makes up or may make up. The order is that in which a driver's
# main bus is chosen.
BUSES: Final = (
    "pci",
    "virtio",
    "vmbus",
    "xen",
    "usb",
    "acpi",
    "pnp",
    "platform",
    "serio",
    "i2c",
    "spi",
    "hid",
    "scsi",
    "auxiliary",
)
# Prefixes of modalias strings that do not name their bus: file2alias.c has these for PCI drivers
# that only bind on request, for PNP cards, and for device tree nodes.
_BUS_ALIASES: Final = {"vfio_pci": "pci", "pnp card": "pnp", "of": "platform"}
_ACPI_ID: Final = "acpi*"
#: The driver that makes virtio devices of PCI functions.
VIRTIO_PCI: Final = "virtio_pci"
_DRIVER_FOLDERS: Final = ("kernel/drivers/", "kernel/sound/")
# What acts for a virtio driver on a PCI transport, and for any PCI driver that uses MSI-X. The
# last is no module: it is drivers/pci/msi of vmlinux.
_VIRTIO_TRANSPORT: Final = (
    "virtio",
    "virtio_ring",
    "virtio_pci",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
)
PCI_MSI: Final = "PCI MSI"
PCI_CONFIGURATION: Final = "PCI configuration"


@dataclass(frozen=True, slots=True)
class KernelDriver:
    """One driver. `bus` is its main bus or "", `buses` all of them.

    `aliases` are patterns for modalias strings. `location` is as in modules.builtin, None for
    code that is always built in.
    """

    name: str
    builtin: bool
    location: str | None
    bus: str
    buses: tuple[str, ...]
    aliases: tuple[str, ...]
    depends: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Admission:
    """What an allow list says of one driver.

    `allowed`: some device on the list binds to it. `via` are the ways, each from an id of the
    list to the driver. `loopholes` are ways that only exist because the host chooses what the id
    does not tell; they do not make a driver allowed. `reaches` names what touches the host on the
    driver's behalf: libraries it depends on (for built-in drivers the kernel does not say which),
    the virtio transport, PCI core code.
    """

    allowed: bool
    via: tuple[str, ...] = ()
    loopholes: tuple[str, ...] = ()
    reaches: tuple[str, ...] = ()


def bus_of(alias: str) -> str | None:
    """Name the device bus of a modalias pattern, None where it is not for devices ("fs-ext4")."""
    prefix = alias.partition(":")[0]
    if prefix.startswith(_ACPI_ID):
        return "acpi"
    prefix = _BUS_ALIASES.get(prefix, prefix)
    return prefix if prefix in BUSES and ":" in alias else None


def collect(
    modules: Iterable[ModuleInfo], tables: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[KernelDriver, ...]:
    """Pick the drivers out of all modules, sorted by name.

    `tables` holds more aliases by module name: those of built-in code, which older kernels do
    not list (see `trapline.kernel.drivers.devicetables`). Names in it that are no module become
    drivers that are always built in.
    """
    tables = dict(tables or {})
    found: dict[str, KernelDriver] = {}
    for module in modules:
        driver = _driver(module, tables.pop(module.name, ()))
        known = found.get(module.name)
        if driver is not None and (known is None or not known.builtin):
            found[module.name] = driver
    for name, aliases in tables.items():
        extra = _driver(ModuleInfo(name, True, None, (), ()), aliases)
        if extra is not None:
            found.setdefault(name, extra)
    return tuple(found[name] for name in sorted(found))


def _driver(module: ModuleInfo, more: tuple[str, ...]) -> KernelDriver | None:
    aliases = tuple(dict.fromkeys((*module.aliases, *more)))
    used = {bus for alias in aliases if (bus := bus_of(alias))}
    buses = tuple(bus for bus in BUSES if bus in used)
    if not buses and not (module.location or "").startswith(_DRIVER_FOLDERS):
        return None
    return KernelDriver(
        module.name,
        module.builtin,
        module.location,
        buses[0] if buses else "",
        buses,
        tuple(alias for alias in aliases if bus_of(alias)),
        module.depends,
    )


def admit(drivers: Iterable[KernelDriver], allow: AllowList) -> dict[str, Admission]:
    """Say of each driver, by name, whether and how the list lets it in."""
    drivers = tuple(drivers)
    transport = next((d for d in drivers if d.name == VIRTIO_PCI), None)
    admitted = {d.name: _admit_pci(d, allow) for d in drivers}
    if transport is not None and admitted[VIRTIO_PCI].allowed:
        for driver in drivers:
            if "virtio" in driver.buses:
                way = _admit_virtio(driver, transport, allow)
                admitted[driver.name] = _merge(admitted[driver.name], way)
    known = {d.name: d for d in drivers}
    return {
        d.name: replace(admitted[d.name], reaches=_reaches(d, admitted[d.name], known))
        for d in drivers
    }


def _admit_pci(driver: KernelDriver, allow: AllowList) -> Admission:
    ways: dict[str, None] = {}
    loose: dict[str, None] = {}
    for alias in driver.aliases:
        pattern = DeviceAlias.parse(alias)  # None for "vfio_pci:", which binds on request only
        if pattern is None or pattern.bus != "pci":
            continue
        for entry in allow.admitting(alias):
            if entry.pattern.get("v") is None or pattern.get("v") is not None:
                ways[f"{entry.id} -> {driver.name}"] = None
            else:
                loose[f"{entry.id} with class {_class(pattern)} -> {driver.name}"] = None
    return Admission(bool(ways), tuple(ways), tuple(loose))


def _class(pattern: DeviceAlias) -> str:
    parts = (pattern.get(field) for field in ("bc", "sc", "i"))
    return "".join("xx" if part is None else f"{part:02x}" for part in parts)


def _admit_virtio(driver: KernelDriver, transport: KernelDriver, allow: AllowList) -> Admission:
    types = _virtio_types(driver)
    if not types or (allow.filters_virtio_bus and not _on_virtio_list(driver, allow)):
        return Admission(False)
    ways: dict[str, None] = {}
    loose: dict[str, None] = {}
    for entry in _transport_entries(transport, allow):
        for kind, meant in _virtio_types_of(entry, types):
            first = entry.id if meant else f"{entry.id} with subsystem id {kind}"
            way = f"{first} -> {VIRTIO_PCI} -> virtio:{kind} -> {driver.name}"
            (ways if meant else loose)[way] = None
    if allow.filters_virtio_bus:
        ways, loose = {**ways, **loose}, {}
    return Admission(bool(ways), tuple(ways), tuple(loose))


def _virtio_types(driver: KernelDriver) -> frozenset[int] | None:
    """Return the virtio device types that a driver binds to."""
    aliases = (DeviceAlias.parse(alias) for alias in driver.aliases)
    types = {a.get("d") for a in aliases if a is not None and a.bus == "virtio"}
    if None in types:  # "virtio:d*v*": any device
        types = set(virtio.DEVICE_TYPES)
    return frozenset(kind for kind in types if kind is not None)


def _on_virtio_list(driver: KernelDriver, allow: AllowList) -> bool:
    return any(
        entry.pattern.bus == "virtio" for a in driver.aliases for entry in allow.admitting(a)
    )


def _transport_entries(transport: KernelDriver, allow: AllowList) -> tuple[AllowEntry, ...]:
    entries = (entry for alias in transport.aliases for entry in allow.admitting(alias))
    return tuple(dict.fromkeys(entry for entry in entries if entry.pattern.bus == "pci"))


def _virtio_types_of(entry: AllowEntry, wanted: frozenset[int]) -> Iterator[tuple[int, bool]]:
    """Yield (type, whether the PCI id stands for it) of the wanted types that an entry lets in."""
    vendor, device = entry.pattern.get("v"), entry.pattern.get("d")
    if vendor not in {None, virtio.PCI_VENDOR}:
        return
    if device is None:  # every device of the vendor, or a class
        yield from ((kind, True) for kind in sorted(wanted))
        return
    meant = virtio.device_type(device)
    for kind in sorted(wanted):
        if kind == meant:
            yield kind, True
        elif virtio.takes_subsystem_id(device):
            yield kind, False


def _merge(first: Admission, second: Admission) -> Admission:
    return Admission(
        first.allowed or second.allowed,
        first.via + second.via,
        first.loopholes + second.loopholes,
    )


def _reaches(
    driver: KernelDriver, admission: Admission, known: Mapping[str, KernelDriver]
) -> tuple[str, ...]:
    if not (admission.allowed or admission.loopholes):
        return ()
    reached = dict.fromkeys(_libraries(driver, known))
    if "virtio" in driver.buses or driver.name == VIRTIO_PCI:
        reached.update(dict.fromkeys(name for name in _VIRTIO_TRANSPORT if name in known))
    reached.pop(driver.name, None)
    return (*reached, PCI_MSI, PCI_CONFIGURATION)


def _libraries(driver: KernelDriver, known: Mapping[str, KernelDriver]) -> Iterator[str]:
    """Yield the modules that a module depends on, as far as they are drivers' code (libahci)."""
    seen = {driver.name}
    waiting = list(driver.depends)
    while waiting:
        name = waiting.pop(0)
        if name in known and name not in seen:
            seen.add(name)
            waiting += known[name].depends
            yield name
