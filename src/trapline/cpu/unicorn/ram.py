"""Guest RAM: a memfd that can be frozen and restored, or two of them.

In a real TD a shared page is another physical page than the private one of the same GPA. That
matters once real devices do DMA: `shared` is then a memory of its own, the only one that a
device's process is given.
"""

import ctypes
import mmap
import os
from hashlib import blake2b
from typing import Final

import numpy as np
import numpy.typing as npt

from trapline.cpu import memoryfile

_PAGE: Final = 4096
_LARGE: Final = 2 << 20
_ZEROS: Final = memoryview(bytes(1 << 20))
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
    """Guest RAM in a memfd, mapped once; `view` is all of it, `words` is `whole` as u64.

    Until the first `freeze` writes go to the memfd. From then on the memfd is the frozen
    content and pages are copied when they are written.

    With `split`, the shared half has memory of its own: `shared`, `shared_offset` bytes behind
    the private half's in `whole` and for the core. It cannot be frozen. Without, `shared` is
    `view` and the offset 0.
    """

    def __init__(self, size: int, *, split: bool = False) -> None:
        self.size = size
        self.generation = 0  # how often it was frozen
        self.shared_offset = -(-size // _LARGE) * _LARGE if split else 0
        self.span = self.shared_offset + size  # of `whole`
        self._fd = memoryfile.create(size)
        self._shared_fd = memoryfile.create(size) if split else self._fd
        if split:
            self._map = mmap.mmap(-1, self.span)
        else:
            self._map = mmap.mmap(self._fd, size, mmap.MAP_SHARED)
        self._anchor = (ctypes.c_char * self.span).from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)
        if split:
            _map_file(self.address, size, self._fd, mmap.MAP_SHARED)
            _map_file(self.address + self.shared_offset, size, self._shared_fd, mmap.MAP_SHARED)
        self.whole = memoryview(self._map)
        self.view = self.whole[:size]
        self.shared = self.whole[self.shared_offset :]
        self.words = self.whole.cast("Q")
        self._frozen: mmap.mmap | None = None
        self._frozen_anchor: ctypes.Array[ctypes.c_char] | None = None

    @property
    def shared_fd(self) -> int:
        """The memfd of the shared half, for a process that shares it; not once frozen."""
        if self.generation:
            raise ValueError("RAM that was frozen is private to this process")
        return self._shared_fd

    def digest(self) -> str:
        """BLAKE2b-128 of the private half, in hexadecimal.

        Pages that nobody has touched are zeros, and stay untouched: reading them through the
        mapping would give each a page of the host's memory.
        """
        found = blake2b(digest_size=16)
        if self.generation:
            found.update(self.view)
            return found.hexdigest()
        at = 0
        for start, end in (*memoryfile.populated(self._fd, self.size), (self.size, self.size)):
            while at < start:
                length = min(start - at, len(_ZEROS))
                found.update(_ZEROS[:length])
                at += length
            found.update(self.view[start:end])
            at = end
        return found.hexdigest()

    def discard_shared(self, offset: int, size: int) -> None:
        """Give pages of the shared half back: they read as zeros when they come again."""
        memoryfile.discard(self._shared_fd, offset, size)

    def freeze(self) -> None:
        """Make the present content the one that `restore` returns to."""
        if self.shared_offset:
            raise ValueError("RAM with a shared half of its own cannot be frozen")
        if self._frozen is None:
            self._frozen = mmap.mmap(self._fd, self.size, mmap.MAP_SHARED)
            self._frozen_anchor = (ctypes.c_char * self.size).from_buffer(self._frozen)
        else:
            self._write_back()
        _map_file(self.address, self.size, self._fd, mmap.MAP_PRIVATE)
        self.generation += 1

    def restore(self) -> None:
        """Return to the frozen content: drop the copies of the pages written since."""
        _drop_pages(self.address, self.size)

    @property
    def frozen_address(self) -> int:
        """Host address of the frozen content, a mapping that nothing writes to."""
        assert self._frozen_anchor is not None
        return ctypes.addressof(self._frozen_anchor)

    def differs_from_frozen(self, host: int, size: int) -> bool:
        """Say whether bytes at a host address inside RAM were changed since `freeze`."""
        assert self._frozen is not None
        at = host - self.address
        return self.view[at : at + size] != self._frozen[at : at + size]

    def copied_pages(self) -> list[int]:
        """Offsets of the pages that are this process's own copies; before a freeze, all."""
        if not self.generation:
            return list(range(0, self.span, _PAGE))
        entries = _page_map(self.address, self.size)
        private = (entries & _PRESENT_OR_SWAPPED != 0) & (entries & _FILE_PAGE == 0)
        offsets: list[int] = (np.flatnonzero(private) * _PAGE).tolist()
        return offsets

    def _write_back(self) -> None:
        """Copy pages written since the last freeze into the memfd."""
        assert self._frozen is not None
        for at in self.copied_pages():
            self._frozen[at : at + _PAGE] = self.view[at : at + _PAGE]

    def close(self) -> None:
        """Unmap and free."""
        for view in (self.words, self.view, self.shared, self.whole):
            view.release()
        del self._anchor
        self._map.close()
        if self._frozen is not None:
            self._frozen_anchor = None
            self._frozen.close()
        for fd in {self._fd, self._shared_fd}:
            os.close(fd)


def _map_file(address: int, size: int, fd: int, flags: int) -> None:
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if _libc.mmap(address, size, protection, flags | _MAP_FIXED, fd, 0) != address:
        raise OSError(ctypes.get_errno(), "cannot map guest RAM")


def _drop_pages(address: int, size: int) -> None:
    if _libc.madvise(address, size, _MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "cannot restore guest RAM")


def _page_map(address: int, size: int) -> npt.NDArray[np.uint64]:
    """Read what /proc/self/pagemap says of each page."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:  # noqa: PTH123 - unbuffered
        data = os.pread(pagemap.fileno(), size // _PAGE * 8, address // _PAGE * 8)
    return np.frombuffer(data, dtype=np.uint64)
