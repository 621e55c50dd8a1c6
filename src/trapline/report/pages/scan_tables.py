"""The tables of a scan that follow the answers."""

from collections import Counter
from typing import TYPE_CHECKING, Final

from trapline.report.blocks import Gap, Heading, Paragraph, Table
from trapline.report.classes import CLASSES
from trapline.report.pages.tally import VMLINUX, group, tally
from trapline.results.findings import findings, outsiders
from trapline.results.scan import Driver

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trapline.report.blocks import Block
    from trapline.results.scan import ScanResult

_COUNTS: Final = ("MMIO", "MMIO calls", "port I/O", "other")


def tables(result: "ScanResult") -> "Iterator[Block]":
    """Yield all tables, each under its heading."""
    yield from _by_class(result)
    yield from _by_subsystem(result)
    yield from _allowed(result)
    yield from _not_allowed(result)
    yield from _mappings(result)
    yield from _paravirt(result)


def _heading(text: str) -> "Iterator[Block]":
    yield Gap()
    yield Heading(text, 1)


def _by_class(result: "ScanResult") -> "Iterator[Block]":
    yield from _heading("Sites by class and access")
    rows = []
    for kind, text in CLASSES.items():
        sites = [site for site in result.sites if site.trap == kind]
        for access, those in sorted(group(sites, lambda site: site.access).items()):
            forms = Counter(site.form for site in those)
            rows.append(
                (
                    text.title,
                    access,
                    sum(s.form == "instruction" and s.module == VMLINUX for s in those),
                    sum(s.form == "instruction" and s.module != VMLINUX for s in those),
                    forms["paravirt"],
                    forms["call"],
                    sum(not s.emulable for s in those),
                )
            )
    header = ("class", "access", VMLINUX, "modules", "paravirt", "calls", "refused")
    yield Table(header, tuple(rows))
    yield Paragraph(
        "vmlinux, modules: instructions that trap; paravirt: calls through pv_ops that hide one; "
        "calls: of out-of-line accessors; refused: what the #VE handler cannot emulate."
    )


def _by_subsystem(result: "ScanResult") -> "Iterator[Block]":
    yield from _heading("Sites by subsystem, drivers included")
    groups = group(result.sites, lambda site: site.subsystem)
    rows = [(name, *tally(sites)) for name, sites in groups.items()]
    rows.sort(key=lambda row: (-row[1], -sum(row[2:]), row[0]))
    yield Table(("subsystem", *_COUNTS), tuple(rows))


def _allowed(result: "ScanResult") -> "Iterator[Block]":
    drivers = result.let_in()
    if not drivers:
        return
    yield from _heading("Drivers the allow list lets in")
    rows = []
    for driver in drivers:
        first, *others = driver.via or ("",)
        rows.append((driver.name, _kind(driver), first))
        rows += [("", "", way) for way in others]
    yield Table(("driver", "kind", "through"), tuple(rows))


def _not_allowed(result: "ScanResult") -> "Iterator[Block]":
    found = [each for each in findings(result) if isinstance(each.subject, Driver)]
    subjects = [each.subject for each in found if isinstance(each.subject, Driver)]
    settled = [each.subject for each in found if each.settled and isinstance(each.subject, Driver)]
    yield from _outsiders(
        result,
        "Built-in drivers outside the list that touch the host",
        [driver for driver in subjects if driver not in settled],
    )
    yield from _outsiders(
        result, "Built-in drivers outside the list that are labelled as all right", settled
    )
    yield from _outsiders(
        result,
        "Built-in drivers on no bus of the host's: libraries, legacy probes",
        [driver for driver in outsiders(result) if driver not in subjects],
    )


def _outsiders(
    result: "ScanResult", heading: str, drivers: "Sequence[Driver]"
) -> "Iterator[Block]":
    if not drivers:
        return
    yield from _heading(heading)
    by_driver = group(result.sites, lambda site: site.driver)
    maps = Counter(mapping.driver for mapping in result.mappings)
    rows = [
        (
            driver.name,
            driver.bus or "-",
            *tally(by_driver.get(driver.name, ())),
            maps[driver.name],
        )
        for driver in drivers
    ]
    rows.sort(key=lambda row: (-row[2], -sum(row[3:]), row[0]))
    yield Table(("driver", "bus", *_COUNTS, "maps"), tuple(rows))


def _mappings(result: "ScanResult") -> "Iterator[Block]":
    if not result.mappings:
        return
    yield from _heading("Mapping sites: where a driver filter can act")
    mappers = sorted({mapping.mapper for mapping in result.mappings})
    rows = []
    for mapper in mappers:
        those = [mapping for mapping in result.mappings if mapping.mapper == mapper]
        builtin = [mapping for mapping in those if mapping.module == VMLINUX]
        drivers = sum(mapping.driver is not None for mapping in builtin)
        rows.append((mapper, len(builtin) - drivers, drivers, len(those) - len(builtin)))
    rows.sort(key=lambda row: (-sum(row[1:]), row[0]))
    yield Table(("mapper", "kernel proper", "built-in drivers", "modules"), tuple(rows))


def _paravirt(result: "ScanResult") -> "Iterator[Block]":
    sites = [site for site in result.sites if site.form == "paravirt"]
    if not sites:
        return
    yield from _heading("Paravirt calls that hide a trap")
    groups = group(sites, lambda site: (site.accessor or site.trap).removeprefix("pv_ops."))
    rows = [
        (name, sum(s.module == VMLINUX for s in those), sum(s.module != VMLINUX for s in those))
        for name, those in groups.items()
    ]
    rows.sort(key=lambda row: (-row[1] - row[2], row[0]))
    yield Table(("pv_ops member", VMLINUX, "modules"), tuple(rows))


def _kind(driver: "Driver") -> str:
    return f"{driver.bus or 'no'} bus, {'built in' if driver.builtin else 'module'}"
