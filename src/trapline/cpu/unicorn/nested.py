"""Second-level page tables: what each half of the guest-physical space maps.

The tables are in AMD's nested-paging format, in a host mapping of their own that the guest
cannot reach. GPAs below `shared_bit` are the private half, the others the shared half; both
map the same RAM, or the shared half memory of its own. A 2 MiB range whose pages are all alike
is one leaf; it is split into 4 KiB leaves when a page of it changes, so that guests of
gigabytes start at once.
"""

import ctypes
import mmap

import numpy as np
import numpy.typing as npt

from trapline.cpu.engine import PageState

_PAGE = 4096
_LARGE = 2 << 20
_ENTRIES = 512
_TABLE = 0x67  # present, writable, user, accessed, dirty: the core never has to write
_LEAF = 0x67
_LARGE_LEAF = 0xE7

_Words = npt.NDArray[np.uint64]


class NestedTables:
    """The tables of one engine.

    `base` is the physical address the core sees them at; `ram_size` is a multiple of 4 KiB.
    `shared_offset` is where the core sees the memory of the shared half, from GPA 0 on; a
    multiple of 2 MiB.
    """

    def __init__(self, base: int, ram_size: int, shared_bit: int, shared_offset: int = 0) -> None:
        self._base = base
        self._offsets = (0, shared_offset)
        self._shared_bit = shared_bit
        self._ram_pages = ram_size // _PAGE
        directories = -(-ram_size // (1 << 30))
        large = -(-ram_size // _LARGE)
        # PML4, a PDPT for each half, the directories of both, and one leaf table for each
        # 2 MiB of each half at most. Pages that are never touched cost nothing.
        pages = 3 + 2 * directories + 2 * large
        self.size = pages * _PAGE
        self._map = mmap.mmap(-1, self.size)
        self._anchor = (ctypes.c_char * self.size).from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)
        self._words: _Words = np.frombuffer(self._map, dtype=np.uint64)
        self._next = 3 + 2 * directories
        self._directories = directories
        self.version = 0  # a new number with every change of a mapping
        self._versions = 0
        words = self._words
        words[0] = self._pointer(1)
        words[shared_bit >> 39] = self._pointer(2)
        for half in (0, 1):
            for index in range(directories):
                words[(1 + half) * _ENTRIES + index] = self._pointer(self._directory(half, index))
        self.set_private(0, ram_size, PageState.MAPPED)

    @property
    def root(self) -> int:
        """Physical address of the top table, for nested CR3."""
        return self._base

    @property
    def private_directory(self) -> int:
        """Host address of the private half's entry for GPA 0; one u64 for each 2 MiB."""
        return self.address + self._large_slot(0, 0) * 8

    @property
    def shared_directory(self) -> int:
        """The same for the shared half."""
        return self.address + self._large_slot(1, 0) * 8

    def set_private(self, gpa: int, size: int, state: PageState) -> None:
        """Set the state of whole pages of the private half; addresses below RAM's end."""
        self._set(0, gpa, size, state)

    def set_shared(self, gpa: int, size: int, state: PageState) -> None:
        """Set the state of whole pages of the shared half; `gpa` with or without its bit."""
        self._set(1, gpa & ~self._shared_bit, size, state)

    def is_mapped(self, gpa: int) -> bool:
        """Say whether an access to this GPA (with its shared bit) reaches RAM."""
        half = 1 if gpa & self._shared_bit else 0
        page = (gpa & ~self._shared_bit) // _PAGE
        if gpa >= self._shared_bit * 2 or page >= self._ram_pages:
            return False
        entry = int(self._words[self._large_slot(half, page // _ENTRIES)])
        if not entry & 1 or entry & 0x80:
            return bool(entry & 1)
        return bool(int(self._words[self._leaf_table(entry) + page % _ENTRIES]) & 1)

    def save(self) -> tuple[int, int, bytes]:
        """Return all state, for `load`."""
        return self.version, self._next, self._map[: self._next * _PAGE]

    def load(self, saved: tuple[int, int, bytes]) -> bool:
        """Bring back a saved state; False if nothing had changed since."""
        version, following, tables = saved
        if version == self.version:
            return False
        self._words[following * _ENTRIES : self._next * _ENTRIES] = 0
        self._map[: len(tables)] = tables
        self.version, self._next = version, following
        return True

    def close(self) -> None:
        """Unmap; the core must be gone."""
        del self._words
        del self._anchor
        self._map.close()

    def _set(self, half: int, gpa: int, size: int, state: PageState) -> None:
        first, last = gpa // _PAGE, -(-(gpa + size) // _PAGE)
        if gpa % _PAGE or size % _PAGE or first < 0 or last > self._ram_pages:
            raise ValueError(f"{size:#x} bytes at GPA {gpa:#x} are not whole pages of RAM")
        self._versions += 1
        self.version = self._versions
        mapped = state is PageState.MAPPED
        while first < last:
            block = first // _ENTRIES
            end = min(last, (block + 1) * _ENTRIES)
            if end - first == _ENTRIES:
                blocks = (last - first) // _ENTRIES
                self._set_large(half, block, blocks, mapped)
                end = first + blocks * _ENTRIES
            else:
                self._set_small(half, block, first, end, mapped)
            first = end

    def _set_large(self, half: int, block: int, count: int, mapped: bool) -> None:
        """Make whole 2 MiB ranges uniform. Leaf tables stay with their range, for reuse."""
        start = self._large_slot(half, block)  # the directories of a half are adjacent
        entries = self._words[start : start + count]
        split = (entries & 0x81) == 1
        for index in np.flatnonzero(split):
            number = block + int(index)
            at = self._leaf_table(int(entries[index]))
            self._fill(half, at, number * _ENTRIES, _ENTRIES, mapped)
        if mapped:
            first = block + self._offsets[half] // _LARGE
            large = np.arange(first, first + count, dtype=np.uint64) * np.uint64(_LARGE)
            entries[~split] = large[~split] | np.uint64(_LARGE_LEAF)
        else:
            entries[~split] = 0

    def _set_small(self, half: int, block: int, first: int, end: int, mapped: bool) -> None:
        slot = self._large_slot(half, block)
        entry = int(self._words[slot])
        if entry & 0x81 != 1:
            table = self._next
            self._next += 1
            pages = min(_ENTRIES, self._ram_pages - block * _ENTRIES)
            self._fill(half, table * _ENTRIES, block * _ENTRIES, pages, bool(entry & 1))
            self._words[slot] = self._pointer(table)
            entry = int(self._words[slot])
        self._fill(half, self._leaf_table(entry) + first % _ENTRIES, first, end - first, mapped)

    def _fill(self, half: int, at: int, page: int, count: int, mapped: bool) -> None:
        if mapped:
            page += self._offsets[half] // _PAGE
            pages = np.arange(page, page + count, dtype=np.uint64)
            self._words[at : at + count] = pages * np.uint64(_PAGE) | np.uint64(_LEAF)
        else:
            self._words[at : at + count] = 0

    def _directory(self, half: int, index: int) -> int:
        return 3 + half * self._directories + index

    def _large_slot(self, half: int, block: int) -> int:
        return self._directory(half, 0) * _ENTRIES + block

    def _leaf_table(self, entry: int) -> int:
        return ((entry & ~0xFFF) - self._base) // 8

    def _pointer(self, table: int) -> int:
        return self._base + table * _PAGE | _TABLE
