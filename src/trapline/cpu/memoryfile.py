"""Guest memory as a file without a name (memfd): holes read as zeros and cost nothing."""

import ctypes
import os
from collections.abc import Iterator
from typing import Final

_PUNCH_HOLE_KEEP_SIZE: Final = 0x02 | 0x01

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def create(size: int) -> int:
    """Return the descriptor of a new file of `size` bytes, all of it a hole."""
    descriptor = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor


def discard(descriptor: int, offset: int, size: int) -> None:
    """Make whole pages a hole, in every mapping of the file."""
    if _libc.fallocate(descriptor, _PUNCH_HOLE_KEEP_SIZE, offset, size):
        raise OSError(ctypes.get_errno(), "cannot discard guest memory")


def populated(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each range that is no hole; reading through a mapping fills one."""
    at = 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing follows
            return
        at = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, at
