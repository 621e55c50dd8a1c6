"""A store on a disk that fills up, under a process that dies, or copied while it is written."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from test_store import IDENTITY, Store, result, row_of

from trapline.base.errors import OutputError, TraplineError

WRITER = f"""
    import resource, signal, sys
    from pathlib import Path
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    from test_store import IDENTITY, Store, result, row_of
    from trapline.base.errors import OutputError

    path, limit = Path(sys.argv[1]), int(sys.argv[2])
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        with Store.open(path, IDENTITY, resume=path.exists()) as store:
            done = len(list(store.results()))
            for number in range(done, done + 2000):
                store.add_rows([row_of(result(number))], [("s", 0, number)])
                print(number, flush=True)
    except OutputError as error:
        print(error, file=sys.stderr)
        sys.exit(15)
"""


def written(lines):
    """How many runs a writer said were in the store; its last line may be cut."""
    whole = lines.decode().rpartition("\n")[0].split("\n")
    return int(whole[-1]) + 1 if whole[-1] else 0


def boundaries(path):
    with Store.open(path, IDENTITY, resume=True) as store:
        found = [run.boundary for run in store.results()]
        assert store.finished("s") == {(0, number) for number in found}
    return found


def writer(path, limit=0):
    return [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(limit)]


@pytest.mark.parametrize("limit", [*range(4096, 60_000, 7001), 120_000])
def test_a_full_disk_at_any_write_loses_nothing_that_was_in(tmp_path, limit):
    path = tmp_path / "a.db"
    done = subprocess.run(writer(path, limit), capture_output=True, check=False)
    assert done.returncode == 15, done.stderr
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"{path}: ")
    count = written(done.stdout)
    if count or path.stat().st_size:
        try:
            found = boundaries(path)
        except TraplineError:
            assert count == 0  # not even its tables had room
        else:
            # The last one may be in although its end was not heard.
            assert found in (list(range(count)), list(range(count + 1)))


def test_kill_9_at_any_moment_loses_nothing_that_was_in(tmp_path):
    path = tmp_path / "a.db"
    before = 0
    for attempt in range(12):
        with subprocess.Popen(writer(path), stdout=subprocess.PIPE) as process:
            process.stdout.read(1)
            time.sleep(0.013 * attempt)
            process.send_signal(signal.SIGKILL)
            lines = process.stdout.read()
        found = boundaries(path)
        assert found == list(range(len(found)))
        said = written(b"0\n" + lines.partition(b"\n")[2])
        assert len(found) >= max(said, before + 1)
        before = len(found)


def test_a_store_that_is_copied_while_it_is_written_is_whole_or_refused(tmp_path):
    path, copy = tmp_path / "a.db", tmp_path / "copy.db"
    outcomes = set()
    with subprocess.Popen(writer(path), stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        for _ in range(20):
            for end in ("", "-wal"):
                part = path.with_name(path.name + end)
                if part.exists():
                    shutil.copyfile(part, copy.with_name(copy.name + end))
            try:
                found = boundaries(copy)
            except TraplineError as error:
                outcomes.add(str(error).startswith(str(copy)))
            else:
                outcomes.add(found == list(range(len(found))))
            for end in ("", "-wal", "-shm"):
                copy.with_name(copy.name + end).unlink(missing_ok=True)
        process.kill()
        process.stdout.read()
    assert outcomes == {True}


def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path):
    if os.geteuid() == 0:
        place = Path("/proc/self/a.db")  # where not even root may make a file
    else:
        place = tmp_path / "closed" / "a.db"
        place.parent.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        Store.open(place, IDENTITY, resume=False)


def test_the_writer_of_these_tests_writes(tmp_path):
    path = tmp_path / "a.db"
    with Store.open(path, IDENTITY, resume=False) as store:
        store.add_rows([row_of(result(0))], [("s", 0, 0)])
    assert boundaries(path) == [0]
