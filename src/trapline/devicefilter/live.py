"""An allow list held against the machine this runs on, in a TD or not, from /sys and /proc.

Everything is read below `root`, so that a copy of another machine's files will do. What cannot be
read is said to be unknown; nothing is written.
"""

import re
from typing import TYPE_CHECKING, Final

from trapline.base import files
from trapline.base.errors import BadInputFileError, UsageError
from trapline.base.version import GENERATOR
from trapline.results.filter_live import LiveCheck, LiveDevice, LiveResult

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trapline.allowlist.entries import AllowList
    from trapline.results.filter_live import Standing

_MAX_FILE: Final = 1 << 20
_MAX_DEVICES: Final = 4096
# Without these a TD does not start (ACPI 6.4, 5.2); all others are the host's own ideas.
_NEEDED_TABLES: Final = frozenset({"FACP", "DSDT", "APIC", "CCEL", "MADT"})
_SLAB: Final = 2048  # bytes of a SWIOTLB slot, IO_TLB_SIZE
# The host writes what these are read from, in shared memory: no trap, but its word for the time.
_HOST_CLOCKS: Final = frozenset({"kvm-clock", "hyperv_clocksource_tsc_page"})


def inspect(root: "Path", allow: "AllowList") -> LiveResult:
    """Look at the machine below `root`; UsageError where there is none to look at."""
    if not (root / "sys/bus").is_dir():
        raise UsageError(
            f"{root}: there is no sys/bus to look at; mount sysfs, or name the folder that holds "
            "a machine's sys and proc with --root."
        )
    devices = tuple(_devices(root, allow))
    is_td = "tdx_guest" in _text(root, "proc/cpuinfo").split()
    checks = (
        _td(root, is_td=is_td),
        _bound(devices),
        _io_apic(root),
        _hpet(root),
        _tables(root),
        _clock(root, is_td=is_td),
        _shared(root, is_td=is_td),
    )
    return LiveResult(
        generator=GENERATOR,
        title=allow.title,
        is_td=is_td,
        checks=checks,
        devices=devices,
    )


def _text(root: "Path", name: str) -> str:
    """Read a file; nothing where there is none or it may not be read."""
    try:
        data = files.read(root / name, limit=_MAX_FILE, what="a file of a kernel's")
    except BadInputFileError:
        return ""
    return data.decode("utf-8", "replace")


def _names(root: "Path", folder: str) -> list[str]:
    try:
        return sorted(path.name for path in (root / folder).iterdir())[:_MAX_DEVICES]
    except OSError:
        return []


def _devices(root: "Path", allow: "AllowList") -> "Iterator[LiveDevice]":
    buses = ("pci", "virtio") if allow.filters_virtio_bus else ("pci",)
    for bus in buses:
        for name in _names(root, f"sys/bus/{bus}/devices"):
            place = f"sys/bus/{bus}/devices/{name}"
            modalias = _text(root, f"{place}/modalias").strip()
            entry = allow.matching(modalias)
            link = root / place / "driver"
            yield LiveDevice(
                bus=bus,
                name=name,
                modalias=modalias,
                driver=link.readlink().name if link.is_symlink() else None,
                allowed=None if entry is None else entry.id,
            )


def _td(root: "Path", *, is_td: bool) -> LiveCheck:
    if is_td:
        return _check("TD", "yes", "ok", "the CPU flags name tdx_guest")
    known = bool(_text(root, "proc/cpuinfo"))
    found = "no" if known else "unknown"
    return _check("TD", found, "note", "the CPU flags do not name tdx_guest")


def _bound(devices: tuple[LiveDevice, ...]) -> LiveCheck:
    if not devices:
        return _check("bound drivers", "no devices", "note", "the PCI bus is empty or not there")
    strangers = [device for device in devices if device.driver and not device.allowed]
    if not strangers:
        return _check("bound drivers", "all listed", "ok", "no driver has an unlisted device")
    names = ", ".join(f"{device.driver} ({device.name})" for device in strangers[:8])
    more = f" and {len(strangers) - 8} more" if len(strangers) > 8 else ""
    return _check(
        "bound drivers", f"{len(strangers)} not listed", "finding", f"bound are {names}{more}"
    )


def _io_apic(root: "Path") -> LiveCheck:
    interrupts = _text(root, "proc/interrupts")
    if not interrupts:
        return _check("IO-APIC", "unknown", "note", "/proc/interrupts cannot be read")
    if "IO-APIC" in interrupts:
        return _check("IO-APIC", "in use", "finding", "its registers are the host's MMIO")
    return _check("IO-APIC", "not in use", "ok", "no interrupt comes through it")


def _hpet(root: "Path") -> LiveCheck:
    clocks = _text(root, "sys/devices/system/clocksource/clocksource0/available_clocksource")
    tables = _tables_of(root)
    if "hpet" in clocks.split() or "HPET" in tables:
        return _check("HPET", "present", "finding", "its registers are the host's MMIO")
    if not clocks and not tables:
        return _check("HPET", "unknown", "note", "neither clock sources nor ACPI tables are seen")
    return _check("HPET", "absent", "ok", "neither a clock source nor an ACPI table names it")


def _tables_of(root: "Path") -> list[str]:
    names = _names(root, "sys/firmware/acpi/tables")
    return [name for name in names if name.rstrip("0123456789").isupper()]


def _tables(root: "Path") -> LiveCheck:
    tables = _tables_of(root)
    if not tables:
        return _check("ACPI tables", "none seen", "note", "the folder is not there")
    others = [name for name in tables if name.rstrip("0123456789") not in _NEEDED_TABLES]
    if not others:
        return _check("ACPI tables", f"{len(tables)}", "ok", "those that a TD needs")
    return _check(
        "ACPI tables",
        f"{len(tables)}",
        "note",
        f"the host wrote more than a TD needs: {', '.join(others[:12])}",
    )


def _clock(root: "Path", *, is_td: bool) -> LiveCheck:
    place = "sys/devices/system/clocksource/clocksource0/current_clocksource"
    name = _text(root, place).strip()
    if not name:
        return _check("clock source", "unknown", "note", "the file is not there")
    if name == "tsc":
        return _check("clock source", name, "ok", "reading it is no trap")
    if name in _HOST_CLOCKS:
        why = "reading it is no trap, but the time is the host's word"
        return _check("clock source", name, "finding" if is_td else "note", why)
    return _check("clock source", name, "finding", "each reading asks the host")


def _shared(root: "Path", *, is_td: bool) -> LiveCheck:
    slabs = _number(root, "sys/kernel/debug/swiotlb/io_tlb_nslabs")
    used = _number(root, "sys/kernel/debug/swiotlb/io_tlb_used")
    if slabs is None:
        return _check("shared memory", "unknown", "note", "debugfs is not mounted or not readable")
    size = slabs * _SLAB >> 20
    busy = "" if used is None else f", {used * _SLAB >> 10} KiB in use"
    if is_td and not size:
        return _check("shared memory", "none", "finding", "a TD's devices need bounce buffers")
    return _check("shared memory", f"{size} MiB{busy}", "ok", "bounce buffers (SWIOTLB)")


def _number(root: "Path", name: str) -> int | None:
    # Digits of other scripts are digits to Python, and a thousand of them are no number.
    found = re.fullmatch(r"[0-9]{1,20}", _text(root, name).strip())
    return None if found is None else int(found[0])


def _check(name: str, found: str, standing: "Standing", why: str) -> LiveCheck:
    return LiveCheck(name=name, found=found, standing=standing, why=why)
