"""Each trap of a boot, looked up in the scan of the same kernel.

A scan claims to list every instruction that can trap. A boot is the test: what trapped and is
not in the list is printed, with the reason as far as it can be told.
"""

from collections.abc import Iterable
from typing import Final

from trapline.kernel.binary import VMLINUX
from trapline.kernel.live.runtime import Location
from trapline.machine.observe.recorder import TrapPlace
from trapline.machine.observe.symbols import GuestSymbols
from trapline.results.boot import Soundness, Standing, TrapSite
from trapline.results.scan import ScanResult, Site
from trapline.results.trapclass import TrapClass
from trapline.tdx.vmm_interface import trap_class

_OUTSIDE: Final = {
    "decompressor": "code of the boot image's decompressor, which is not part of vmlinux",
    "user": "executed in ring 3",
}


_Key = tuple[str, str, int]


def _key(image: str, section: str, address: int) -> _Key:
    # In vmlinux the link-time address says it all, and parts of .text have names of their own.
    return image, "" if image == VMLINUX else section, address


class SiteIndex:
    """The sites of a scan by image and address; altinstructions also by what they replace.

    A module's site is known by its section and the offset in it.
    """

    def __init__(self, scan: ScanResult | None) -> None:
        self.scanned = scan is not None
        self._sites: dict[_Key, list[Site]] = {}
        for site in () if scan is None else scan.sites:
            for address in {site.address, site.origin or site.address}:
                self._add(site, address)

    def _add(self, site: Site, address: str) -> None:
        try:
            key = _key(site.module, site.section, int(address, 16))
        except ValueError:
            return
        self._sites.setdefault(key, []).append(site)

    def find(self, location: Location, symbols: GuestSymbols, trap: TrapClass) -> Site | None:
        """Return the site of that class at that place."""
        binary = symbols.image(location.image)
        if binary is None or location.link_address is None:
            return None
        section = binary.text_at(location.link_address)
        offset = binary.offset_of(location.link_address)
        key = _key(location.image, "" if section is None else section.name, offset)
        for site in self._sites.get(key, ()):
            if site.trap == trap:
                return site
        return None


def account(
    places: Iterable[tuple[TrapPlace, int]], symbols: GuestSymbols, index: SiteIndex
) -> tuple[TrapSite, ...]:
    """Describe each place that trapped, the most frequent first.

    Places of the same kind at the same link-time address (before and after KASLR, or RDMSR
    and WRMSR of one class) stay apart: their run-time addresses differ.
    """
    sites = [_describe(place, count, symbols, index) for place, count in places]
    sites.sort(key=lambda site: (-site.count, site.trap, site.address))
    return tuple(sites)


def _describe(place: TrapPlace, count: int, symbols: GuestSymbols, index: SiteIndex) -> TrapSite:
    location = symbols.locate(place.rip, is_user=place.is_user)
    trap = trap_class(place.reason)
    standing, scan_id, reason = _stand(location, trap, index, symbols)
    innermost = location.frames[0] if location.frames else None
    return TrapSite(
        trap=trap,
        count=count,
        image=location.image,
        address=f"{place.rip:#x}",
        link_address=None if location.link_address is None else f"{location.link_address:#x}",
        label=location.label,
        function=location.function,
        file=None if innermost is None else innermost.file,
        line=None if innermost is None else innermost.line,
        inlined=location.frames[:-1],
        standing=standing,
        scan_id=scan_id,
        reason=reason,
    )


def _stand(
    location: Location, trap: TrapClass, index: SiteIndex, symbols: GuestSymbols
) -> tuple[Standing, str | None, str]:
    outside = _OUTSIDE.get(location.image)
    if outside is not None:
        return "outside", None, outside
    if not index.scanned:
        return "unaccounted", None, "there is no scan of this kernel to look in"
    if location.link_address is None:
        return "unaccounted", None, "the address belongs to no code that is known"
    site = index.find(location, symbols, trap)
    if site is None:
        return "unaccounted", None, f"the scan has no {trap} site at this address"
    return "found", site.id, ""


def soundness(sites: Iterable[TrapSite], *, scanned: bool) -> Soundness:
    """Add up how much the scan had foreseen."""
    inside = [site for site in sites if site.standing != "outside"]
    found = [site for site in inside if site.standing == "found"]
    return Soundness(
        scanned=scanned,
        traps=sum(site.count for site in inside),
        traps_found=sum(site.count for site in found),
        sites=len(inside),
        sites_found=len(found),
        outside_traps=sum(site.count for site in sites if site.standing == "outside"),
    )
