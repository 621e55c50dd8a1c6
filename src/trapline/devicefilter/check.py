"""Holds the drivers of a scanned kernel against an allow list."""

from collections import Counter
from typing import TYPE_CHECKING, Final

from trapline.base.version import GENERATOR
from trapline.kernel.drivers.binding import VIRTIO_PCI, Admission, KernelDriver, admit
from trapline.results.filter import FilterDriver, FilterResult, Reach, Shared, Verdict
from trapline.results.findings import HOST_BUSES, early_outsiders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from trapline.allowlist.entries import AllowList
    from trapline.results.scan import Driver, ScanResult, Site
    from trapline.results.scan import Mapping as MappingSite

_NOTHING: Final = Reach(mmio=0, calls=0, pio=0, other=0, mappings=0)


def check(scan: "ScanResult", allow: "AllowList") -> FilterResult:
    """Say what `allow` means for the kernel that was scanned; the scan's own list is not used."""
    own = _reach_by(scan, lambda item: item.driver)
    verdicts = admit((_kernel_driver(driver) for driver in scan.drivers), allow)
    drivers = tuple(
        _judge(driver, verdicts[driver.name], own.get(driver.name, _NOTHING))
        for driver in sorted(scan.drivers, key=lambda driver: driver.name)
    )
    return FilterResult(
        generator=GENERATOR,
        kernel=scan.kernel,
        coverage=scan.coverage,
        title=allow.title,
        allow=allow.documents(),
        drivers=drivers,
        shared=_shared(scan, drivers, own),
        unused=_unused(allow, drivers),
        findings=tuple(driver.name for driver in early_outsiders(drivers)),
    )


def _kernel_driver(driver: "Driver") -> KernelDriver:
    buses = (driver.bus,) if driver.bus else ()
    if driver.bus != "virtio" and any(a.startswith("virtio:") for a in driver.aliases):
        buses = (*buses, "virtio")
    return KernelDriver(driver.name, driver.builtin, None, driver.bus, buses, driver.aliases, ())


def _judge(driver: "Driver", verdict: Admission, reach: Reach) -> FilterDriver:
    word: Verdict = "outside"
    if verdict.allowed:
        word = "allowed"
    elif verdict.loopholes:
        word = "loophole"
    return FilterDriver(
        name=driver.name,
        bus=driver.bus,
        builtin=driver.builtin,
        early=driver.builtin and driver.bus in HOST_BUSES,
        verdict=word,
        via=verdict.via,
        loopholes=verdict.loopholes,
        # The scan knows what a module depends on; it says so of the drivers its list let in.
        reaches=tuple(dict.fromkeys((*verdict.reaches, *driver.reaches)))
        if word != "outside"
        else (),
        reach=reach,
    )


def _unused(allow: "AllowList", drivers: "Iterable[FilterDriver]") -> tuple[str, ...]:
    """Name the PCI ids and classes that let nothing in but, at most, the virtio transport."""
    used = {way.partition(" ")[0] for d in drivers if d.name != VIRTIO_PCI for way in d.via}
    return tuple(e.id for e in allow.entries if e.pattern.bus == "pci" and e.id not in used)


def _shared(
    scan: "ScanResult", drivers: "Iterable[FilterDriver]", own: "Mapping[str, Reach]"
) -> tuple[Shared, ...]:
    """Collect what acts for drivers that are let in, with its reach; drivers before subsystems."""
    names = dict.fromkeys(n for d in drivers if d.verdict == "allowed" for n in d.reaches)
    core = _reach_by(scan, lambda item: item.subsystem if item.driver is None else None)
    known = {driver.name for driver in scan.drivers}
    return tuple(
        Shared(name=name, reach=(own if name in known else core).get(name, _NOTHING))
        for name in names
    )


def _reach_by(
    scan: "ScanResult", key: "Callable[[Site | MappingSite], str | None]"
) -> dict[str, Reach]:
    counts: dict[str, Counter[str]] = {}
    for site in scan.sites:
        if (name := key(site)) is not None:
            counts.setdefault(name, Counter())[_field(site)] += 1
    for mapping in scan.mappings:
        if (name := key(mapping)) is not None:
            counts.setdefault(name, Counter())["mappings"] += 1
    return {
        name: Reach(
            mmio=found["mmio"],
            calls=found["calls"],
            pio=found["pio"],
            other=found["other"],
            mappings=found["mappings"],
        )
        for name, found in counts.items()
    }


def _field(site: "Site") -> str:
    if site.trap == "mmio":
        return "mmio" if site.form == "instruction" else "calls"
    return "pio" if site.trap == "pio" else "other"
