import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from trapline.base.errors import BadInputFileError, OutputError
from trapline.explore.store import Store, key_of, row_of
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
    with Store.open(tmp_path / "a.db", IDENTITY, resume=False) as store:
        store._db.execute("BEGIN IMMEDIATE")
        with pytest.raises(OutputError, match="another campaign"):
            Store.open(tmp_path / "a.db", IDENTITY, resume=True)


def test_what_was_added_survives_kill_9(tmp_path):
    path = tmp_path / "a.db"
    script = f"""
        import sys, signal
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_store import IDENTITY, Store, result
        store = Store.open(Path({str(path)!r}), IDENTITY, resume=False)
        store.add([result(0), result(1)])
        store._db.execute("BEGIN IMMEDIATE")
        store._db.execute("DELETE FROM run")
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
