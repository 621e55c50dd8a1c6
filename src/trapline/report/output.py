"""Where a finished report goes: a file that appears whole or not at all, or standard output.

A file is written beside its place and renamed over it, so that a full disk, a crash or Ctrl-C
never leaves half a report, nor destroys an older one. What is not a regular file (`/dev/full`,
a named pipe) is written to directly: there is nothing to rename over it.
"""

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from trapline.base.errors import OutputError
from trapline.base.files import is_special, real, why, written

if TYPE_CHECKING:
    from collections.abc import Iterable


class Destination:
    """One place to write one report to; `None` is standard output.

    The constructor checks what can be checked, so that a mistyped folder is reported before a
    scan and not after it. Raises OutputError.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is None:
            standard_output()
            return
        try:
            _check(path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {why(error)}.") from error

    def write(self, chunks: "Iterable[bytes]") -> None:
        """Write all chunks, or nothing. Raises OutputError.

        A reader of standard output that goes away (`| head`) has all it wants: no error.
        """
        if self._path is None:
            _to_stdout(chunks)
            return
        try:
            with written(self._path) as out:
                out.writelines(chunks)
        except OSError as error:
            raise OutputError(f"{self._path} cannot be written: {why(error)}.") from error


def _check(path: Path) -> None:
    """Raise OutputError or OSError if it is plain by now that `path` cannot be written."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give -o the name of a file.")
    folder = real(path).parent
    if not folder.is_dir():
        raise OutputError(f"there is no folder {folder} to write {path.name} to; create it.")
    if not os.access(path if is_special(path) else folder, os.W_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def standard_output() -> "BinaryIO":
    """Return standard output for bytes; OutputError where the caller has closed it."""
    if sys.stdout is None:
        raise OutputError("standard output is closed; open it, or give -o a file.")
    return sys.stdout.buffer


def _to_stdout(chunks: "Iterable[bytes]") -> None:
    out = standard_output()
    try:
        for chunk in chunks:
            out.write(chunk)
        out.flush()
    except OSError as error:
        # The interpreter flushes again when it ends; that must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return
        raise OutputError(f"standard output cannot be written: {why(error)}.") from error
