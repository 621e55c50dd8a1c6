"""The ELF symbol table as arrays: one structured record per symbol, names looked up on demand.

Source: System V gABI, chapter 4, "Symbol Table".
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from trapline.base.errors import BadImageError
from trapline.base.printable import decode_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

STT_NOTYPE: Final = 0
STT_OBJECT: Final = 1
STT_FUNC: Final = 2
STT_FILE: Final = 4
STB_GLOBAL: Final = 1
STB_WEAK: Final = 2
SHN_UNDEF: Final = 0
_SHN_XINDEX: Final = 0xFFFF

#: Elf64_Sym. `value` is an address (ET_EXEC) or an offset in its section (ET_REL).
SYMBOL: Final = np.dtype(
    [
        ("name", "<u4"),
        ("info", "u1"),
        ("other", "u1"),
        ("section", "<u2"),
        ("value", "<u8"),
        ("size", "<u8"),
    ]
)
# KSYM_NAME_LEN is 512 since 6.1; names of other languages are longer.
_MAX_NAME: Final = 4096
_MAX_NAMES: Final = 256 << 20
# Below this it is quicker to look at each symbol than to search the strings for each name.
_TAIL: Final = 8  # bytes of a name that are compared at once
_FEW_SYMBOLS: Final = 20_000


def _tail(name: bytes) -> int:
    return int.from_bytes(name[-_TAIL:], "big")


class SymbolTable:
    """All symbols of one file, index 0 (the null symbol) included, so indices are ELF's own.

    `records` is an array of `SYMBOL`, shape (n,). Every name is valid once this exists.
    """

    def __init__(
        self,
        name: str,
        table: memoryview,
        strings: memoryview,
        extended: memoryview | None = None,
    ) -> None:
        if len(table) % SYMBOL.itemsize:
            raise BadImageError(f"{name}: the symbol table is cut off within a symbol.")
        self.records: NDArray[Any] = np.frombuffer(table, SYMBOL)
        self._strings = strings
        self._extended = extended
        self._file = name
        self._ends = self._name_ends()

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def kinds(self) -> "NDArray[np.uint8]":
        """STT_* of each symbol, shape (n,)."""
        return self.records["info"] & np.uint8(0xF)

    @cached_property
    def bindings(self) -> "NDArray[np.uint8]":
        """STB_* of each symbol, shape (n,)."""
        return self.records["info"] >> np.uint8(4)

    @cached_property
    def section_indices(self) -> "NDArray[np.uint32]":
        """Section index of each symbol, shape (n,), with SHN_XINDEX resolved."""
        indices = self.records["section"].astype(np.uint32)
        wide = indices == _SHN_XINDEX
        if self._extended is None or not wide.any():
            return indices
        table = np.frombuffer(self._extended, "<u4", len(self._extended) // 4)
        if len(table) < len(indices):
            raise BadImageError(f"{self._file}: the extended section index table is too short.")
        return np.where(wide, table[: len(indices)], indices)

    def name(self, index: int) -> str:
        """Return the name of one symbol, empty for those without."""
        start = int(self.records["name"][index])
        return decode_name(bytes(self._strings[start : int(self._ends[index])]))

    @cached_property
    def names(self) -> list[str]:
        """The names of all symbols, in order."""
        strings = bytes(self._strings)
        starts = self.records["name"].tolist()
        return [
            decode_name(strings[start:end])
            for start, end in zip(starts, self._ends.tolist(), strict=True)
        ]

    @cached_property
    def by_name(self) -> dict[str, list[int]]:
        """Indices of the symbols of each name; static functions often share one."""
        found: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            if name:
                found.setdefault(name, []).append(index)
        return found

    def address(self, name: str) -> int | None:
        """Return the value of the first defined symbol of that name, or None."""
        for index in self.by_name.get(name, ()):
            if self.records["section"][index] != SHN_UNDEF:
                return int(self.records["value"][index])
        return None

    def find(self, names: "Iterable[str]") -> "tuple[NDArray[np.intp], list[str]]":
        """Return the indices of the symbols that have one of the names, and their names.

        In the order of the table, and without decoding all names.
        """
        wanted = {name.encode() for name in names}
        strings = bytes(self._strings)
        look_up = self._find_by_symbol if len(self) < _FEW_SYMBOLS else self._find_by_string
        indices = look_up(wanted, strings)
        return indices, [self.name(index) for index in indices.tolist()]

    def _find_by_symbol(self, wanted: set[bytes], strings: bytes) -> "NDArray[np.intp]":
        spans = zip(self.records["name"].tolist(), self._ends.tolist(), strict=True)
        found = [i for i, (start, end) in enumerate(spans) if strings[start:end] in wanted]
        return np.array(found, np.intp)

    def _find_by_string(self, wanted: set[bytes], strings: bytes) -> "NDArray[np.intp]":
        """Compare the last bytes of all names at once, then all bytes of the few that fit."""
        tails = np.array([_tail(name) for name in wanted], np.uint64)
        starts = self.records["name"]
        found = [
            index
            for index in np.flatnonzero(np.isin(self._tails, tails)).tolist()
            if strings[int(starts[index]) : int(self._ends[index])] in wanted
        ]
        return np.array(found, np.intp)

    @cached_property
    def _tails(self) -> "NDArray[np.uint64]":
        """The last eight bytes of each name as a number, shape (n,); of a shorter one all."""
        strings = np.frombuffer(bytes(_TAIL) + bytes(self._strings), np.uint8)
        lengths = self._ends - self.records["name"].astype(np.int64)
        tails = np.zeros(len(self.records), np.uint64)
        for back in range(_TAIL):
            # The terminator is at `ends`, before `_TAIL` zeros.
            byte = strings[self._ends + _TAIL - 1 - back].astype(np.uint64)
            tails |= np.where(lengths > back, byte << np.uint64(8 * back), np.uint64(0))
        return tails

    def _name_ends(self) -> "NDArray[np.int64]":
        """Find where each name ends, and refuse tables whose names would not fit in memory."""
        if not len(self.records):
            return np.zeros(0, np.int64)
        starts = self.records["name"].astype(np.int64)
        zeros = np.flatnonzero(np.frombuffer(self._strings, np.uint8) == 0)
        if not len(zeros) or starts.max() > zeros[-1]:
            raise BadImageError(f"{self._file}: a symbol's name is outside of the string table.")
        ends: NDArray[np.int64] = zeros[np.searchsorted(zeros, starts)]
        lengths = ends - starts
        if lengths.max() > _MAX_NAME or lengths.sum() > _MAX_NAMES:
            raise BadImageError(f"{self._file}: the symbol names are longer than any kernel has.")
        return ends
