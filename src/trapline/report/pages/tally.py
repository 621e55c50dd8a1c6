"""Counts of sites, from the result document alone."""

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from trapline.results.scan import Site

VMLINUX = "vmlinux"


class Tally(NamedTuple):
    """How many sites of each kind; every site is in exactly one field.

    `mmio`: instructions that do the access themselves. `calls`: calls of out-of-line MMIO
    accessors, which do it elsewhere. `pio`: port I/O of either kind, PCI configuration accesses
    included. `other`: all other classes.
    """

    mmio: int = 0
    calls: int = 0
    pio: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All sites."""
        return sum(self)


def tally(sites: "Iterable[Site]") -> Tally:
    """Count sites."""
    counts = dict.fromkeys(Tally._fields, 0)
    for site in sites:
        counts[_field(site)] += 1
    return Tally(**counts)


def _field(site: "Site") -> str:
    if site.trap == "mmio":
        return "mmio" if site.form == "instruction" else "calls"
    return "pio" if site.trap == "pio" else "other"


def is_mmio(site: "Site") -> bool:
    """Whether the site is an MMIO instruction."""
    return _field(site) == "mmio"


def group(sites: "Iterable[Site]", key: "Callable[[Site], str | None]") -> "dict[str, list[Site]]":
    """Sort sites into groups; those whose key is None are left out."""
    groups: defaultdict[str, list[Site]] = defaultdict(list)
    for site in sites:
        name = key(site)
        if name is not None:
            groups[name].append(site)
    return dict(groups)
