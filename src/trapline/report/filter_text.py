"""Allow lists and what they mean for a kernel, as plain text of 80 columns."""

from typing import TYPE_CHECKING, Final

from trapline.allowlist import virtio
from trapline.report.table import counted, paragraph, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.allowlist.entries import AllowEntry, AllowList
    from trapline.results.filter import FilterDriver, FilterResult, Reach

_COUNTS: Final = ("MMIO", "calls", "port I/O", "other", "maps")
_GROUPS: Final = (
    ("On PCI, virtio, VMBus or Xen:", ("pci", "virtio", "vmbus", "xen", "usb")),
    (
        "On ACPI, PNP or the platform bus, by what the host's tables say:",
        ("acpi", "pnp", "platform"),
    ),
)


def render_list(allow: "AllowList", verbosity: int = 0) -> "Iterator[bytes]":
    """Yield an allow list line by line."""
    del verbosity
    for line in _list_lines(allow):
        yield line.encode("ascii") + b"\n"


def render(result: "FilterResult", verbosity: int = 0) -> "Iterator[bytes]":
    """Yield the report of a check line by line."""
    del verbosity
    for line in _lines(result):
        yield line.encode("ascii") + b"\n"


def _list_lines(allow: "AllowList") -> "Iterator[str]":
    yield from paragraph(f"{allow.title}: {counted(len(allow.entries), 'id')} ({allow.source})")
    if allow.entries:
        yield ""
        rows = [(e.id, e.name, _meaning(e), e.note or "") for e in allow.entries]
        yield from table(("id", "true name", "lets in", "note"), rows)
    else:
        yield from paragraph("The list is empty: it lets in no device, on any bus.")
    if any(_is_transitional(entry) for entry in allow.entries):
        yield ""
        yield from paragraph(
            "Linux takes the virtio type of a transitional device (1af4:1000 to 1af4:103f) from "
            "its PCI subsystem id, which the host chooses: each of them lets in every virtio "
            "driver unless the list has virtio entries too."
        )


def _meaning(entry: "AllowEntry") -> str:
    pattern = entry.pattern
    device = pattern.get("d")
    if pattern.bus == "virtio":
        return "any virtio device" if device is None else _type(device)
    if pattern.get("v") == virtio.PCI_VENDOR and device is not None:
        kind = virtio.device_type(device)
        return "no virtio device" if kind is None else _type(kind)
    if pattern.get("v") is None:
        return "any device of the class"
    return "any device of the vendor" if device is None else "this device"


def _type(kind: int) -> str:
    return f"virtio:{kind} ({virtio.DEVICE_TYPES.get(kind, 'reserved')})"


def _is_transitional(entry: "AllowEntry") -> bool:
    device = entry.pattern.get("d")
    return (
        entry.pattern.get("v") == virtio.PCI_VENDOR
        and device is not None
        and virtio.takes_subsystem_id(device)
    )


def _lines(result: "FilterResult") -> "Iterator[str]":
    release = result.kernel.release or "(no release)"
    yield from paragraph(f"{result.generator}: device filter of Linux {release}")
    yield from paragraph(f"list: {result.title}, {counted(len(result.allow), 'id')}")
    for line in (*result.coverage.missing, *result.coverage.advice):
        yield from paragraph(f"note: {line}")
    yield from _allowed(result)
    yield from _loopholes(result)
    yield from _early(result)
    yield from _verdict(result)


def _heading(text: str) -> "Iterator[str]":
    yield ""
    yield text
    yield "=" * len(text)
    yield ""


def _allowed(result: "FilterResult") -> "Iterator[str]":
    found = [driver for driver in result.drivers if driver.verdict == "allowed"]
    yield from _heading("Drivers that the list lets in")
    if not found:
        yield "None."
        return
    yield from _reach_table("driver", [(_name(d), d.reach) for d in found])
    yield ""
    for driver in found:
        for way in driver.via:
            yield from paragraph(way, indent="  ", hanging="      ")
    if result.unused:
        yield ""
        yield from paragraph(
            f"On the list, but with no driver in this kernel: {', '.join(result.unused)}."
        )
    if result.shared:
        yield ""
        yield from paragraph("What touches the host on their behalf:")
        yield ""
        yield from _reach_table("code", [(s.name, s.reach) for s in result.shared])


def _loopholes(result: "FilterResult") -> "Iterator[str]":
    found = [driver for driver in result.drivers if driver.verdict == "loophole"]
    if not found:
        return
    yield from _heading("Drivers that the host can reach through listed ids")
    yield from paragraph(
        "An id does not tell all of a device. Drivers that bind by PCI class take any id, and "
        "Linux takes the virtio type of a transitional device from its subsystem id; the host "
        "chooses both."
    )
    yield ""
    yield from table(("driver", "way"), [(_name(driver), _first_way(driver)) for driver in found])


def _first_way(driver: "FilterDriver") -> str:
    more = len(driver.loopholes) - 1
    return driver.loopholes[0] + (f" ({more} more)" if more else "")


def _early(result: "FilterResult") -> "Iterator[str]":
    yield from _heading("Built in and not on the list: they probe before user space")
    found = [d for d in result.drivers if d.early and d.verdict != "allowed"]
    if not found:
        yield "None."
        return
    for title, buses in _GROUPS:
        drivers = [driver for driver in found if driver.bus in buses and driver.reach.total]
        if drivers:
            yield title
            yield ""
            drivers.sort(key=lambda driver: (-driver.reach.total, driver.name))
            yield from _reach_table("driver", [(d.name, d.reach) for d in drivers])
            yield ""
    silent = [driver.name for driver in found if not driver.reach.total]
    if silent:
        names = ", ".join(silent)
        yield from paragraph(f"The scan found no place of their own that traps: {names}.")


def _verdict(result: "FilterResult") -> "Iterator[str]":
    yield ""
    if not result.findings:
        yield from paragraph("Policy: nothing found against it.")
        return
    yield from paragraph(
        f"Policy: {counted(len(result.findings), 'built-in driver')} outside the list that touch "
        f"the host: {', '.join(result.findings)}."
    )


def _reach_table(header: str, rows: "Iterable[tuple[str, Reach]]") -> "Iterator[str]":
    yield from table(
        (header, *_COUNTS),
        [(name, r.mmio, r.calls, r.pio, r.other, r.mappings) for name, r in rows],
    )


def _name(driver: "FilterDriver") -> str:
    return f"{driver.name} (built in)" if driver.builtin else driver.name
