import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing, suppress
from pathlib import Path

import pytest

from trapline.base.errors import BadInputFileError, OutputError
from trapline.explore.store import Store, key_of, read_store, row_of
from trapline.results.explore import Boundary, Result, Window

IDENTITY = {"kernel": "6.12", "options": "-"}


def result(boundary, event="nmi", nested=None, at=None):
    return Result(
        scenario="s", event=event, boundary=boundary, nested=nested, nested_at=at, allowed=True,
        rule="nmi-hold", verdict="same", expected=False, detail="",
        differs=(), instructions=7, splat=None,
        last=(), reproduce="trapline explore …",
    )  # fmt: skip


def window(count=1):
    one = Boundary(index=0, function="f", offset=0, ordinal=0, instruction="nop")
    return Window(scenario="s", title="t", instructions=count, boundaries=(one,), forbidden=())


def test_results_come_back_in_key_order_whatever_order_they_went_in(tmp_path):
    path = tmp_path / "a.db"
    runs = [result(2), result(0, "ve:mmio"), result(0), result(1, nested="nmi", at=5)]
    with Store.open(path, IDENTITY, resume=False) as store:
        for run in runs:
            store.add([run])
    with Store.open(path, IDENTITY, resume=True) as store:
        assert [key_of(r) for r in store.results()] == [
            ("s", "nmi", 0, "", -1), ("s", "nmi", 2, "", -1), ("s", "nmi", 1, "nmi", 5),
            ("s", "ve:mmio", 0, "", -1),
        ]  # fmt: skip


def test_a_task_is_finished_with_its_runs_or_not_at_all(tmp_path):
    path = tmp_path / "a.db"
    with Store.open(path, IDENTITY, resume=False) as store:
        store.add_rows([row_of(result(1))], [("s", 0, 1), ("s", 1, 1)])
        with pytest.raises(OutputError, match="UNIQUE"):
            store.add_rows([row_of(result(1))], [("s", 0, 2)])
    with Store.open(path, IDENTITY, resume=True) as store:
        assert store.finished("s") == {(0, 1), (1, 1)}
        assert store.finished("other") == frozenset()


def test_a_batch_with_a_repeated_run_is_refused_whole():
    with Store.open(None, IDENTITY, resume=False) as store:
        store.add([result(1)])
        with pytest.raises(OutputError, match="UNIQUE"):
            store.add([result(2), result(1)])
        assert [r.boundary for r in store.results()] == [1]


def test_a_store_of_another_kernel_is_refused(tmp_path):
    Store.open(tmp_path / "a.db", IDENTITY, resume=False).__exit__()
    with pytest.raises(BadInputFileError, match=r"its kernel is '6\.12' and not"):
        Store.open(tmp_path / "a.db", {**IDENTITY, "kernel": "6.13"}, resume=True)


def test_a_changed_window_is_refused():
    with Store.open(None, IDENTITY, resume=False) as store:
        store.add_window(window())
        store.add_window(window())
        with pytest.raises(BadInputFileError, match="not the one this kernel has"):
            store.add_window(window(2))
        assert store.windows() == (window(),)


def test_an_old_store_is_not_overwritten(tmp_path):
    Store.open(tmp_path / "a.db", IDENTITY, resume=False).__exit__()
    with pytest.raises(BadInputFileError, match="--resume"):
        Store.open(tmp_path / "a.db", IDENTITY, resume=False)


def test_a_folder_is_no_store(tmp_path):
    for resume in (False, True):
        with pytest.raises(BadInputFileError, match="is a folder"):
            Store.open(tmp_path, IDENTITY, resume=resume)


@pytest.mark.parametrize("data", [b"hello" * 300, b"SQLite format 3\0" + b"\xff" * 2000])
def test_a_file_that_is_no_store_is_refused(tmp_path, data):
    (tmp_path / "a.db").write_bytes(data)
    with pytest.raises(BadInputFileError, match=r"a\.db"):
        Store.open(tmp_path / "a.db", IDENTITY, resume=True)


def test_a_second_writer_is_refused(tmp_path):
    """At once, and for all of the first one's life, though that does not write just now."""
    path = tmp_path / "a.db"
    with Store.open(path, IDENTITY, resume=False) as store:
        store.add([result(0)])
        for _ in range(2):
            with pytest.raises(OutputError, match="another command is writing to it"):
                Store.open(path, IDENTITY, resume=True)
        assert [r.boundary for r in read_store(path)[1]] == [0]  # but reading it is no harm
        store.add([result(1)])
    with Store.open(path, IDENTITY, resume=True) as store:
        assert len(store.results()) == 2


def test_a_program_that_writes_to_a_store_is_in_the_way(tmp_path):
    path = tmp_path / "a.db"
    with Store.open(path, IDENTITY, resume=False) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OutputError, match="another program is writing to it"):
            store.add([result(0)])
        other.close()
        store.add([result(0)])


def test_reading_leaves_nothing_beside(tmp_path):
    path = tmp_path / "a.db"
    with Store.open(path, IDENTITY, resume=False) as store:
        store.add([result(0)])
    before = path.read_bytes()
    read_store(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_what_was_added_survives_kill_9(tmp_path):
    path = tmp_path / "a.db"
    script = f"""
        import sys, signal
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_store import IDENTITY, Store, result
        store = Store.open(Path({str(path)!r}), IDENTITY, resume=False)
        store.add([result(0), result(1)])
        store._db._db.execute("BEGIN IMMEDIATE")
        store._db._db.execute("DELETE FROM run")
        print("ready", flush=True)
        signal.pause()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    with Store.open(path, IDENTITY, resume=True) as store:
        assert [r.boundary for r in store.results()] == [0, 1]


def planted(tmp_path, *statements):
    """A store to whose schema or rows somebody has done something."""
    path = tmp_path / "planted.db"
    with Store.open(path, IDENTITY, resume=False) as store:
        store.add_window(window())
        store.add_rows([row_of(result(0))], [("s", 0, 0)])
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for statement in statements:
            database.execute(statement)
    return path


_ENDLESS = "WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM x)"
# As rows that a CREATE TABLE could never hold: NOT NULL is the writer's promise, not the file's.
_FOREIGN = {
    "an endless view": (
        "DROP TABLE run",
        f"""CREATE VIEW run AS {_ENDLESS} SELECT 's' scenario, 'nmi' event, n boundary, '' nested,
            -1 nested_at, 'same' verdict, zeroblob(1000000) document FROM x""",
    ),
    "a view of huge rows": (
        "DROP TABLE window",
        f"CREATE VIEW window AS {_ENDLESS} SELECT 's' scenario, zeroblob(99999999) document FROM x",
    ),
    "a trigger": ("CREATE TRIGGER t AFTER INSERT ON run BEGIN DELETE FROM run; END",),
    "one table more": ("CREATE TABLE more (x)",),
    "an index on an expression": ("CREATE INDEX i ON run (length(document))",),
    "a column that is computed": (
        "DROP TABLE task",
        "CREATE TABLE task (scenario, inject, boundary AS (zeroblob(100000000)))",
    ),
    "no keys": ("DROP TABLE run", "CREATE TABLE run (scenario, event, boundary, nested, document)"),
    "a schema that is not UTF-8": (
        "PRAGMA writable_schema=ON",
        "UPDATE sqlite_schema SET sql = CAST(x'43524541544520ff' AS TEXT) WHERE name = 'run'",
    ),
}


@pytest.mark.parametrize("statements", _FOREIGN.values(), ids=_FOREIGN)
def test_a_store_with_another_schema_is_refused_before_anything_is_read(tmp_path, statements):
    path = planted(tmp_path, *statements)
    with pytest.raises(BadInputFileError, match="is not a campaign store"):
        read_store(path)
    with pytest.raises(BadInputFileError, match="is not a campaign store"):
        Store.open(path, IDENTITY, resume=True)


_ROWS = {
    "bytes that are not JSON": "UPDATE run SET document = x'00ff'",
    "bytes that are not UTF-8": """UPDATE run SET document = x'7b22ff223a317d'""",
    "text where bytes should be": "UPDATE run SET document = 'x'",
    "a number": "UPDATE run SET document = 7",
    "a window that is none": "UPDATE window SET document = x'7b7d'",
    "a huge row": "UPDATE run SET document = zeroblob(100000000)",
    "nesting without end": "UPDATE run SET document = CAST(replace(hex(zeroblob(50000)), '0', '[') "
    "AS BLOB)",
}


@pytest.mark.parametrize("statement", _ROWS.values(), ids=_ROWS)
def test_a_store_with_a_damaged_row_is_refused_in_one_sentence(tmp_path, statement):
    path = planted(tmp_path, statement)
    with pytest.raises(BadInputFileError, match=r"planted\.db: is not a campaign store") as error:
        read_store(path)
    assert str(error.value).isprintable()


def test_the_key_of_a_damaged_store_is_no_matter(tmp_path):
    path = planted(tmp_path, "UPDATE campaign SET value = CAST(x'ff1b5b324a' AS TEXT)")
    assert len(read_store(path)[1]) == 1
    with pytest.raises(BadInputFileError, match="belongs to another campaign") as error:
        Store.open(path, IDENTITY, resume=True)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("end", ["-wal", "-shm", "-journal"])
def test_a_fifo_beside_a_store_is_not_waited_for(tmp_path, end):
    path = planted(tmp_path)
    os.mkfifo(tmp_path / f"planted.db{end}")
    with pytest.raises(BadInputFileError, match="is not a regular file"):
        read_store(path)
    with pytest.raises(BadInputFileError, match="is not a regular file"):
        Store.open(path, IDENTITY, resume=True)


def test_any_damage_to_any_page_is_survived(tmp_path):
    """And a page that many rows share does not make a small file say much."""
    path = planted(tmp_path)
    sound = path.read_bytes()
    chance = random.Random(1)
    for _ in range(300):
        data = bytearray(sound)
        for _ in range(chance.choice([1, 2, 8, 64])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        with suppress(BadInputFileError, OutputError):
            read_store(path)
        with (
            suppress(BadInputFileError, OutputError),
            Store.open(path, IDENTITY, resume=True) as store,
        ):
            store.add([result(5)])
            store.results()


def test_ctrl_c_is_heard_while_sqlite_works():
    """Also when a file makes it work for ever."""
    script = f"""
        import os, signal, sys, threading
        from trapline.base.database import Database
        press = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        with Database.open(None, "CREATE TABLE one (x)", "a test") as database:
            try:
                press.start()
                list(database.rows("{_ENDLESS} SELECT count(*) FROM x"))
            except KeyboardInterrupt:
                sys.exit(130)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == 130
