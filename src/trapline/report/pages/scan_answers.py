"""The questions of the e-mail that trapline comes from, answered from one scan, in its order.

The e-mail is Dave Hansen's of 2 April 2021, "Re: [RFC v1 00/26] Add TDX Guest Support". Every
number is followed by how it was got: a reader must be able to doubt it in the right place.
"""

from itertools import chain
from typing import TYPE_CHECKING, Final

from trapline.allowlist.entries import DeviceAlias
from trapline.report.blocks import Gap, Item, Paragraph, Quote, Table
from trapline.report.classes import CLASSES
from trapline.report.pages.tally import VMLINUX, Tally, group, is_mmio, tally
from trapline.report.words import counted
from trapline.results.findings import findings
from trapline.results.scan import Site

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.report.blocks import Block
    from trapline.results.scan import Driver, Outside, ScanResult

# The devices the e-mail names, as QEMU presents them: hw/net/e1000.c, hw/net/rtl8139.c.
_EMULATED: Final = (
    ("e1000", "pci:v00008086d0000100Esv00001AF4sd00001100bc02sc00i00"),
    ("rtl8139", "pci:v000010ECd00008139sv00001AF4sd00001100bc02sc00i00"),
)
_NAMED: Final = ("local APIC", "IO-APIC", "HPET")
_UNSEEN: Final = 12  # sentences on what was not seen, before a thousand broken modules take over
_COUNTS: Final = ("MMIO", "MMIO calls", "port I/O", "other")

# The parts of the code between a listed id and the host, and how a sentence on them starts.
_PARTS: Final = {
    "driver": "In the drivers themselves",
    "transport": "In their transport",
    "core": "In core code that acts for them",
}


def answers(result: "ScanResult") -> "Iterator[Block]":
    """Yield all answers, each apart from what comes before."""
    yield from _ids(result)
    yield from _drivers(result)
    yield from _hardware(result)
    yield from _apic_and_hpet(result)
    yield from _not_drivers(result)
    yield from _refused(result)
    yield from _not_seen(result)


def _ask(question: str) -> "Iterator[Block]":
    yield Gap()
    yield Quote(question)
    yield Gap()


def _ids(result: "ScanResult") -> "Iterator[Block]":
    yield from _ask("That lists exactly 8 ids")
    yield Paragraph(f"The allow list that was applied has {counted(len(result.allow), 'id')}:")
    yield Gap()
    rows = [(entry.id, entry.name, entry.note or "") for entry in result.allow]
    yield Table(("id", "true name", "note"), tuple(rows))


def _drivers(result: "ScanResult") -> "Iterator[Block]":
    yield from _ask("How many places do those 8 drivers touch MMIO?")
    if not result.let_in():
        scanned = "vmlinux and its modules" if result.kernel.modules else "what was scanned"
        yield Paragraph(f"Nowhere: no driver of {scanned} binds to an id of the list.")
        return
    parts = _on_the_way(result)
    yield Paragraph(
        f"The list lets in {counted(len(result.let_in()), 'driver')}. "
        + " ".join(f"{_PARTS[part]}: {_mmio_and_calls(those)}." for part, those in parts)
    )
    unused = _without_driver(result)
    if unused:
        yield Paragraph(f"No driver in this kernel for {', '.join(unused)}.")
    yield Gap()
    rows = [
        (name, part, *tally(sites))
        for part, those in parts
        for name, sites in those
        if sites or part == "driver"
    ]
    yield Table(("code", "part", *_COUNTS), tuple(rows))
    yield Gap()
    yield Paragraph(
        "How: a driver is let in when an id of the list matches a module alias of it, or when "
        "virtio_pci turns that id into a virtio device it has an alias for. MMIO is each "
        "memory-access instruction inside the DWARF range of an inlined readl(), writel() or "
        "kin; MMIO calls are of out-of-line accessors such as ioread32(), by symbol; the rest is "
        "by opcode, or by the symbol or pv_ops member that is called. Core code serves all "
        "drivers, not only these."
    )


_Group = list[tuple[str, "list[Site]"]]


def _on_the_way(result: "ScanResult") -> tuple[tuple[str, _Group], ...]:
    """Part the code between the listed ids and the host into drivers, transport and core."""
    by_driver = group(result.sites, lambda site: site.driver)
    core = group(
        (site for site in result.sites if site.driver is None), lambda site: site.subsystem
    )
    names = {driver.name for driver in result.drivers}
    serving = result.reached()
    own = [driver.name for driver in result.let_in() if driver.name not in serving]
    return (
        ("driver", [(name, by_driver.get(name, [])) for name in own]),
        ("transport", [(name, by_driver.get(name, [])) for name in serving if name in names]),
        ("core", [(name, core.get(name, [])) for name in serving if name not in names]),
    )


def _without_driver(result: "ScanResult") -> list[str]:
    """Name the entries of the list that lead to no driver, or to its transport only."""
    serving = result.reached()
    used = {
        way.partition(" -> ")[0]
        for driver in result.let_in()
        if driver.name not in serving
        for way in driver.via
    }
    return [f"{entry.id} {entry.name}" for entry in result.allow if entry.id not in used]


def _mmio_and_calls(those: _Group) -> str:
    count = tally(chain.from_iterable(sites for _, sites in those))
    return f"{counted(count.mmio, 'MMIO instruction')}, {counted(count.calls, 'MMIO call')}"


def _hardware(result: "ScanResult") -> "Iterator[Block]":
    yield from _ask(
        'Are there any "real" hardware drivers involved like how QEMU emulates an e1000 or '
        "rtl8139 device?"
    )
    rows = [row for device, modalias in _EMULATED for row in _emulated(result, device, modalias)]
    yield Table(("device", "driver", "on the list", "MMIO", "all sites"), tuple(rows))
    yield Gap()
    pci = [driver for driver in result.drivers if driver.bus == "pci"]
    out = [driver for driver in pci if not driver.allowed]
    builtin = sum(driver.builtin for driver in out)
    yield Paragraph(
        f"Of {counted(len(pci), 'PCI driver')} the list keeps {len(out):,} out: {builtin:,} built "
        f"in, {counted(len(out) - builtin, 'module')}."
    )
    yield Paragraph("How: the PCI id that QEMU gives the device, against all module aliases.")


def _emulated(result: "ScanResult", device: str, modalias: str) -> "list[tuple[str, ...]]":
    drivers = _drivers_of(result, modalias)
    if not drivers:
        return [(device, "no driver for it in this kernel", "-", "-", "-")]
    return [
        (
            device,
            f"{driver.name} ({'built in' if driver.builtin else 'module'})",
            "yes" if driver.allowed else "no",
            f"{driver.mmio:,}",
            f"{driver.sites:,}",
        )
        for driver in drivers
    ]


def _drivers_of(result: "ScanResult", modalias: str) -> "list[Driver]":
    device = DeviceAlias.parse(modalias)
    assert device is not None  # a constant of this module
    found = []
    for driver in result.drivers:
        patterns = (DeviceAlias.parse(alias) for alias in driver.aliases)
        if any(pattern is not None and pattern.covers(device) for pattern in patterns):
            found.append(driver)
    return found


def _apic_and_hpet(result: "ScanResult") -> "Iterator[Block]":
    yield from _ask("What about the APIC or HPET?")
    by_subsystem = group(result.sites, lambda site: site.subsystem)
    rows = [(name, *tally(by_subsystem.get(name, ()))) for name in _NAMED]
    yield Table(("code", *_COUNTS), tuple(rows))
    yield Gap()
    yield Paragraph(
        "How: by the source file a site comes from, drivers included. It says that the code is in "
        "the kernel, not that a TD reaches it: a guest in x2APIC mode uses MSRs in place of MMIO."
    )


def _not_drivers(result: "ScanResult") -> "Iterator[Block]":
    yield from _ask(
        "Sean seemed worried about other x86-specific oddities. Are there any more, or is the "
        "local APIC the only non-driver MMIO?"
    )
    core = group(
        (site for site in result.sites if site.driver is None), lambda site: site.subsystem
    )
    rows = _by_mmio((name, tally(sites), _init(sites)) for name, sites in core.items())
    mmio = sum(row[1] for row in rows)
    calls = sum(row[2] for row in rows)
    apic = tally(core.get("local APIC", ()))
    others = sum(row[0] != "local APIC" for row in rows)
    if not rows:
        yield Paragraph("No: there is no MMIO outside drivers in what was scanned.")
        return
    verdict = "No." if others else "Yes."
    yield Paragraph(
        f"{verdict} Outside drivers there are {counted(mmio, 'MMIO instruction')} and "
        f"{counted(calls, 'MMIO call')}, in {counted(len(rows), 'subsystem')}; the local APIC "
        f"has {apic.mmio:,} and {apic.calls:,}."
    )
    yield Gap()
    yield Table(("subsystem", "MMIO", "MMIO calls", "of these, init only"), tuple(rows))
    yield Gap()
    rest = tally(chain.from_iterable(core.values()))
    yield Paragraph(
        f"Outside drivers there are also {counted(rest.pio, 'port I/O site')} and "
        f"{rest.other:,} of other classes (tables below)."
    )
    yield Paragraph(
        "How: as above; a driver is a Kbuild module, built in or not, or code below drivers/ that "
        "is not part of the kernel proper. Init only: the section starts with .init."
    )


def _by_mmio(rows: "Iterable[tuple[str, Tally, int]]") -> list[tuple[str, int, int, int]]:
    found = [
        (name, count.mmio, count.calls, init) for name, count, init in rows if sum(count[:2]) > 0
    ]
    return sorted(found, key=lambda row: (-row[1] - row[2], row[0]))


def _init(sites: "Iterable[Site]") -> int:
    return sum(site.section.startswith(".init") and site.trap == "mmio" for site in sites)


def _refused(result: "ScanResult") -> "Iterator[Block]":
    yield from _ask(
        "It's with posting a series that masquerades as a full solution while *NOT* covering or "
        "even enumerating the corner cases."
    )
    subjects = (found.subject for found in findings(result))
    refused = [subject for subject in subjects if isinstance(subject, Site)]
    if not refused:
        yield Paragraph("The #VE handler can emulate every form that was found.")
    else:
        mmio = sum(is_mmio(site) for site in refused)
        yield Paragraph(
            f"The #VE handler cannot emulate {len(refused):,} of "
            f"{counted(len(result.sites), 'site')}, {mmio:,} of them MMIO:"
        )
        yield Gap()
        groups = group(refused, lambda site: f"{site.trap}\0{site.reason}")
        rows = sorted(
            (
                (
                    CLASSES[sites[0].trap].title,
                    sum(site.module == VMLINUX for site in sites),
                    sum(site.module != VMLINUX for site in sites),
                    sites[0].reason,
                )
                for sites in groups.values()
            ),
            key=lambda row: (-row[1] - row[2], row[0], row[3]),
        )
        yield Table(("class", VMLINUX, "modules", "reason"), tuple(rows))
    yield Gap()
    yield Paragraph(
        "How: each instruction against the cases of insn_decode_mmio(), handle_mmio(), handle_io() "
        "and virt_exception_kernel(). A refused site is an oops only where a TD reaches it."
    )


def _data_read_as_code(part: "Outside") -> str:
    flags = "writable and executable" if part.writable else "executable"
    return (
        f"{counted(part.patterns, 'pattern')} in {part.section} that would be instructions that "
        f"trap. The section is flagged as {flags}, but these {part.size:,} bytes are data: no "
        "function, unwind entry or compilation unit has them."
    )


def _not_seen(result: "ScanResult") -> "Iterator[Block]":
    yield Gap()
    yield Paragraph("What this scan did not see:")
    unseen = (*result.coverage.missing, *result.coverage.advice)
    for text in unseen[:_UNSEEN]:
        yield Item(text)
    if len(unseen) > _UNSEEN:
        yield Item(f"{len(unseen) - _UNSEEN:,} more, which --format json has.")
    for part in result.coverage.outside:
        yield Item(_data_read_as_code(part))
    yield Item(
        "Most plain dereferences of mapped device memory, which no accessor marks: they look like "
        "any other load or store, and the pointer is followed within the function that maps and "
        "through variables only. Where device memory is mapped is in the table of mapping sites."
    )
    yield Item("Which of the sites a boot reaches: a site says that the code is there.")
