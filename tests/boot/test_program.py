"""What can be run in a guest, and what comes out of its serial ports."""

import subprocess

import pytest

from hostile import run
from trapline.base.errors import BadMachineError
from trapline.boot.program import ProgramOutput, read_program
from trapline.machine.loader.acpi import Board
from trapline.results.boot import RunProgram


def build(folder, *options):
    source, program = folder / "p.c", folder / "p"
    source.write_text("int main(void) { return 3; }\n")
    subprocess.run(["gcc", *options, "-o", str(program), str(source)], check=True)
    return program


def test_a_script_is_taken_as_it_is(tmp_path):
    script = tmp_path / "it's a test.sh"
    script.write_text("#!/bin/sh\n")
    program = read_program(script)
    assert program.path == "run/it_s_a_test.sh"
    assert '"/run/it_s_a_test.sh" <' in program.commands
    assert program.data == b"#!/bin/sh\n"


def test_only_a_static_binary_runs_where_no_linker_is(tmp_path):
    assert read_program(build(tmp_path, "-static")).data.startswith(b"\x7fELF")
    with pytest.raises(BadMachineError, match="needs a dynamic linker"):
        read_program(build(tmp_path))


@pytest.mark.parametrize("data", [b"", b"echo hello\n", b"\x7fELF", b"MZ"])
def test_what_the_guest_could_not_run_is_refused(tmp_path, data):
    path = tmp_path / "program"
    path.write_bytes(data)
    with pytest.raises(BadMachineError, match="program"):
        read_program(path)


def fed(out=b"", err=b"", status=b""):
    pieces = []
    output = ProgramOutput("p", pieces.append, lambda data: pieces.append((data,)))
    for put, data in zip(output.ports, (out, err, status), strict=True):
        for byte in data:
            put(byte)
    output.flush()
    return output.result, pieces


def test_lines_come_as_they_are_printed_and_the_rest_at_the_end():
    result, pieces = fed(b"one\ntwo", b"oh\n", b"7\n")
    assert pieces == [b"one\n", b"two", (b"oh\n",)]
    assert result == RunProgram(name="p", exit_code=7, out=7, err=3)


@pytest.mark.parametrize("status", [b"", b"7", b"no\n", b"256\n", b"-1\n", b"7" * 99 + b"\n"])
def test_a_status_that_is_none_is_not_made_up(status):
    assert fed(status=status)[0].exit_code is None


def test_each_port_is_where_linux_looks_for_it():
    output = ProgramOutput("p", bytes, bytes)
    run(
        """
        out_byte 0x2f8, 65
        out_byte 0x3e8, 66
        out_byte 0x2e8, 51
        out_byte 0x2e8, 10
        power_off
        """,
        serial_ports=output.ports,
        board=Board(further_ports=3),
    )
    assert output.result == RunProgram(name="p", exit_code=3, out=1, err=1)
