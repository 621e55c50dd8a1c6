"""What is said of an allow list held against a kernel."""

from typing import TYPE_CHECKING, Final

from trapline.report.blocks import Gap, Heading, Paragraph, Table
from trapline.report.pages.said import said
from trapline.report.words import counted
from trapline.results.filter import FilterDriver
from trapline.results.findings import findings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.report.blocks import Block
    from trapline.results.filter import FilterResult, Reach

_COUNTS: Final = ("MMIO", "calls", "port I/O", "other", "maps")
_GROUPS: Final = (
    ("On PCI, virtio, VMBus or Xen:", ("pci", "virtio", "vmbus", "xen", "usb")),
    (
        "On ACPI, PNP or the platform bus, by what the host's tables say:",
        ("acpi", "pnp", "platform"),
    ),
)


def page(result: "FilterResult", verbosity: int = 0) -> "Iterator[Block]":
    """Yield the report's blocks."""
    del verbosity
    release = result.kernel.release or "(no release)"
    yield Paragraph(f"{result.generator}: device filter of Linux {release}")
    yield Paragraph(f"list: {result.title}, {counted(len(result.allow), 'id')}")
    for line in (*result.coverage.missing, *result.coverage.advice):
        yield Paragraph(f"note: {line}")
    yield from _allowed(result)
    yield from _loopholes(result)
    yield from _early(result)
    yield from _verdict(result)


def _heading(text: str) -> "Iterator[Block]":
    yield Gap()
    yield Heading(text, 1)
    yield Gap()


def _allowed(result: "FilterResult") -> "Iterator[Block]":
    found = [driver for driver in result.drivers if driver.verdict == "allowed"]
    yield from _heading("Drivers that the list lets in")
    if not found:
        yield Paragraph("None.")
        return
    yield from _reach_table("driver", [(_name(d), d.reach) for d in found])
    yield Gap()
    for driver in found:
        for way in driver.via:
            yield Paragraph(way, indent=2, hanging=4)
    if result.unused:
        yield Gap()
        yield Paragraph(
            f"On the list, but with no driver in this kernel: {', '.join(result.unused)}."
        )
    if result.shared:
        yield Gap()
        yield Paragraph("What touches the host on their behalf:")
        yield Gap()
        yield from _reach_table("code", [(s.name, s.reach) for s in result.shared])


def _loopholes(result: "FilterResult") -> "Iterator[Block]":
    found = [driver for driver in result.drivers if driver.verdict == "loophole"]
    if not found:
        return
    yield from _heading("Drivers that the host can reach through listed ids")
    yield Paragraph(
        "An id does not tell all of a device. Drivers that bind by PCI class take any id, and "
        "Linux takes the virtio type of a transitional device from its subsystem id; the host "
        "chooses both."
    )
    yield Gap()
    yield Table(("driver", "way"), tuple((_name(each), _first_way(each)) for each in found))


def _first_way(driver: "FilterDriver") -> str:
    more = len(driver.loopholes) - 1
    return driver.loopholes[0] + (f" ({more} more)" if more else "")


def _early(result: "FilterResult") -> "Iterator[Block]":
    yield from _heading("Built in and not on the list: they probe before user space")
    found = [d for d in result.drivers if d.early and d.verdict != "allowed"]
    if not found:
        yield Paragraph("None.")
        return
    for title, buses in _GROUPS:
        drivers = [driver for driver in found if driver.bus in buses and driver.reach.total]
        if drivers:
            yield Paragraph(title)
            yield Gap()
            drivers.sort(key=lambda driver: (-driver.reach.total, driver.name))
            yield from _reach_table("driver", [(d.name, d.reach) for d in drivers])
            yield Gap()
    silent = [driver.name for driver in found if not driver.reach.total]
    if silent:
        names = ", ".join(silent)
        yield Paragraph(f"The scan found no place of their own that traps: {names}.")


def _verdict(result: "FilterResult") -> "Iterator[Block]":
    yield Gap()
    yield from said(result, result.labels)
    subjects = (found.subject for found in findings(result) if not found.settled)
    names = [driver.name for driver in subjects if isinstance(driver, FilterDriver)]
    if not names:
        seen = "" if result.coverage.complete else " in what was seen"
        yield Paragraph(f"Policy: nothing found against it{seen}.")
        return
    yield Paragraph(
        f"Policy: {counted(len(names), 'built-in driver')} outside the list that touch "
        f"the host: {', '.join(names)}."
    )


def _reach_table(header: str, rows: "Iterable[tuple[str, Reach]]") -> "Iterator[Block]":
    yield Table(
        (header, *_COUNTS),
        tuple((name, r.mmio, r.calls, r.pio, r.other, r.mappings) for name, r in rows),
    )


def _name(driver: "FilterDriver") -> str:
    return f"{driver.name} (built in)" if driver.builtin else driver.name
