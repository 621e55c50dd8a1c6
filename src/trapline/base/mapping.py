"""Read-only mapping of files into memory, with one-sentence errors."""

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from trapline.base.errors import KernelNotFoundError
from trapline.base.files import open_regular, why
from trapline.base.scarcity import scarce

_DROP_INTERVAL: Final = 0.1  # seconds


def map_file(path: Path, name: str | None = None) -> tuple[mmap.mmap | None, memoryview]:
    """Map a regular file; an empty one gives (None, empty view).

    Raises KernelNotFoundError where it does not exist or cannot be read.
    """
    name = name or str(path)
    descriptor, state = open_regular(path, KernelNotFoundError, name)
    try:
        if state.st_size == 0:
            return None, memoryview(b"")
        mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        message = f"{name}: cannot be read: {why(error)}."
        raise scarce(error) or KernelNotFoundError(message) from None
    finally:
        os.close(descriptor)
    return mapping, memoryview(mapping)


def unmap(data: memoryview, mapping: mmap.mmap | None) -> None:
    """Let go of a mapping; while someone holds a view of it, it stays until the view dies."""
    if mapping is None:
        return
    try:
        data.release()
        mapping.close()
    except BufferError:
        return


@contextmanager
def mapped(path: Path, name: str | None = None) -> Iterator[memoryview]:
    """Map a file for the length of a `with` block; raises as `map_file` does."""
    mapping, data = map_file(path, name)
    try:
        yield data
    finally:
        unmap(data, mapping)


@contextmanager
def dropping_pages(mapping: mmap.mmap) -> Iterator[None]:
    """Give the pages of a mapped file back to the system, again and again, for a `with` block.

    For native code that reads a file of hundreds of megabytes once: what it has read would stay
    resident. What it looks at again comes from the page cache.
    """
    done = threading.Event()

    def drop() -> None:
        while not done.wait(_DROP_INTERVAL):
            mapping.madvise(mmap.MADV_DONTNEED)

    thread = threading.Thread(target=drop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        mapping.madvise(mmap.MADV_DONTNEED)
