"""The campaign store: one SQLite file, so that a killed campaign resumes and repeats nothing.

A store belongs to one kernel, one module version and one set of options, kept in `campaign` and
checked on opening. `window` holds one row per scenario with its boundaries, `run` one row per
finished run under the key (scenario, event, boundary, nested, nested_at), `task` what is
finished, though it may have led to no run, `footprint` what events change by their nature. Rows
are written by the campaign's parent process alone, in transactions, in WAL mode: a kill -9 loses
at most the runs of the last transaction, which `--resume` does again. A campaign holds the store's
lock from its first to its last moment.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final, Self, TypeVar

from trapline.base import decode, encode
from trapline.base.database import Database
from trapline.base.errors import BadInputFileError, OutputError
from trapline.base.printable import printable
from trapline.results.explore import Footprint, Result, Window

_FORMAT: Final = 3
_SCHEMA: Final = """
CREATE TABLE campaign (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE task (
    scenario TEXT NOT NULL,
    inject INTEGER NOT NULL,
    boundary INTEGER NOT NULL,
    PRIMARY KEY (scenario, inject, boundary)
) WITHOUT ROWID;
CREATE TABLE footprint (id TEXT PRIMARY KEY, document BLOB NOT NULL) WITHOUT ROWID;
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

_WHAT: Final = "a campaign store"

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
    """An open campaign store. Use as a context manager.

    All methods raise what `trapline.base.database.Database` raises.
    """

    def __init__(self, database: Database, path: str) -> None:
        self._db = database
        self._path = path

    @classmethod
    def open(cls, path: Path | None, identity: dict[str, str], *, resume: bool) -> Self:
        """Open or create a store; None keeps it in memory.

        `identity` names what the results depend on. Raises BadInputFileError when the file is
        no store, belongs to another campaign, or exists although `resume` is false, OutputError
        when another campaign writes to it.
        """
        if path is not None:
            _check_name(path, resume=resume)
        store = cls(Database.open(path, _SCHEMA, _WHAT), str(path))
        try:
            wanted = {"format": str(_FORMAT), **identity}
            store._prepare({key: printable(value) for key, value in wanted.items()})
        except BaseException:
            store.__exit__()
            raise
        return store

    def _prepare(self, wanted: dict[str, str]) -> None:
        if self._db.is_new:
            with self._db.transaction():
                self._db.write("INSERT INTO campaign VALUES (?, ?)", wanted.items())
            return
        found: dict[str, str] = dict(self._db.rows("SELECT key, value FROM campaign"))
        for key, value in wanted.items():
            if found.get(key) != value:
                raise BadInputFileError(
                    f"{self._path}: belongs to another campaign, its {key} is "
                    f"{found.get(key, 'missing')!r} and not {value!r}; name another file."
                )

    def __enter__(self) -> Self:
        """Give the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._db.close()

    def add_window(self, window: Window) -> None:
        """Keep a window; one that differs from what is stored means another kernel build."""
        blob = encode.json(window)
        query = "SELECT document FROM window WHERE scenario = ?"
        row = next(self._db.rows(query, (window.scenario,)), None)
        if row is None:
            self._db.write("INSERT INTO window VALUES (?, ?)", [(window.scenario, blob)])
        elif row[0] != blob:
            raise BadInputFileError(
                f"{self._path}: its window of {window.scenario} is not the one this kernel "
                "has now; name another file."
            )

    def add(self, results: Iterable[Result]) -> None:
        """Keep results, all or none of them."""
        self.add_rows(map(row_of, results))

    def add_rows(
        self,
        rows: Iterable[Row],
        tasks: Iterable[TaskKey] = (),
        footprints: Iterable[tuple[str, bytes]] = (),
    ) -> None:
        """Keep results that `row_of` has made ready and the tasks they are of, all or none.

        `footprints` are those that the results refer to and that may be new: id and document.
        """
        with self._db.transaction():
            self._db.write("INSERT INTO task VALUES (?, ?, ?)", tasks)
            self._db.write("INSERT INTO run VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            self._db.write("INSERT OR IGNORE INTO footprint VALUES (?, ?)", footprints)

    def keep(self, result: Result) -> None:
        """Keep a result that each campaign comes to again."""
        self._db.write("INSERT OR REPLACE INTO run VALUES (?, ?, ?, ?, ?, ?, ?)", [row_of(result)])

    def finished(self, scenario: str) -> frozenset[tuple[int, int]]:
        """Give the number of the [[inject]] and the boundary of each finished task."""
        return frozenset(
            (inject, boundary)
            for inject, boundary in self._db.rows(
                "SELECT inject, boundary FROM task WHERE scenario = ?", (scenario,)
            )
        )

    def windows(self) -> tuple[Window, ...]:
        """Give all windows, by scenario name."""
        rows = self._db.rows("SELECT document FROM window ORDER BY scenario")
        return tuple(self._decode(blob, Window) for (blob,) in rows)

    def results(self) -> tuple[Result, ...]:
        """Give all results in the order of their keys, whatever order they were found in."""
        rows = self._db.rows(
            "SELECT document FROM run ORDER BY scenario, event, nested, boundary, nested_at"
        )
        return tuple(self._decode(blob, Result) for (blob,) in rows)

    def footprints(self) -> tuple[Footprint, ...]:
        """Give all footprints by scenario and event, without their runs."""
        rows = self._db.rows("SELECT document FROM footprint ORDER BY id")
        found = [self._decode(blob, Footprint) for (blob,) in rows]
        return tuple(sorted(found, key=lambda one: (one.scenario, one.event, one.nested or "")))

    def _decode(self, blob: object, kind: type[_T]) -> _T:
        if not isinstance(blob, bytes):
            raise self._db.damaged("a document is missing")
        return decode.json(blob, kind, self._path, f"{_WHAT}, or a row is damaged")


def _check_name(path: Path, *, resume: bool) -> None:
    if path.is_dir():
        raise BadInputFileError(f"{path}: is a folder; name a file for the campaign.")
    if path.exists() and not path.is_file():
        raise BadInputFileError(f"{path}: is not a regular file; name one for the campaign.")
    if path.exists() and path.stat().st_size and not resume:
        raise BadInputFileError(
            f"{path}: holds an earlier campaign; go on with it by --resume, or name a new file."
        )


def read_store(path: Path) -> tuple[tuple[Window, ...], tuple[Result, ...]]:
    """Read windows and results of any campaign store, without writing to it.

    Raises BadInputFileError.
    """
    try:
        with Database.read_only(path, _SCHEMA, _WHAT) as database:
            store = Store(database, str(path))
            return store.windows(), store.results()
    except OutputError as error:
        raise BadInputFileError(str(error)) from error
