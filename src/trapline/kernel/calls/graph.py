"""The call graph itself: functions, the sites that lead from one to others, and their closure."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray

#: How an edge was found. The first four are what the code says; of the rest docs/contexts.md tells
#: how each is derived.
EdgeKind = Literal[
    "call",
    "tail jump",
    "alternative",
    "falls through",
    "static call",
    "paravirt",
    "table",
    "variable",
    "jump table",
    "argument",
    "kcfi",
    "prototype",
    "offset",
    "unknown",
]
#: Kinds whose targets are all that fit, not those that were seen to get there.
GUESSED: Final = frozenset({"prototype", "offset", "unknown"})


_NO_CALLEES: "Final[tuple[list[int], list[tuple[int, ...]]]]" = ([], [])


class Edge(NamedTuple):
    """One way from a function to another.

    `source` and `target` are the addresses of functions, `site` that of the instruction; `ways` is
    how many targets the site has.
    """

    source: int
    site: int
    target: int
    kind: EdgeKind
    ways: int


@dataclass(frozen=True, slots=True)
class Site:
    """An instruction that leads to one of several functions, by their addresses, sorted."""

    kind: EdgeKind
    targets: tuple[int, ...]


class Graph:
    """All functions of some objects, and what may be called from each."""

    def __init__(
        self,
        functions: "NDArray[np.uint64]",
        direct: "Mapping[int, tuple[EdgeKind, int]]",
        indirect: "Mapping[int, Site]",
        owners: "Mapping[int, int]",
    ) -> None:
        """Take functions by address, and sites by address: direct ones, and those with a choice.

        `owners` is the function, by address, that each site is in.
        """
        self.functions = functions
        self._direct = direct
        self.indirect = indirect
        self._owners = owners

    def targets(self, site: int) -> frozenset[int]:
        """Return what the branch at an address may lead to; empty for what is no branch."""
        found = self.indirect.get(site)
        if found is not None:
            return frozenset(found.targets)
        direct = self._direct.get(site)
        return frozenset() if direct is None else frozenset({direct[1]})

    @cached_property
    def _sites(self) -> dict[int, list[int]]:
        """Function -> its sites, in order."""
        found: dict[int, list[int]] = {}
        for site in sorted((*self._direct, *self.indirect)):
            found.setdefault(self._owners[site], []).append(site)
        return found

    def edges(self, function: int, spans: "Iterable[range] | None" = None) -> "list[Edge]":
        """Return the edges out of a function, of some parts of it only if `spans` are given."""
        found = []
        for site in self._sites.get(function, ()):
            if spans is not None and not any(site in span for span in spans):
                continue
            choice = self.indirect.get(site)
            if choice is None:
                kind, target = self._direct[site]
                found.append(Edge(function, site, target, kind, 1))
            else:
                ways = len(choice.targets)
                found += [Edge(function, site, t, choice.kind, ways) for t in choice.targets]
        return found

    @cached_property
    def _callees(self) -> dict[int, tuple[list[int], list[tuple[int, ...]]]]:
        """Function -> what it calls directly, and what each of its choices may be."""
        found: dict[int, tuple[list[int], list[tuple[int, ...]]]] = {}
        for site, (_, target) in self._direct.items():
            found.setdefault(self._owners[site], ([], []))[0].append(target)
        for site, choice in self.indirect.items():
            found.setdefault(self._owners[site], ([], []))[1].append(choice.targets)
        return found

    def closure(self, roots: "Iterable[int]", without: "Collection[int]" = ()) -> set[int]:
        """Return all functions that may run after the roots, not entering those in `without`."""
        pending = [root for root in roots if root not in without]
        seen = set(pending)
        choices: set[int] = set()  # of which all targets are seen, by identity
        while pending:
            direct, indirect = self._callees.get(pending.pop(), _NO_CALLEES)
            for targets in (direct, *indirect):
                if targets is not direct:
                    if id(targets) in choices:
                        continue
                    choices.add(id(targets))
                for callee in targets:
                    if callee not in seen and callee not in without:
                        seen.add(callee)
                        pending.append(callee)
        return seen
