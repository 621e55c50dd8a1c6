"""One boot on two versions of the TDX module, side by side."""

from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from trapline.results.boot import OtherModule

if TYPE_CHECKING:
    from trapline.results.boot import BootResult


def beside(result: "BootResult", other: "BootResult") -> "BootResult":
    """Return `result` with what `other` says of the same boot on another module."""
    here, there = _places(result), _places(other)
    compared = OtherModule(
        module_version=other.machine.module_version,
        outcome=other.outcome,
        traps=other.traps,
        places=dict(Counter(trap for trap, _ in there)),
        tdvmcalls=other.tdvmcalls,
        gone=tuple(f"{trap} {label}" for trap, label in here if (trap, label) not in there),
        new=tuple(f"{trap} {label}" for trap, label in there if (trap, label) not in here),
    )
    return msgspec.structs.replace(result, other_module=compared)


def _places(result: "BootResult") -> dict[tuple[str, str], int]:
    """Count the #VEs of each place, by class and label."""
    places: Counter[tuple[str, str]] = Counter()
    for site in result.sites:
        if site.trap != "tdcall":
            places[site.trap, site.label] += site.count
    return dict(places)
