"""Guest RAM, and walks of the guest's page tables without side effects."""

import ctypes
import mmap
import os
from typing import Final

import numpy as np
import numpy.typing as npt

from trapline.td.unicorn.layout import Env, HFlags
from trapline.td.unicorn.nested import NestedTables
from trapline.td.unicorn.state import CR0_PG, CR4_PAE, CR4_PSE, CpuState

_PAGE: Final = 4096
_ADDRESS = 0xFFFFFFFFFF000  # bits 51:12 of a page table entry

# /proc/self/pagemap: Documentation/admin-guide/mm/pagemap.rst.
_PRESENT_OR_SWAPPED: Final = 3 << 62
_FILE_PAGE: Final = 1 << 61
_MAP_FIXED: Final = 0x10
_MADV_DONTNEED: Final = 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Ram:
    """Guest RAM in a memfd, mapped once; `view` is all of it, `words` the same as u64.

    Until the first `freeze` writes go to the memfd. From then on the memfd is the frozen
    content and pages are copied when they are written.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.generation = 0  # how often it was frozen
        self._fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size)
        self._map = mmap.mmap(self._fd, size, mmap.MAP_SHARED)
        self._anchor = (ctypes.c_char * size).from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)
        self.view = memoryview(self._map)
        self.words = self.view.cast("Q")
        self._frozen: mmap.mmap | None = None

    @property
    def fd(self) -> int:
        """The memfd, for a process that shares the RAM; not once frozen."""
        if self.generation:
            raise ValueError("RAM that was frozen is private to this process")
        return self._fd

    def freeze(self) -> None:
        """Make the present content the one that `restore` returns to."""
        if self._frozen is None:
            self._frozen = mmap.mmap(self._fd, self.size, mmap.MAP_SHARED)
        else:
            self._write_back()
        _map_privately(self.address, self.size, self._fd)
        self.generation += 1

    def restore(self) -> None:
        """Return to the frozen content: drop the copies of the pages written since."""
        _drop_pages(self.address, self.size)

    def differs_from_frozen(self, host: int, size: int) -> bool:
        """Say whether bytes at a host address inside RAM were changed since `freeze`."""
        assert self._frozen is not None
        at = host - self.address
        return self.view[at : at + size] != self._frozen[at : at + size]

    def _write_back(self) -> None:
        """Copy pages written since the last freeze into the memfd."""
        assert self._frozen is not None
        entries = _page_map(self.address, self.size)
        private = (entries & _PRESENT_OR_SWAPPED != 0) & (entries & _FILE_PAGE == 0)
        for page in np.flatnonzero(private):
            at = int(page) * _PAGE
            self._frozen[at : at + _PAGE] = self.view[at : at + _PAGE]

    def close(self) -> None:
        """Unmap and free."""
        self.words.release()
        self.view.release()
        del self._anchor
        self._map.close()
        if self._frozen is not None:
            self._frozen.close()
        os.close(self._fd)


class GuestMemory(CpuState):
    """Linear addresses of the guest."""

    shared_bit: int
    _ram: Ram
    _nested: NestedTables

    def translate(self, gla: int) -> int | None:
        """Return the GPA behind a linear address, or None if no page table maps it.

        The shared bit is kept. Permissions are not looked at, accessed and dirty bits not
        set.
        """
        if not self.cr(0) & CR0_PG:
            return gla & 0xFFFFFFFF
        if self._env32[Env.HFLAGS // 4] & HFlags.LMA:
            return self._walk(gla, (39, 30, 21, 12), self.cr(3) & _ADDRESS)
        if self.cr(4) & CR4_PAE:
            return self._walk(gla & 0xFFFFFFFF, (30, 21, 12), self.cr(3) & 0xFFFFFFE0)
        return self._walk_legacy(gla & 0xFFFFFFFF)

    def read(self, gla: int, size: int) -> bytes | None:
        """Read linear memory; None if any of it is not mapped to RAM."""
        parts = []
        while size > 0:
            chunk = min(size, _PAGE - gla % _PAGE)
            at = self._ram_offset(gla)
            if at is None or at + chunk > self._ram.size:
                return None
            parts.append(bytes(self._ram.view[at : at + chunk]))
            gla, size = gla + chunk, size - chunk
        return b"".join(parts)

    def write(self, gla: int, data: bytes) -> bool:
        """Write linear memory, code included; False (and nothing written) if not mapped."""
        places: list[tuple[int, bytes]] = []
        while data:
            chunk = min(len(data), _PAGE - gla % _PAGE)
            at = self._ram_offset(gla)
            if at is None or at + chunk > self._ram.size:
                return False
            places.append((at, data[:chunk]))
            gla, data = gla + chunk, data[chunk:]
        for at, part in places:
            self._ram.view[at : at + len(part)] = part
            self.code_changed(at, len(part))
        return True

    def code_changed(self, gpa: int, size: int) -> None:
        """Drop what was translated from RAM that the host wrote; no shared bit in `gpa`."""
        self._library.tb_invalidate_phys_range(self._fields.uc, gpa, gpa + size)

    def _ram_offset(self, gla: int) -> int | None:
        gpa = self.translate(gla)
        return None if gpa is None else gpa & ~self.shared_bit

    def _entry(self, gpa: int) -> int:
        """One page table entry; 0 (not present) where no RAM is."""
        at = (gpa & ~self.shared_bit) >> 3
        return self._ram.words[at] if at < self._ram.size >> 3 else 0

    def _walk(self, gla: int, shifts: tuple[int, ...], table: int) -> int | None:
        if shifts[0] == 39 and gla >> 47 not in {0, 0x1FFFF}:
            return None
        for shift in shifts:
            index = gla >> shift & (0x1FF if shift != 30 or len(shifts) == 4 else 3)
            entry = self._entry(table + index * 8)
            if not entry & 1:
                return None
            if shift == 12 or (entry & 0x80 and shift < 39):
                mask = (1 << shift) - 1
                return entry & _ADDRESS & ~mask | gla & mask
            table = entry & _ADDRESS
        return None

    def _walk_legacy(self, gla: int) -> int | None:
        def entry(gpa: int) -> int:
            return self._entry(gpa & ~7) >> (gpa & 4) * 8 & 0xFFFFFFFF

        directory = entry((self.cr(3) & 0xFFFFF000) + (gla >> 22) * 4)
        if not directory & 1:
            return None
        if directory & 0x80 and self.cr(4) & CR4_PSE:
            return directory & 0xFFC00000 | (directory & 0x1FE000) << 19 | gla & 0x3FFFFF
        table = entry((directory & 0xFFFFF000) + (gla >> 12 & 0x3FF) * 4)
        return table & 0xFFFFF000 | gla & 0xFFF if table & 1 else None


def _map_privately(address: int, size: int, fd: int) -> None:
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | _MAP_FIXED
    if _libc.mmap(address, size, protection, flags, fd, 0) != address:
        raise OSError(ctypes.get_errno(), "cannot map guest RAM copy-on-write")


def _drop_pages(address: int, size: int) -> None:
    if _libc.madvise(address, size, _MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "cannot restore guest RAM")


def _page_map(address: int, size: int) -> npt.NDArray[np.uint64]:
    """Read what /proc/self/pagemap says of each page."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:  # noqa: PTH123 - unbuffered
        data = os.pread(pagemap.fileno(), size // _PAGE * 8, address // _PAGE * 8)
    return np.frombuffer(data, dtype=np.uint64)
