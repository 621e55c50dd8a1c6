"""Guest RAM: a memfd that can be frozen and restored."""

import ctypes
import mmap
import os
from typing import Final

import numpy as np
import numpy.typing as npt

_PAGE: Final = 4096
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
