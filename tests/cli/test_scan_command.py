"""`trapline scan` as a user runs it: formats, exit codes, and every way it can go wrong."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import pytest

import tiny_kernel
from trapline.base.errors import ExitCode
from trapline.cli.main import run
from trapline.report.schemas import render

PROGRAM = [sys.executable, "-c", "from trapline.cli.start import main; main()"]


@pytest.fixture(scope="module")
def vmlinux(tmp_path_factory):
    """A kernel whose HLT and port I/O the #VE handler emulates, but not its string moves."""
    return tiny_kernel.build_vmlinux(tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module")
def mended(tmp_path_factory):
    """The same without the string moves and without the driver."""
    folder = tmp_path_factory.mktemp("mended")
    gone = ("arch/x86/lib/iomem.c", "drivers/demo/demo.c", "drivers/demo/spill.c")
    return tiny_kernel.build_vmlinux(folder, dict.fromkeys(gone))


def fails(capsys, code, arguments, says):
    """Check that a command line fails as it should: one sentence, the right code, no traceback."""
    assert run(arguments) == code
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not line.startswith("trapline: scan")]
    assert captured.out == ""
    assert len(errors) == 1
    assert errors[0].startswith("trapline: ")
    assert errors[0].endswith((".", ")"))
    assert says in errors[0]
    assert "Traceback" not in captured.err


def test_text_is_the_default_and_findings_exit_with_1(vmlinux, capfdbinary):
    assert run(["scan", str(vmlinux)]) == ExitCode.FINDINGS
    captured = capfdbinary.readouterr()
    assert b"How many places do those 8 drivers touch MMIO?" in captured.out
    assert b"\x1b" not in captured.out + captured.err
    assert max(map(len, captured.out.splitlines())) <= 80
    assert captured.err.splitlines()[-1].startswith(b"trapline: scanned: 1 of 1")


def test_a_kernel_without_findings_exits_with_0(mended, capfdbinary):
    assert run(["scan", str(mended)]) == ExitCode.CLEAN
    assert b"Policy: nothing found against it." in capfdbinary.readouterr().out


def test_json_validates_against_the_published_schema(vmlinux, tmp_path):
    path = tmp_path / "result.json"
    code = run(["scan", str(vmlinux), "--format", "json", "-o", str(path), "--workers", "1"])
    assert code == ExitCode.FINDINGS
    jsonschema.validate(json.loads(path.read_bytes()), json.loads(render("scan")))


def test_json_lines_validate_one_by_one(vmlinux, capfdbinary):
    run(["scan", str(vmlinux), "--format", "jsonl"])
    lines = jsonschema.Draft202012Validator(json.loads(render("scan-lines")))
    documents = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert documents[0]["schema"] == "trapline/scan"
    for document in documents:
        lines.validate(document)


def test_sarif_has_a_result_for_each_site(vmlinux, tmp_path):
    sarif, document = tmp_path / "r.sarif", tmp_path / "r.json"
    run(["scan", str(vmlinux), "--format", "sarif", "-o", str(sarif)])
    run(["scan", str(vmlinux), "--format", "json", "-o", str(document)])
    results = json.loads(sarif.read_bytes())["runs"][0]["results"]
    whole = json.loads(document.read_bytes())
    fingerprints = {result["partialFingerprints"]["trapline/v2"] for result in results}
    assert {site["id"] for site in whole["sites"]} <= fingerprints


def test_v_lists_sites_and_vv_their_instructions(vmlinux, capfdbinary):
    outputs = []
    for flags in ([], ["-v"], ["-vv"]):
        run(["scan", str(vmlinux), *flags])
        outputs.append(capfdbinary.readouterr().out)
    assert [b"drivers/demo/demo.c:" in out for out in outputs] == [False, True, True]
    assert [b"inlined kick drivers/demo/demo.c" in out for out in outputs] == [False, True, True]
    assert [b"0fa2  cpuid" in out for out in outputs] == [False, False, True]


def test_modules_come_from_the_folder_that_is_named(vmlinux, tmp_path, capfdbinary):
    tiny_kernel.build_module(tmp_path / "ko", "demo", ["drivers/demo/demo.c"])
    code = run(["scan", str(vmlinux), "--modules", str(tmp_path / "ko"), "--format", "json"])
    assert code == ExitCode.FINDINGS
    document = json.loads(capfdbinary.readouterr().out)
    assert document["kernel"]["modules"] == 1
    assert {site["module"] for site in document["sites"]} == {"vmlinux", "demo"}


def test_no_kernel(capsys, tmp_path):
    missing = str(tmp_path / "vmlinux")
    fails(capsys, ExitCode.KERNEL_NOT_FOUND, ["scan", missing], missing)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a kernel",
        b"\x7fELF",
        b"\x7fELF" + bytes(60),
        b"\x7fELF\x02\x01\x01" + b"\xff" * 99,
    ],
)
def test_a_file_that_is_no_kernel(capsys, tmp_path, content):
    path = tmp_path / "vmlinux"
    path.write_bytes(content)
    fails(capsys, ExitCode.BAD_IMAGE, ["scan", str(path)], str(path))


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_truncated_kernel(capsys, tmp_path, vmlinux, keep):
    whole = vmlinux.read_bytes()
    path = tmp_path / "vmlinux"
    path.write_bytes(whole[: int(len(whole) * keep)])
    fails(capsys, ExitCode.BAD_IMAGE, ["scan", str(path)], str(path))


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


def test_a_kernel_that_may_not_be_read(capsys, vmlinux):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        path = folder / "vmlinux"
        path.write_bytes(vmlinux.read_bytes())
        path.chmod(0o000)
        with without_privileges():
            code = run(["scan", str(path)])
    error = capsys.readouterr().err
    assert code in {ExitCode.BAD_IMAGE, ExitCode.KERNEL_NOT_FOUND}
    assert error.count("\n") == 1
    assert "ermission denied" in error


def test_an_allow_list_that_is_not_there(capsys, vmlinux, tmp_path):
    missing = str(tmp_path / "list.toml")
    arguments = ["scan", str(vmlinux), "--allow", missing]
    fails(capsys, ExitCode.BAD_INPUT_FILE, arguments, missing)


def test_a_module_folder_that_is_not_there(capsys, vmlinux, tmp_path):
    missing = str(tmp_path / "modules")
    arguments = ["scan", str(vmlinux), "--modules", missing]
    fails(capsys, ExitCode.KERNEL_NOT_FOUND, arguments, missing)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["scan"], "KERNEL"),
        (["scan", "vmlinux", "--bogus"], "--bogus"),
        (["scan", "vmlinux", "--format", "pdf"], "pdf"),
        (["scan", "vmlinux", "--workers", "0"], "--workers"),
        (["bogus"], "bogus"),
    ],
)
def test_wrong_usage(capsys, arguments, says):
    fails(capsys, ExitCode.USAGE, arguments, says)


def test_an_output_folder_that_is_not_there_is_said_before_the_scan(capsys, vmlinux, tmp_path):
    path = str(tmp_path / "none" / "report.txt")
    assert run(["scan", str(vmlinux), "-o", path]) == ExitCode.OUTPUT_FAILED
    error = capsys.readouterr().err
    assert "there is no folder" in error
    assert "scanned" not in error


def test_a_full_device_as_output_file(capsys, vmlinux):
    arguments = ["scan", str(vmlinux), "-o", "/dev/full"]
    fails(capsys, ExitCode.OUTPUT_FAILED, arguments, "no space left on device")


def test_a_full_device_as_standard_output(vmlinux):
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*PROGRAM, "scan", str(vmlinux)], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == ExitCode.OUTPUT_FAILED
    assert done.stderr.splitlines()[-1] == (
        b"trapline: standard output cannot be written: no space left on device."
    )


def test_a_reader_that_goes_away_is_no_error(vmlinux):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*PROGRAM, "scan", str(vmlinux), "-vv"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert done.returncode == ExitCode.FINDINGS
    assert done.stderr == b"trapline: scanned: 1 of 1\n"


@pytest.mark.parametrize("form", ["text", "json", "jsonl", "sarif", "csv"])
def test_a_module_whose_name_is_not_utf8_and_breaks_lines(tmp_path, form):
    built = tiny_kernel.build_module(tmp_path, "demo", ["drivers/demo/demo.c"])
    module = built.with_name(os.fsdecode(b"caf\xe9\n\x1b[31m.ko"))
    built.rename(module)
    done = subprocess.run(
        [*PROGRAM, "scan", module, "-v", "--format", form], capture_output=True, check=False
    )
    assert done.returncode == ExitCode.INCOMPLETE  # for there is no vmlinux
    assert b"caf\\" in done.stdout
    done.stdout.decode()
    for line in (done.stdout + done.stderr).splitlines():
        assert line.decode().isprintable()
    done = subprocess.run(
        [*PROGRAM, "scan", f"{module}.gone"], capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitCode.KERNEL_NOT_FOUND
    (line,) = done.stderr.splitlines()
    assert line.isprintable()


def interrupted(arguments, mark, interrupt=lambda process: os.killpg(process.pid, signal.SIGINT)):
    """Run until a line with `mark` is said, press Ctrl-C, and give exit code and last line."""
    process = subprocess.Popen(
        [*PROGRAM, *arguments], stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if mark in line:
            interrupt(process)
            break
    lines += process.stderr.readlines()  # ends when no worker holds the other end any more
    code = process.wait()
    process.stderr.close()
    return code, lines[-1]


def test_control_c_while_writing_leaves_nothing(vmlinux, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # no one reads: writing waits
    code, last = interrupted(["scan", str(vmlinux), "-o", str(pipe)], "scanned: 1 of 1")
    assert code == ExitCode.INTERRUPTED
    assert last == "trapline: interrupted; nothing was written.\n"
    assert list(tmp_path.iterdir()) == [pipe]


def test_sigterm_while_writing_leaves_nothing(vmlinux, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    arguments = ["scan", str(vmlinux), "-o", str(pipe)]
    code, last = interrupted(arguments, "scanned: 1 of 1", subprocess.Popen.terminate)
    assert code == ExitCode.TERMINATED
    assert last == "trapline: terminated; nothing was written.\n"
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.kernel
def test_control_c_in_the_middle_of_a_scan(debian_kernel, tmp_path):
    output = tmp_path / "report.txt"
    arguments = ["scan", str(debian_kernel.vmlinux), "-o", str(output)]
    code, last = interrupted(arguments, "scanned: ")
    assert code == ExitCode.INTERRUPTED
    assert last == "trapline: interrupted; nothing was written.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("no_color", [False, True])
def test_progress_on_a_terminal_is_a_bar(vmlinux, tmp_path, no_color):
    terminal, other_end = pty.openpty()
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    done = subprocess.run(
        [*PROGRAM, "scan", str(vmlinux), "-o", str(tmp_path / "report.txt")],
        stderr=other_end,
        env=plain | {"TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if no_color else {}),
        check=False,
    )
    shown = os.read(terminal, 1 << 16)
    os.close(other_end)
    os.close(terminal)
    assert done.returncode == ExitCode.FINDINGS
    assert b"1/1" in shown
    assert (re.search(rb"\x1b\[[39][0-7]m", shown) is None) == no_color
    assert b"\x1b" not in (tmp_path / "report.txt").read_bytes()


def test_an_internal_error_is_one_line_too(capsys, monkeypatch, vmlinux):
    def broken(*_, **__):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("trapline.api.kernel.locate", broken)
    fails(capsys, ExitCode.INTERNAL, ["scan", str(vmlinux)], "ZeroDivisionError")


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_library_makes_of_ctrl_c_is_no_internal_error(capsys, monkeypatch, vmlinux, kept):
    def broken(*_, **__):
        try:
            raise KeyboardInterrupt if kept else ValueError
        except (KeyboardInterrupt, ValueError):
            raise SystemError("a callback returned with an exception set") from None

    monkeypatch.setattr("trapline.api.kernel.locate", broken)
    expected = (ExitCode.INTERRUPTED, "interrupted") if kept else (ExitCode.INTERNAL, "callback")
    fails(capsys, expected[0], ["scan", str(vmlinux)], expected[1])
