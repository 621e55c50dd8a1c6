"""`trapline filter` as a user runs it."""

import json

import jsonschema
import pytest

import tiny_kernel
from trapline.allowlist import listfile
from trapline.base.errors import ExitCode
from trapline.cli.main import run


def test_show_prints_the_eight_ids(capsysbinary):
    assert run(["filter", "show"]) == ExitCode.CLEAN
    out = capsysbinary.readouterr().out.decode()
    for entry in listfile.load().entries:
        assert entry.id in out


def test_show_as_json_is_a_list_itself(capsysbinary, tmp_path):
    path = tmp_path / "list.json"
    assert run(["filter", "show", "--format", "json", "-o", str(path)]) == ExitCode.CLEAN
    assert capsysbinary.readouterr().out == b""
    jsonschema.validate(json.loads(path.read_bytes()), listfile.schema())
    assert len(json.loads(path.read_bytes())["allow"]) == 8


def test_an_empty_list_says_what_it_means(capsysbinary, tmp_path):
    empty = tmp_path / "empty.toml"
    empty.write_text('schema = "trapline/allow-list"\nversion = 1\ntitle = "nobody"\nallow = []\n')
    assert run(["filter", "show", "--allow", str(empty)]) == ExitCode.CLEAN
    out = capsysbinary.readouterr().out
    assert b"The list is empty: it lets in no device, on any bus." in out
    assert run(["filter", "show"]) == ExitCode.CLEAN
    assert b"The list is empty" not in capsysbinary.readouterr().out


def test_a_bad_list_is_one_line_and_a_number(capsys, tmp_path):
    path = tmp_path / "list.toml"
    path.write_text("schema = 'trapline/allow-list'\nversion = 1\ntitle = 'x'\nallow = [1]")
    for command in (["show"], ["check", str(tmp_path / "vmlinux")]):
        code = run(["filter", *command, "--allow", str(path)])
        captured = capsys.readouterr()
        assert code == ExitCode.BAD_INPUT_FILE
        assert captured.err == f"trapline: {path}: entry 1: expected `object`, got `int`.\n"


def test_a_kernel_that_is_not_there(capsys, tmp_path):
    code = run(["filter", "check", str(tmp_path / "vmlinux")])
    assert code == ExitCode.KERNEL_NOT_FOUND
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("debug", ["-g", "-g0"])
def test_export_needs_debug_information_to_name_drivers(debug, capsys, tmp_path):
    """Without it a listed virtio device's own driver would be kept from loading."""
    vmlinux = tiny_kernel.build_vmlinux(tmp_path, None, debug)
    folder = tmp_path / "out"
    code = run(["filter", "export", str(folder), "--kernel", str(vmlinux), "--workers", "1"])
    words = capsys.readouterr().err
    if debug == "-g":
        assert code == ExitCode.CLEAN
        assert (folder / "kernel-command-line").exists()
    else:
        assert code == ExitCode.NO_DEBUG_INFO
        assert "without debug information" in words.splitlines()[-1]
        assert not folder.exists()


@pytest.mark.parametrize("debug", ["-g", "-g0"])
def test_check_finds_nothing_rather_than_no_fault_without_debug_information(
    debug, capsys, tmp_path
):
    vmlinux = tiny_kernel.build_vmlinux(tmp_path, None, debug)
    code = run(["filter", "check", str(vmlinux), "--workers", "1"])
    captured = capsys.readouterr()
    if debug == "-g":
        assert code in {ExitCode.CLEAN, ExitCode.FINDINGS}
        assert "Policy:" in captured.out
    else:
        assert code == ExitCode.NO_DEBUG_INFO
        assert captured.out == ""


@pytest.mark.parametrize("arguments", [["filter"], ["filter", "-h"], ["filter", "check", "-h"]])
def test_help(arguments, capsys):
    assert run(arguments) in {ExitCode.CLEAN, ExitCode.USAGE}
    captured = capsys.readouterr()
    assert "allow list" in captured.out + captured.err
