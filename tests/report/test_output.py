import os
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest

from trapline.base.errors import OutputError
from trapline.report.output import Destination


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def broken(error):
    yield b"first half"
    raise error


def test_writes_the_whole_file(tmp_path):
    target = tmp_path / "out.txt"
    Destination(target).write([b"one\n", b"two\n"])
    assert target.read_bytes() == b"one\ntwo\n"
    assert names(tmp_path) == ["out.txt"]


def test_new_file_obeys_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        Destination(tmp_path / "out").write([b"x"])
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_replaced_file_keeps_its_mode(tmp_path):
    target = tmp_path / "out"
    target.write_bytes(b"old")
    target.chmod(0o600)
    Destination(target).write([b"new"])
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("renderer broke")])
def test_interruption_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with pytest.raises(type(error)):
        Destination(target).write(broken(error))
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["out"]


def test_full_disk_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match="no space left on device"):
        Destination(tmp_path / "out").write(broken(OSError(28, "No space left on device")))
    assert names(tmp_path) == []


def test_full_device_is_an_output_error_and_stays_a_device():
    with pytest.raises(OutputError, match="no space left on device"):
        Destination(Path("/dev/full")).write([b"x"])
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_missing_folder_is_reported_before_anything_runs(tmp_path):
    with pytest.raises(OutputError, match="there is no folder"):
        Destination(tmp_path / "none" / "out")


def test_folder_as_file_is_reported(tmp_path):
    with pytest.raises(OutputError, match="is a folder"):
        Destination(tmp_path)


@contextmanager
def without_privileges():
    """Act as a user who is not root, whom permissions do not stop."""
    old = os.geteuid()
    if old == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(old)


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_folder_without_permission_is_reported(tmp_path, mode):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    with without_privileges(), pytest.raises(OutputError, match="permission denied"):
        Destination(folder / "out")
    folder.chmod(0o700)


def test_symbolic_link_to_itself_is_reported(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OutputError, match="too many levels of symbolic links"):
        Destination(loop)


def test_symbolic_link_keeps_pointing(tmp_path):
    real = tmp_path / "real"
    real.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(real)
    Destination(link).write([b"new"])
    assert link.is_symlink()
    assert real.read_bytes() == b"new"


def test_named_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        Destination(pipe).write([b"through"])
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_standard_output(capfdbinary):
    destination = Destination(None)
    destination.write([b"a", b"b"])
    assert capfdbinary.readouterr().out == b"ab"
