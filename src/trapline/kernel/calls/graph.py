"""The call graph itself: functions, the sites that lead from one to others, and their closure."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from iced_x86 import Instruction
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
# Kinds whose targets are all that fit, not those that were seen to get there.
_GUESSED: Final = frozenset({"prototype", "offset", "unknown"})
_FEW: Final = 16


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

    @property
    def is_guess(self) -> bool:
        """Whether it is one of so many that it says little."""
        return self.kind in _GUESSED and self.ways > _FEW


@dataclass(frozen=True, slots=True)
class Site:
    """An instruction that leads to one of several functions, by their addresses, sorted."""

    kind: EdgeKind
    targets: tuple[int, ...]

    @property
    def is_guess(self) -> bool:
        """Whether its targets are so many that they say little."""
        return self.kind in _GUESSED and len(self.targets) > _FEW


class Graph:
    """All functions of some objects, and what may be called from each."""

    def __init__(
        self,
        functions: "NDArray[np.uint64]",
        direct: "Mapping[int, tuple[EdgeKind, int]]",
        indirect: "Mapping[int, Site]",
        owners: "Mapping[int, int]",
        members: "Callable[[str, str], tuple[int, ...] | None]",
        owners_of: "Callable[[NDArray[np.uint64]], NDArray[np.int64]]",
        body: "Callable[[int], dict[int, Instruction]]",
    ) -> None:
        """Take functions by address, and sites by address: direct ones, and those with a choice.

        `owners` is the function, by address, that each site is in; `members` is asked what the
        member of a struct points to, `owners_of` which functions, by index, addresses are of,
        `body` for the instructions of a function, by their addresses.
        """
        self.body = body
        self._owners_of = owners_of
        self.members = members
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

    def edges(self, function: int) -> "list[Edge]":
        """Return the edges out of a function, in the order of their sites."""
        found = []
        for site in self._sites.get(function, ()):
            choice = self.indirect.get(site)
            if choice is None:
                kind, target = self._direct[site]
                found.append(Edge(function, site, target, kind, 1))
            else:
                ways = len(choice.targets)
                found += [Edge(function, site, t, choice.kind, ways) for t in choice.targets]
        return found

    def function_at(self, address: int) -> int | None:
        """Return the function that an instruction runs in, None before the first."""
        owner = int(self._owners_of(np.array([address], np.uint64))[0])
        return None if owner < 0 else int(self.functions[owner])

    @cached_property
    def told(self) -> dict[int, tuple[int, ...]]:
        """Function -> what it calls, each once, in order; but what is only guessed."""
        found: dict[int, set[int]] = {}
        for site, (_, target) in self._direct.items():
            found.setdefault(self._owners[site], set()).add(target)
        for site, choice in self.indirect.items():
            if not choice.is_guess:
                found.setdefault(self._owners[site], set()).update(choice.targets)
        return {function: tuple(sorted(callees)) for function, callees in found.items()}

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
