"""cpio archives, made and checked."""

import gzip
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.base.errors import BadMachineError
from trapline.machine.loader import initramfs


def unpack(archive):
    """Read a newc archive; an independent reading of the format."""
    files, offset = {}, 0
    while True:
        fields = [int(archive[offset + 6 + 8 * i : offset + 14 + 8 * i], 16) for i in range(13)]
        assert archive[offset : offset + 6] == b"070701"
        name_at = offset + 110
        name = archive[name_at : name_at + fields[11] - 1].decode()
        data_at = (name_at + fields[11] + 3) // 4 * 4
        data = archive[data_at : data_at + fields[6]]
        offset = (data_at + fields[6] + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert offset == len(archive)
            return files
        files[name] = (fields[1], data, (fields[9], fields[10]))


def test_the_self_test_holds_what_init_needs():
    files = unpack(initramfs.self_test(b"\x7fELFbusybox", [("a.ko", b"A"), ("b.ko", b"BB")]))
    assert files["bin/busybox"] == (0o100755, b"\x7fELFbusybox", (0, 0))
    assert files["init"][0] == 0o100755
    assert files["init"][1].startswith(b"#!/bin/busybox sh\n")
    assert files["dev/console"] == (0o020600, b"", (5, 1))
    assert files["modules/order"][1] == b"a.ko\nb.ko\n"
    assert files["modules/b.ko"][1] == b"BB"


def test_the_same_input_gives_the_same_archive():
    assert initramfs.self_test(b"x") == initramfs.self_test(b"x")
    assert "modules" not in unpack(initramfs.self_test(b"x"))


@given(st.dictionaries(st.text("abc/", min_size=1), st.binary(max_size=50), max_size=5))
def test_archives_can_be_read_back(contents):
    entries = [initramfs.program(name, data) for name, data in contents.items()]
    archive = initramfs.newc(entries)
    initramfs.check(archive, "x")
    assert {name: file[1] for name, file in unpack(archive).items()} == contents


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an archive",
        b"070701",
        initramfs.self_test(b"busybox" * 100)[:500],
        initramfs.newc([initramfs.program("a", b"x")]).replace(b"070701", b"070707"),
        gzip.compress(b"no cpio inside", mtime=0),
        gzip.compress(initramfs.self_test(b"x"), mtime=0)[:10],
        b"070701" + b"ffffffff" * 13,
        b"070701" + b"-0000001" * 13 + bytes(200),
    ],
)
def test_broken_archives_are_refused(data):
    with pytest.raises(BadMachineError, match="initrd"):
        initramfs.check(data, "my.img")


def test_compressed_archives_are_accepted():
    initramfs.check(gzip.compress(initramfs.self_test(b"x")), "x")


@given(st.binary(max_size=400))
def test_no_bytes_break_the_check(data):
    with suppress(BadMachineError):
        initramfs.check(b"070701" + data, "x")


def test_a_missing_initrd_is_one_sentence(tmp_path):
    with pytest.raises(BadMachineError, match="cannot be read: no such file"):
        initramfs.read_initrd(tmp_path / "none")
    with pytest.raises(BadMachineError, match="is not a regular file"):
        initramfs.read_initrd(tmp_path)
