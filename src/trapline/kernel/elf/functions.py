"""Functions by address and by name, from a symbol table.

A function has aliases (`memcpy` and `__memcpy`), parts that the compiler split off and named
after it (`.cold`, `.part.0`, `.constprop.0`, `.isra.0`), and, in assembly, labels in its middle.
"""

import re
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from trapline.kernel.elf.symtab import STB_GLOBAL, STB_WEAK, STT_FUNC, STT_NOTYPE, SymbolTable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from numpy.typing import NDArray

# objtool's and the assembler's: padding before a function, local labels.
_NOT_FUNCTIONS: Final = ("__pfx_", "__cfi_", ".L")
# GCC's names for clones; the number tells clones of one function apart.
_SUFFIX: Final = re.compile(r"\.(?:cold|part|constprop|isra|localalias|lto_priv|llvm)(?:\.\d+)?")
_DEPTH: Final = 8  # functions that start inside of another one, as assembly has


class Symbol(NamedTuple):
    """A function or label: `size` is 0 where the symbol table does not say."""

    name: str
    address: int
    size: int


def source_name(symbol: str) -> str:
    """Return the name a function has in its source: without .cold, .part.0 and the like."""
    return _SUFFIX.sub("", symbol)


class FunctionTable:
    """The functions and code labels of one image; addresses are absolute."""

    def __init__(
        self, table: SymbolTable, values: "NDArray[np.uint64]", sections: "Collection[int]"
    ) -> None:
        """Take the symbols that lie in `sections` (indices); `values` are their addresses."""
        self._table = table
        kinds = table.kinds
        chosen = np.isin(table.section_indices, np.fromiter(sections, np.uint32))
        chosen &= (kinds == STT_FUNC) | (kinds == STT_NOTYPE)
        chosen &= table.records["name"] != 0
        indices = np.flatnonzero(chosen)
        self._values = values
        self._order = indices
        order = np.argsort(values[indices], kind="stable")
        self._indices: NDArray[np.intp] = indices[order]
        self._addresses: NDArray[np.uint64] = values[self._indices]
        self._sizes: NDArray[np.uint64] = table.records["size"][self._indices]
        self._kinds: NDArray[np.uint8] = kinds[self._indices]
        self._bindings: NDArray[np.uint8] = table.bindings[self._indices]
        sized = np.flatnonzero((self._kinds == STT_FUNC) & (self._sizes > 0))
        self._sized = sized
        self._sized_addresses = self._addresses[sized]

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def entries(self) -> "NDArray[np.uint64]":
        """Addresses at which functions start, shape (n,), sorted; labels are not among them."""
        entries: NDArray[np.uint64] = self._addresses[self._kinds == STT_FUNC]
        return entries

    def spans(self) -> "tuple[NDArray[np.uint64], NDArray[np.uint64]]":
        """Return the bounds of all functions, and of labels with a size (SYM_CODE_START)."""
        chosen = self._sizes > 0
        return self._addresses[chosen], self._addresses[chosen] + self._sizes[chosen]

    def at(self, address: int) -> Symbol | None:
        """Return the function that holds an address, else the last label before it.

        Of several names the global one is preferred, then the shortest.
        """
        inside = self._covering(address)
        if inside is not None:
            return self._best(inside)
        index = int(np.searchsorted(self._addresses, np.uint64(address), "right")) - 1
        while index >= 0:
            best = self._best(int(self._addresses[index]))
            if best is not None:
                return best
            index = int(np.searchsorted(self._addresses, self._addresses[index], "left")) - 1
        return None

    def names_at(self, address: int) -> list[str]:
        """Return all names of the function or label that starts at an address."""
        return [self._table.name(int(self._indices[index])) for index in self._same(address)]

    def is_global(self, address: int) -> bool:
        """Whether what starts at an address has a name that is not only its own file's."""
        return any(self._bindings[index] in {STB_GLOBAL, STB_WEAK} for index in self._same(address))

    def addresses_of(self, names: "Iterable[str]") -> dict[int, str]:
        """Return address -> name for those of `names` that are defined here.

        A static function of some name may exist more than once.
        """
        indices, found = self._table.find(names)
        places = np.searchsorted(self._order, indices)
        addresses: dict[int, str] = {}
        for place, index, name in zip(places.tolist(), indices.tolist(), found, strict=True):
            if place < len(self._order) and self._order[place] == index:
                addresses.setdefault(int(self._values[index]), name)
        return addresses

    def matching(self, pattern: re.Pattern[str]) -> dict[int, str]:
        """Return address -> name of those whose whole name matches."""
        # One by one: a list of all names, which the table would keep, takes 20 MiB.
        names = (self._table.name(index) for index in self._order.tolist())
        return self.addresses_of(sorted(set(filter(pattern.fullmatch, names))))

    def _covering(self, address: int) -> int | None:
        index = int(np.searchsorted(self._sized_addresses, np.uint64(address), "right")) - 1
        for candidate in range(index, max(index - _DEPTH, -1), -1):
            start = int(self._sized_addresses[candidate])
            if address < start + int(self._sizes[self._sized[candidate]]):
                return start
        return None

    def _same(self, address: int) -> range:
        key = np.uint64(address)
        start = int(np.searchsorted(self._addresses, key, "left"))
        return range(start, int(np.searchsorted(self._addresses, key, "right")))

    def _best(self, address: int) -> Symbol | None:
        ranked = []
        for index in self._same(address):
            name = self._table.name(int(self._indices[index]))
            if name.startswith(_NOT_FUNCTIONS):
                continue
            binding = int(self._bindings[index])
            rank = {STB_GLOBAL: 0, STB_WEAK: 1}.get(binding, 2)
            ranked.append(
                (
                    int(self._kinds[index]) != STT_FUNC,
                    rank,
                    len(name),
                    name,
                    int(self._sizes[index]),
                )
            )
        if not ranked:
            return None
        _, _, _, name, size = min(ranked)
        return Symbol(name, address, size)
