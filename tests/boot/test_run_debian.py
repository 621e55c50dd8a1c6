"""A program run in a real guest, and kernels that complain meanwhile: planted, and sound."""

import shutil
import struct

import msgspec
import pytest

from trapline.base.errors import ExitCode
from trapline.cli.main import run
from trapline.kernel.binary import Binary
from trapline.results.boot import BootResult

pytestmark = [pytest.mark.kernel, pytest.mark.xdist_group("boot")]

# Says what a kernel would say that is in trouble, and makes a system call that nobody else makes.
SCRIPT = r"""#!/bin/sh
echo "WARNING: CPU: 0 PID: 1 at mm/fake.c:1 fake+0x1/0x2" > /dev/console
echo "Kernel panic - not syncing: not really" > /dev/console
echo "Kernel panic - not syncing: not really" > /dev/kmsg
echo to stderr >&2
busybox sync
printf 'one\ttwo\r\n\033[1mlast line without end'
exit 42
"""
SAID = b"one\ttwo\r\n\x1b[1mlast line without end"
UD2 = b"\x0f\x0b"


def warn(binary, at):
    """Assemble __warn(file, 77, NULL, TAINT_WARN, NULL, NULL), and a return: no exception."""
    file, target = binary.address_of("linux_banner"), binary.address_of("__warn")
    code = b"\x48\xc7\xc7" + struct.pack("<i", file - (1 << 64))  # mov rdi
    code += b"\xbe\x4d\x00\x00\x00\x31\xd2\xb9\x09\x00\x00\x00"  # mov esi, 77; edx, 0; ecx, 9
    code += b"\x45\x31\xc0\x45\x31\xc9"  # xor r8d, r8d; xor r9d, r9d
    return code + b"\xe8" + struct.pack("<i", target - (at + len(code) + 5)) + b"\xc3"


@pytest.fixture
def planted(debian_kernel, tmp_path):
    """Return a function that makes a kernel whose ksys_sync() is something else."""

    def make(code):
        path = tmp_path / "vmlinux"
        shutil.copy(debian_kernel.vmlinux, path)
        with Binary.open_vmlinux(path) as binary:
            at = binary.address_of("ksys_sync") + 9  # behind ENDBR64 and what ftrace patches
            section = next(
                one
                for one in binary.elf.sections
                if one.is_executable and one.address <= at < one.address + one.size
            )
            where = section.offset + at - section.address
            patch = code(binary, at) if callable(code) else code
        with path.open("r+b") as file:
            file.seek(where)
            file.write(patch)
        return path

    return make


@pytest.fixture
def boot(tmp_path, capfdbinary):
    """Run the script in a guest; returns exit code, its output and errors, and the document."""

    def run_it(kernel, *options):
        script, output = tmp_path / "script.sh", tmp_path / "boot.json"
        script.write_text(SCRIPT)
        words = ["boot", str(kernel), "--run", str(script), *options]
        if kernel_only := "--silent" in words:
            words.remove("--silent")
        else:
            words += ["--no-scan", "--format", "json", "-o", str(output)]
        code = run(words)
        said = capfdbinary.readouterr()
        document = None
        if not kernel_only:
            document = msgspec.json.decode(output.read_bytes(), type=BootResult)
        return code, said.out, said.err, document

    return run_it


def test_what_it_prints_is_printed_and_nothing_else(debian_kernel_name, boot):
    code, out, err, _ = boot(debian_kernel_name, "--silent")
    assert (code, out, err) == (42, SAID, b"to stderr\n")


def test_a_warning_is_no_success_and_can_be_put_up_with(planted, boot):
    kernel = planted(warn)
    code, out, _, document = boot(kernel)
    assert code == ExitCode.GUEST_COMPLAINED
    assert out == SAID
    (one,) = document.complaints
    assert (one.kind, one.count) == ("warning", 2)  # poweroff calls sync(), too
    assert "%" not in one.text
    assert any(place.label.startswith("ksys_sync+") for place in one.splat.trace)
    assert document.program.exit_code == 42
    code, _, _, document = boot(kernel, "--fail-on", "oops")
    assert code == 42
    assert [one.fails for one in document.complaints] == [False]


def test_an_oops_is_shown_where_it_was(planted, boot):
    code, out, _, document = boot(planted(UD2))
    # The program's sync was killed, which is no panic; that of init, which powers off, is one.
    assert (code, out) == (ExitCode.GUEST_PANIC, SAID)
    (one,) = document.complaints
    assert one.kind == "oops"
    assert one.count == 3  # the same each time: the program calls sync(), then init does
    assert document.program.exit_code == 42
    assert "Oops: invalid opcode: 0000 [#1]" in one.text
    assert one.splat.place.label.startswith("ksys_sync+0x9/")
    assert one.splat.registers.rip == one.splat.place.label
    assert "Attempted to kill init!" in document.outcome.detail
