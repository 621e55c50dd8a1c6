"""The campaign store: one SQLite file, so that a killed campaign resumes and repeats nothing.

A store belongs to one kernel, one module version and one set of options, kept in `campaign` and
checked on opening. `window` holds one row per scenario with its boundaries, `run` one row per
finished run under the key (scenario, event, boundary, nested, nested_at), `task` what is
finished, though it may have led to no run. Rows are written by the campaign's parent process
alone, in transactions, in WAL mode: a kill -9 loses at most the runs of the last transaction,
which `--resume` does again.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, Self, TypeVar

import msgspec

from trapline.base import encode
from trapline.base.errors import BadInputFileError, OutputError
from trapline.results.explore import Result, Window

_FORMAT: Final = 2
_SCHEMA: Final = """
CREATE TABLE campaign (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE task (
    scenario TEXT NOT NULL,
    inject INTEGER NOT NULL,
    boundary INTEGER NOT NULL,
    PRIMARY KEY (scenario, inject, boundary)
) WITHOUT ROWID;
CREATE TABLE window (scenario TEXT PRIMARY KEY, document BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE run (
    scenario TEXT NOT NULL,
    event TEXT NOT NULL,
    boundary INTEGER NOT NULL,
    nested TEXT NOT NULL,
    nested_at INTEGER NOT NULL,
    verdict TEXT NOT NULL,
    document BLOB NOT NULL,
    PRIMARY KEY (scenario, event, boundary, nested, nested_at)
) WITHOUT ROWID;
"""

_T = TypeVar("_T")
Key = tuple[str, str, int, str, int]
Row = tuple[str, str, int, str, int, str, bytes]
# The scenario, the number of one of its [[inject]]s, the boundary.
TaskKey = tuple[str, int, int]


def key_of(result: Result) -> Key:
    """Give the key of a run: scenario, event, boundary, nested event, its distance."""
    return (
        result.scenario,
        result.event,
        result.boundary,
        result.nested or "",
        -1 if result.nested_at is None else result.nested_at,
    )


def row_of(result: Result) -> Row:
    """Make a result ready for the store; workers do it, as the parent has many of them."""
    return (*key_of(result), result.verdict, encode.json(result))


class Store:
    """An open campaign store. Use as a context manager."""

    def __init__(self, connection: sqlite3.Connection, path: str) -> None:
        self._db = connection
        self._path = path

    @classmethod
    def open(cls, path: Path | None, identity: dict[str, str], *, resume: bool) -> Self:
        """Open or create a store; None keeps it in memory.

        `identity` names what the results depend on. Raises BadInputFileError when the file is
        no store, belongs to another campaign, or exists although `resume` is false.
        """
        name = str(path) if path else ":memory:"
        if path and path.is_dir():
            raise BadInputFileError(f"{path}: is a folder; name a file for the campaign.")
        if path and path.exists() and not path.is_file():
            raise BadInputFileError(f"{path}: is not a regular file; name one for the campaign.")
        if path and path.exists() and path.stat().st_size and not resume:
            raise BadInputFileError(
                f"{path}: holds an earlier campaign; go on with it by --resume, or name a new file."
            )
        try:
            store = cls(sqlite3.connect(name, isolation_level=None), name)
        except sqlite3.DatabaseError as error:
            raise cls._error(name, error) from error
        try:
            store._prepare(identity)
        except BaseException as error:
            store._db.close()
            if isinstance(error, sqlite3.DatabaseError):
                raise cls._error(name, error) from error
            raise
        return store

    def _prepare(self, identity: dict[str, str]) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        # Another process that holds the file open for writing makes this fail at once.
        self._db.execute("BEGIN IMMEDIATE")
        tables = {row[0] for row in self._db.execute("SELECT name FROM sqlite_master")}
        wanted = {"format": str(_FORMAT), **identity}
        if not tables:
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)
            self._db.executemany("INSERT INTO campaign VALUES (?, ?)", wanted.items())
        elif not {"campaign", "window", "run"} <= tables:
            raise BadInputFileError(f"{self._path}: is a database, but not a campaign store.")
        else:
            self._check(wanted)
        self._db.execute("COMMIT")

    def _check(self, wanted: dict[str, str]) -> None:
        found = dict(self._db.execute("SELECT key, value FROM campaign"))
        for key, value in wanted.items():
            if found.get(key) != value:
                raise BadInputFileError(
                    f"{self._path}: belongs to another campaign, its {key} is "
                    f"{found.get(key, 'missing')!r} and not {value!r}; name another file."
                )

    @staticmethod
    def _error(path: str, error: sqlite3.Error) -> BadInputFileError | OutputError:
        text = str(error)
        if "full" in text:
            return OutputError(f"{path}: the disk is full; free some room and use --resume.")
        if "locked" in text:
            return OutputError(f"{path}: another campaign is writing to it.")
        if "not a database" in text or "malformed" in text:
            return BadInputFileError(f"{path}: is not a campaign store, or it is damaged ({text}).")
        return OutputError(f"{path}: {text}.")

    def __enter__(self) -> Self:
        """Give the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise self._error(self._path, error) from error

    def add_window(self, window: Window) -> None:
        """Keep a window; one that differs from what is stored means another kernel build."""
        blob = encode.json(window)
        with self._guard():
            row = self._db.execute(
                "SELECT document FROM window WHERE scenario = ?", (window.scenario,)
            ).fetchone()
            if row is None:
                self._db.execute("INSERT INTO window VALUES (?, ?)", (window.scenario, blob))
            elif row[0] != blob:
                raise BadInputFileError(
                    f"{self._path}: its window of {window.scenario} is not the one this kernel "
                    "has now; name another file."
                )

    def add(self, results: Iterable[Result]) -> None:
        """Keep results, all or none of them."""
        self.add_rows(map(row_of, results))

    def add_rows(self, rows: Iterable[Row], tasks: Iterable[TaskKey] = ()) -> None:
        """Keep results that `row_of` has made ready and the tasks they are of, all or none."""
        with self._guard():
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT INTO task VALUES (?, ?, ?)", tasks)
            self._db.executemany("INSERT INTO run VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            self._db.execute("COMMIT")

    def keep(self, result: Result) -> None:
        """Keep a result that each campaign comes to again."""
        with self._guard():
            self._db.execute(
                "INSERT OR REPLACE INTO run VALUES (?, ?, ?, ?, ?, ?, ?)", row_of(result)
            )

    def finished(self, scenario: str) -> frozenset[tuple[int, int]]:
        """Give the number of the [[inject]] and the boundary of each finished task."""
        with self._guard():
            rows = self._db.execute(
                "SELECT inject, boundary FROM task WHERE scenario = ?", (scenario,)
            )
            return frozenset((inject, boundary) for inject, boundary in rows)

    def windows(self) -> tuple[Window, ...]:
        """Give all windows, by scenario name."""
        with self._guard():
            rows = self._db.execute("SELECT document FROM window ORDER BY scenario").fetchall()
            return tuple(self._decode(row[0], Window) for row in rows)

    def results(self) -> tuple[Result, ...]:
        """Give all results in the order of their keys, whatever order they were found in."""
        with self._guard():
            rows = self._db.execute(
                "SELECT document FROM run ORDER BY scenario, event, nested, boundary, nested_at"
            ).fetchall()
            return tuple(self._decode(row[0], Result) for row in rows)

    def _decode(self, blob: bytes, kind: type[_T]) -> _T:
        try:
            return msgspec.json.decode(blob, type=kind)
        except msgspec.DecodeError as error:
            raise BadInputFileError(f"{self._path}: a row is damaged ({error}).") from error


def read_store(path: Path) -> tuple[tuple[Window, ...], tuple[Result, ...]]:
    """Read windows and results of any campaign store, without writing to it.

    Raises BadInputFileError.
    """
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        with closing(connection):
            store = Store(connection, str(path))
            return store.windows(), store.results()
    except (sqlite3.DatabaseError, OutputError) as error:
        raise BadInputFileError(f"{path}: is not a campaign store ({error}).") from error
