"""SQLite files of unknown origin.

A file is believed only after its schema was compared, as text, with the one that is expected:
nothing but our own tables, so that no view, trigger or function of somebody else's runs. Rows are
bounded, one by one and in all. Ctrl-C is heard while SQLite works. Who writes holds a lock for as
long as it has the file open; the system lets go of it when the process dies.

Source: "Defense Against The Dark Arts", https://www.sqlite.org/security.html.
"""

import fcntl
import math
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

from trapline.base.errors import BadInputFileError, OutputError
from trapline.base.files import open_regular, why
from trapline.base.printable import decode_name, printable

_MAX_VALUE: Final = 64 << 20  # bytes of one value; the largest window has some ten MiB
_TICK: Final = 50_000  # SQLite's instructions between two looks for Ctrl-C
_SLACK: Final = 1 << 20  # bytes
_BESIDE: Final = ("-wal", "-shm", "-journal")
_SCHEMA: Final = "SELECT type AS t, name AS n, sql AS s FROM sqlite_schema ORDER BY name LIMIT ?"
_DAMAGED: Final = frozenset(
    {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_ERROR}
)

Row = tuple[Any, ...]


class Database:
    """An open file with a known schema, or a database in memory. Use as a context manager.

    All methods raise BadInputFileError for a file that is damaged, OutputError where it cannot
    be written.
    """

    def __init__(
        self, connection: sqlite3.Connection, path: Path | None, what: str, lock: int | None = None
    ) -> None:
        self._db = connection
        self._path = path
        self._name = "memory" if path is None else str(path)
        self._what = what
        self._lock = lock
        #: Whether there was nothing in it.
        self.is_new = False

    @classmethod
    def open(cls, path: Path | None, schema: str, what: str) -> Self:
        """Open for writing, or create with `schema`; None keeps it in memory.

        `what` is what messages call such a file ("a campaign store"). A second process that
        opens it is refused.
        """
        if path is None:
            database = cls(sqlite3.connect(":memory:", isolation_level=None), None, what)
        else:
            lock = _locked(path)
            try:
                database = cls(_connect(path, "rw"), path, what, lock)
            except BaseException:
                os.close(lock)
                raise
        try:
            database._prepare(schema)
        except BaseException:
            database.close()
            raise
        return database

    @classmethod
    def read_only(cls, path: Path, schema: str, what: str) -> Self:
        """Open for reading; somebody may be writing to it."""
        descriptor, _ = open_regular(path, BadInputFileError)
        os.close(descriptor)
        _check_beside(path)
        # Without a log nobody writes, and SQLite need not put files beside it.
        mode = "ro" if path.with_name(f"{path.name}-wal").exists() else "ro&immutable=1"
        database = cls(_connect(path, mode), path, what)
        try:
            database._distrust()
            with database._guard():
                database._compare(schema)
        except BaseException:
            database.close()
            raise
        return database

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and let others write to it."""
        self._db.close()
        # Only now: closing any descriptor of a file drops SQLite's own locks on it.
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def rows(self, query: str, parameters: Iterable[object] = ()) -> Iterator[Row]:
        """Yield the rows of a query on tables of the schema."""
        with self._guard():
            # Pages of a hostile file may be shared by many rows: it could say more than it holds.
            left = self._size()
            for row in self._db.execute(query, tuple(parameters)):
                left -= sum(len(value) for value in row if isinstance(value, bytes | str))
                if left < 0:
                    raise self.damaged("it says more than it holds")
                yield row

    def write(self, statement: str, rows: Iterable[Row]) -> None:
        """Run a statement for each of some rows."""
        with self._guard():
            self._db.executemany(statement, rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write all that is written in a `with` block, or nothing."""
        with self._guard():
            self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            with self._guard():
                self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                with suppress(sqlite3.Error):  # it is the first error that counts
                    self._db.execute("ROLLBACK")
            raise

    def damaged(self, why_so: str) -> BadInputFileError:
        """Return the error for contents that make no sense."""
        return BadInputFileError(f"{self._name}: is not {self._what}, or it is damaged ({why_so}).")

    def _prepare(self, schema: str) -> None:
        self._distrust()
        with self._guard():
            self.is_new = next(self._db.execute(_SCHEMA, (1,)), None) is None
            if not self.is_new:
                # Before anything of it is read or written.
                self._compare(schema)
            if self._path is not None:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
        if self.is_new:
            with self.transaction(), self._guard():
                for statement in schema.split(";"):
                    self._db.execute(statement)
        else:
            with self._guard():
                (said,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if said != "ok":
                raise self.damaged(printable(str(said)))

    def _distrust(self) -> None:
        with self._guard():
            self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE)
            self._db.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
            self._db.execute("PRAGMA trusted_schema=OFF")
            self._db.execute("PRAGMA cell_size_check=ON")
            self._db.execute("PRAGMA mmap_size=0")
            self._db.execute("PRAGMA temp_store=MEMORY")  # nothing beside what was named
        self._db.text_factory = decode_name
        self._db.set_progress_handler(_tick, _TICK)

    def _compare(self, schema: str) -> None:
        with closing(sqlite3.connect(":memory:")) as model:
            model.executescript(schema)
            wanted = model.execute(_SCHEMA, (100,)).fetchall()
        found = self._db.execute(_SCHEMA, (len(wanted) + 1,)).fetchall()
        if [(kind, name, _text(sql)) for kind, name, sql in found] != [
            (kind, name, decode_name(sql.encode())) for kind, name, sql in wanted
        ]:
            raise BadInputFileError(
                f"{self._name}: is not {self._what} of this version of trapline, its tables are "
                "others; name another file."
            )

    def _size(self) -> float:
        """Give a bound of what one query can say."""
        if self._path is None:
            return math.inf  # it is our own
        beside = self._path.with_name(f"{self._path.name}-wal")
        return 2 * (_size(self._path) + _size(beside)) + _SLACK

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            if code == sqlite3.SQLITE_INTERRUPT:
                # Nobody but a signal ends `_tick`; sqlite3 has swallowed what it raised.
                raise KeyboardInterrupt from None
            raise self._error(code, printable(str(error))) from error
        except (UnicodeDecodeError, MemoryError, OverflowError) as error:
            raise self.damaged(type(error).__name__) from None

    def _error(self, code: int, text: str) -> BadInputFileError | OutputError:
        if code == sqlite3.SQLITE_FULL:
            return OutputError(f"{self._name}: the disk is full; free some room and use --resume.")
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            return OutputError(f"{self._name}: another program is writing to it.")
        if code in _DAMAGED:
            return self.damaged(text)
        return OutputError(f"{self._name}: {text}.")


def _tick() -> int:
    """Let Python handle signals while SQLite works."""
    return 0


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    try:
        return sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=0
        )
    except sqlite3.Error as error:
        raise OutputError(f"{path}: cannot be opened: {printable(str(error))}.") from error


def _locked(path: Path) -> int:
    """Open or create a file and lock it against other writers; returns its descriptor."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        descriptor = os.open(path, flags, 0o666)
    except (OSError, ValueError) as error:
        reason = why(error) if isinstance(error, OSError) else "the name is not valid"
        raise OutputError(f"{path}: cannot be written: {reason}.") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadInputFileError(f"{path}: is not a regular file.")  # noqa: TRY301 - closes it
        _check_beside(path)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(
            f"{path}: another command is writing to it; wait for its end, or name another file."
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_beside(path: Path) -> None:
    """Refuse what SQLite would open beside the file, and wait for."""
    for end in _BESIDE:
        beside = path.with_name(path.name + end)
        if beside.exists() and not beside.is_file():
            raise BadInputFileError(f"{beside}: is not a regular file.")


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
