"""What is read from outside is bounded and never waited for; what is written is whole or not."""

import os
from pathlib import Path

import pytest

from trapline.base.errors import BadInputFileError, BadMachineError
from trapline.base.files import read, read_start, write_whole, written_beside


def read_some(path, limit=16, **options):
    return read(path, limit=limit, what="a test", **options)


def special(tmp_path, kind):
    if kind == "device":
        return Path("/dev/zero")
    if kind == "folder":
        return tmp_path
    if kind == "link to a fifo":
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "link").symlink_to("fifo")
        return tmp_path / "link"
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


@pytest.mark.parametrize("reader", [read_some, lambda path: read_start(path, 16)])
@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "device", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind, reader):
    with pytest.raises(BadInputFileError, match=r": is not a regular file\.$"):
        reader(special(tmp_path, kind))


def test_a_file_of_the_limit_is_read_and_one_byte_more_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 16)
    assert read_some(path) == b"x" * 16
    path.write_bytes(b"x" * 17)
    with pytest.raises(BadInputFileError, match="is larger than 0 KiB, too large for a test"):
        read_some(path)


def test_a_file_that_does_not_say_its_size_is_read_and_bounded():
    path = Path("/proc/self/status")
    assert path.stat().st_size == 0
    assert read_some(path, 1 << 20).startswith(b"Name:")
    with pytest.raises(BadInputFileError, match="is larger than"):
        read_some(path)


def test_a_huge_file_costs_no_memory(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # sparse
    with pytest.raises(BadInputFileError, match="is larger than"):
        read_some(path)
    assert read_start(path, 4) == bytes(4)


@pytest.mark.parametrize(
    ("name", "says"), [("none", "no such file"), ("a\0b", "name is not valid"), ("l" * 300, "long")]
)
def test_what_is_not_there(tmp_path, name, says):
    with pytest.raises(BadMachineError, match=says):
        read_some(tmp_path / name, error=BadMachineError)


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    write_whole(path, [b"new", b" text"])
    assert path.read_text() == "new text"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
def test_what_was_there_stays_when_writing_fails(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def chunks():
        yield b"new"
        raise error

    with pytest.raises(error):
        write_whole(path, chunks())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_place_is_taken_only_at_the_end(tmp_path):
    path = tmp_path / "file"
    with written_beside(path) as out:
        out.write(b"new")
        out.flush()
        assert not path.exists()
    assert path.read_bytes() == b"new"


def test_a_name_may_be_as_long_as_names_can_be_and_hold_any_bytes(tmp_path):
    for name in ("é" * 127, os.fsdecode(b"caf\xe9"), "a" * 255):
        path = tmp_path / name
        write_whole(path, [b"x"])
        assert read_some(path) == b"x"
