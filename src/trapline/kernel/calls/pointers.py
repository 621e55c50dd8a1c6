"""The words of initialised data that are addresses of functions."""

from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from trapline.kernel.elf.file import SHT_PROGBITS
from trapline.kernel.elf.symtab import STT_OBJECT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from trapline.kernel.binary import Binary
    from trapline.kernel.elf.file import Section

_WORD: Final = 8


class Region(NamedTuple):
    """Initialised data: its words, the first one at `address`, and the bounds behind the last."""

    address: int
    end: int
    words: "NDArray[np.uint64]"


class Pointers:
    """All function pointers in the data of some objects.

    `places` and `targets` have shape (n,), sorted by place.
    """

    def __init__(
        self,
        regions: "list[Region]",
        objects: "tuple[NDArray[np.uint64], NDArray[np.uint64]]",
        functions: "NDArray[np.uint64]",
    ) -> None:
        """Take the data, variables as starts and ends, and functions."""
        self._regions = sorted(regions)
        self._object_starts, self._object_ends = objects
        found = [self._pointers(region, functions) for region in self._regions]
        none = np.zeros(0, np.uint64)
        self.places = np.concatenate([places for places, _ in found] or [none])
        self.targets = np.concatenate([targets for _, targets in found] or [none])
        #: Functions that 32-bit distances in the data lead to, as PREL32 tables have them.
        self.relative = frozenset(
            target for region in self._regions for target in _relative(region, functions)
        )

    def word(self, address: int) -> int | None:
        """Return what is at an address, None where there is no initialised data."""
        for region in self._regions:
            if region.address <= address < region.end and (address - region.address) % _WORD == 0:
                return int(region.words[(address - region.address) // _WORD])
        return None

    def at(self, address: int) -> int | None:
        """Return the function that a word points to."""
        place = int(np.searchsorted(self.places, np.uint64(address)))
        if place < len(self.places) and self.places[place] == address:
            return int(self.targets[place])
        return None

    def variable(self, address: int) -> tuple[int, int] | None:
        """Return the bounds of the variable that holds an address."""
        place = int(np.searchsorted(self._object_starts, np.uint64(address), "right")) - 1
        if place < 0 or address >= self._object_ends[place]:
            return None
        return int(self._object_starts[place]), int(self._object_ends[place])

    def within(self, start: int, end: int) -> list[int]:
        """Return the functions that words from one address up to another point to."""
        low, high = np.searchsorted(self.places, np.array([start, end], np.uint64))
        found: list[int] = np.unique(self.targets[low:high]).tolist()
        return found

    def by_variable(self) -> "Iterator[tuple[int, int, list[tuple[int, int]]]]":
        """Yield start and end of each variable with function pointers, and those: place, target.

        What no variable covers is one of a word each.
        """
        at = np.searchsorted(self._object_starts, self.places, "right") - 1
        inside = at >= 0
        if len(self._object_ends):
            inside &= self.places < self._object_ends[np.maximum(at, 0)]
        keys = np.where(inside, at, -1).tolist()
        pairs = zip(self.places.tolist(), self.targets.tolist(), strict=True)
        for key, group in groupby(zip(keys, pairs, strict=True), key=itemgetter(0)):
            found = [pair for _, pair in group]
            if key >= 0:
                yield int(self._object_starts[key]), int(self._object_ends[key]), found
            else:
                yield from ((place, place + _WORD, [(place, target)]) for place, target in found)

    @staticmethod
    def _pointers(
        region: Region, functions: "NDArray[np.uint64]"
    ) -> "tuple[NDArray[np.uint64], NDArray[np.uint64]]":
        words = region.words
        likely = np.flatnonzero((words >= functions[0]) & (words <= functions[-1]))
        likely = likely[np.isin(words[likely], functions)]
        places = likely.astype(np.uint64) * np.uint64(_WORD) + np.uint64(region.address)
        return places, words[likely]


def _relative(region: Region, functions: "NDArray[np.uint64]") -> list[int]:
    distances = region.words.view("<i4").astype(np.int64)
    places = np.uint64(region.address) + np.arange(len(distances), dtype=np.uint64) * np.uint64(4)
    targets = places + distances.view(np.uint64)
    targets = targets[(targets >= functions[0]) & (targets <= functions[-1])]
    found: list[int] = np.unique(targets[np.isin(targets, functions)]).tolist()
    return found


def regions_of(binary: "Binary") -> list[Region]:
    """Return the initialised data of an object."""
    found = []
    for section in binary.elf.sections:
        if not section.is_alloc or section.type != SHT_PROGBITS or _is_code(section):
            continue
        address, data = binary.placed(section)
        if address % _WORD or len(data) < _WORD:
            continue
        words: NDArray[Any] = np.frombuffer(data[: len(data) // _WORD * _WORD], "<u8")
        found.append(Region(address, address + _WORD * len(words), words))
    return found


def variables_of(binary: "Binary") -> "tuple[NDArray[np.uint64], NDArray[np.uint64]]":
    """Return the bounds of the variables of an object, sorted; of aliases the largest."""
    table, values = binary.symbols, binary.symbol_values
    chosen = np.flatnonzero((table.kinds == STT_OBJECT) & (table.records["size"] > 0))
    chosen = chosen[table.section_indices[chosen] > 0]
    starts = values[chosen].astype(np.uint64)
    ends = starts + table.records["size"][chosen]
    order = np.lexsort((ends, starts))
    starts, ends = starts[order], ends[order]
    last = np.append(starts[1:] != starts[:-1], True)[: len(starts)]
    return starts[last], ends[last]


def _is_code(section: "Section") -> bool:
    # Linux 7.2 and later have data that are executable by their flags: `kernel.codespans`.
    return section.is_executable and not section.is_writable
