"""Which pages of guest memory were written since the last restore."""

import ctypes
import os
from typing import Final

import numpy as np

from trapline.cpu.engine import Engine

PAGE: Final = 4096
# /proc/self/pagemap: Documentation/admin-guide/mm/pagemap.rst.
_PRESENT_OR_SWAPPED: Final = np.uint64(3 << 62)
_FILE_PAGE: Final = np.uint64(1 << 61)


class DirtyPages:
    """Asks the engine, and where that cannot tell, the kernel.

    Guest memory is mapped copy-on-write once it is frozen. What the kernel says is more than
    was written since the last restore: a page once copied stays so.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._size = len(engine.ram)
        anchor = ctypes.c_char.from_buffer(engine.ram)
        self._start = ctypes.addressof(anchor)
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def pages(self) -> list[int]:
        """Return the GPAs of the pages written, and maybe of some others."""
        pages = self._engine.written_pages()
        if pages is not None:
            return pages
        data = os.pread(self._pagemap, self._size // PAGE * 8, self._start // PAGE * 8)
        entries = np.frombuffer(data, np.uint64)
        private = (entries & _PRESENT_OR_SWAPPED != 0) & (entries & _FILE_PAGE == 0)
        return (np.flatnonzero(private) * PAGE).tolist()

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._pagemap)
