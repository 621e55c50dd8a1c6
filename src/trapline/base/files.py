"""Files of unknown origin: what is read, whole and bounded, and what is written, whole or not.

All that comes from outside and is read in one piece comes through `read`; what is too large for
that is mapped (`trapline.base.mapping`). A FIFO is never waited for, a device never read without
end. `trapline.base.decode` makes something of the bytes.
"""

import errno
import io
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import IO, Final

from trapline.base.errors import BadInputFileError, TraplineError
from trapline.base.scarcity import scarce

_CHUNK: Final = 1 << 20
_MAX_NAME: Final = 200  # bytes of a name that leave room for what is added to it


def open_regular(
    path: Path, error: type[TraplineError], name: str | None = None
) -> tuple[int, os.stat_result]:
    """Open a regular file for reading; returns a descriptor, to be closed, and its state.

    Raises `error` where there is none, or it may not be read, or is something else.
    """
    name = name or str(path)
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer. O_NOCTTY: nor a terminal be taken.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        descriptor = os.open(path, flags)
    except ValueError:
        raise error(f"{name}: cannot be read: the name is not valid.") from None
    except OSError as problem:
        raise scarce(problem) or error(f"{name}: cannot be read: {why(problem)}.") from None
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode):
        os.close(descriptor)
        raise error(f"{name}: is not a regular file.")
    return descriptor, state


def read(
    path: Path,
    *,
    limit: int,
    what: str,
    error: type[TraplineError] = BadInputFileError,
) -> bytes:
    """Read a regular file of at most `limit` bytes.

    `what` says what it should be, for the message about one that is larger ("a scenario").
    Raises `error`.
    """
    descriptor, state = open_regular(path, error)
    try:
        # Files of /sys and /proc do not say their size: only what comes counts.
        if state.st_size <= limit:
            data = _read_all(descriptor, limit + 1)
            if len(data) <= limit:
                return data
    except OSError as problem:
        raise error(f"{path}: cannot be read: {why(problem)}.") from None
    finally:
        os.close(descriptor)
    raise error(f"{path}: is larger than {_size(limit)}, too large for {what}.")


def _read_all(descriptor: int, most: int) -> bytes:
    parts = []
    while most and (part := os.read(descriptor, min(most, _CHUNK))):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


def read_start(path: Path, size: int, *, error: type[TraplineError] = BadInputFileError) -> bytes:
    """Read the first `size` bytes of a regular file, to see what it is. Raises `error`."""
    descriptor, _ = open_regular(path, error)
    try:
        return _read_all(descriptor, size)
    except OSError as problem:
        raise error(f"{path}: cannot be read: {why(problem)}.") from None
    finally:
        os.close(descriptor)


def shipped(package: str, name: str) -> bytes:
    """Read a file that comes with a package of trapline's own; `name` may have slashes."""
    return resources.files(package).joinpath(*name.split("/")).read_bytes()


def is_special(path: Path) -> bool:
    """Whether something is there to write to that is no regular file: a pipe, a device."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def real(path: Path) -> Path:
    """Follow symbolic links, so that a link keeps pointing at the file it points at.

    Raises OSError for links in circles.
    """
    try:
        target = path.resolve()
    except RuntimeError as error:  # what Python before 3.13 makes of ELOOP
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error
    if target.is_symlink():  # what 3.13 makes of it
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """Open what the user named for output: a file as by `written_beside`, a pipe or device as is.

    Raises OSError.
    """
    if not is_special(path):
        with written_beside(real(path)) as out:
            yield out
        return
    with path.open("wb", buffering=0) as raw:
        out = io.BufferedWriter(raw)
        yield out
        # Only here: after Ctrl-C, nobody waits for a pipe that nobody reads.
        out.flush()


@contextmanager
def written_beside(target: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its place only at the end of the `with` block, and then whole.

    It is written beside its place, forced to the disk, and renamed; on any error, Ctrl-C
    included, what was there before stays. Raises OSError.
    """
    name = os.fsdecode(os.fsencode(target.name)[:_MAX_NAME])
    beside = target.with_name(f".{name}.{secrets.token_hex(4)}")
    # O_EXCL: never write through a name that someone else put there first.
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as out:
            yield out
            out.flush()
            if target.exists():
                os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
            os.fsync(descriptor)
        beside.replace(target)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def write_whole(target: Path, chunks: Iterable[bytes]) -> None:
    """Write a file whole or not at all, as `written_beside`. Raises OSError."""
    with written_beside(target) as out:
        out.writelines(chunks)


def why(error: OSError) -> str:
    """Say what an OSError means, in the middle of a sentence."""
    return (error.strerror or str(error)).lower()


def _size(limit: int) -> str:
    return f"{limit >> 20:,} MiB" if limit >= 1 << 20 else f"{limit >> 10:,} KiB"
