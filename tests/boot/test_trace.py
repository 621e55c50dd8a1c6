"""The trace file: what a line holds, and that no half of it is left behind."""

import json
import stat
from pathlib import Path

import pytest

from trapline.base.errors import OutputError
from trapline.boot.trace import TraceWriter
from trapline.machine.observe.recorder import TrapKind, TrapRecord

VE = TrapRecord(TrapKind.VE, 1000, 0xFFFFFFFF81000000, 30, (0x3F90000, 0, 0, 1))
CALL = TrapRecord(TrapKind.TDVMCALL, 1100, 0xFFFFFFFF81000010, 30, (1, 1, 0x3F9, 5))
TDCALL = TrapRecord(TrapKind.TDCALL, 1200, 0xFFFFFFFF81000020, 3, (0, 0, 0, 0))
HEADER = {"kernel": "6.12", "seed": 1}


def write(path, *traps):
    with TraceWriter(path, HEADER) as writer:
        for trap in traps:
            writer(trap)


def test_each_trap_is_a_line_of_json(tmp_path):
    path = tmp_path / "trace.jsonl"
    write(path, VE, CALL, TDCALL)
    header, *lines = map(json.loads, path.read_text().splitlines())
    assert header == {"schema": "trapline/trace", "version": 1, "kernel": "6.12", "seed": 1}
    assert [line["n"] for line in lines] == [1, 2, 3]
    assert lines[0]["kind"] == "ve"
    assert lines[0]["reason"] == "IO_INSTRUCTION"
    assert lines[0]["qualification"] == "0x3f90000"
    assert lines[1]["leaf"] == "Instruction.IO"
    assert lines[1]["r14"] == "0x3f9"
    assert lines[2] == {
        "n": 3, "cycles": 1200, "kind": "tdcall", "rip": "0xffffffff81000020", "leaf": 3,
        "status": "0x0",
    }  # fmt: skip


def test_a_command_line_that_is_not_utf_8(tmp_path):
    path = tmp_path / "trace.jsonl"
    with TraceWriter(path, {"command_line": "quiet \udcff"}):
        pass
    assert json.loads(path.read_bytes())["command_line"] == "quiet \\udcff"


def test_an_older_trace_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "trace.jsonl"
    write(path, VE)
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        write(path, CALL, None)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match="cannot be written: no such file"):
        TraceWriter(tmp_path / "none" / "trace.jsonl", HEADER).__enter__()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
def test_a_full_disk_is_an_error_and_a_device_is_not_replaced():
    with pytest.raises(OutputError, match="no space left"):
        write(Path("/dev/full"), *[VE] * 10_000)
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        TraceWriter(tmp_path, HEADER).__enter__()
