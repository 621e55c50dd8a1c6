"""`trapline verify` where it does not get to verify: one sentence and the right code."""

import struct
import subprocess

import msgspec
import pytest

import scan_documents
from guests import build
from trapline.base.errors import ExitCode
from trapline.cli.main import run
from trapline.machine.loader import initramfs


@pytest.mark.parametrize("command", ["verify", "boot"])
def test_the_scan_of_another_kernel_is_refused(command, tmp_path, capsys):
    """Its sites would be counted for this one."""
    note = tmp_path / "note"
    note.write_bytes(struct.pack("<III4s20s", 4, 20, 3, b"GNU", bytes(20)))
    vmlinux = tmp_path / "vmlinux"
    added = f"--add-section=.note.gnu.build-id={note}"
    subprocess.run(["objcopy", added, build(()), vmlinux], check=True)
    document = scan_documents.document()
    path = tmp_path / "scan.json"
    path.write_bytes(msgspec.json.encode(document))
    arguments = [command, str(vmlinux), "--scan", str(path)]
    if command == "boot":
        initrd = tmp_path / "initrd"
        initrd.write_bytes(initramfs.newc([]))  # so that none is fetched
        arguments += ["--initrd", str(initrd)]
    assert run(arguments) == ExitCode.BAD_INPUT_FILE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(document.kernel.build_id) in captured.err
    assert "00" * 20 in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--limit", "-1"], ["--format", "sarif"], ["--module-version", "9.9"]]
)
def test_what_makes_no_sense(arguments, capsys):
    assert run(["verify", str(build(())), *arguments]) == ExitCode.USAGE
    assert capsys.readouterr().err.count("\n") == 1
