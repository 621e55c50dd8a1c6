"""`trapline boot` where it does not get to boot: one sentence and the right code."""

import pytest

import tiny_kernel
from trapline.base.errors import ExitCode
from trapline.cli.main import run


@pytest.fixture(scope="module")
def vmlinux(tmp_path_factory):
    """A kernel without TDX support."""
    return tiny_kernel.build_vmlinux(tmp_path_factory.mktemp("kernel"))


@pytest.fixture
def fails(capsys):
    def check(code, says, *arguments):
        assert run(["boot", *map(str, arguments)]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("trapline: ")
        assert says in line

    return check


def test_a_kernel_without_tdx_support(fails, vmlinux):
    fails(ExitCode.NOT_A_TDX_KERNEL, "CONFIG_INTEL_TDX_GUEST", vmlinux)


def test_no_kernel(fails, tmp_path):
    fails(ExitCode.KERNEL_NOT_FOUND, "no such file", tmp_path / "nothing")


def test_not_a_kernel(fails, tmp_path):
    path = tmp_path / "kernel"
    path.write_bytes(b"text")
    fails(ExitCode.BAD_IMAGE, "kernel", path)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--memory", "lots", "is no size"),
        ("--module-version", "9.9", "9.9"),
        ("--device", "floppy", "floppy"),
        ("--timeout", "0", "'0' is not between"),
        ("--timeout", "-1", "is not between"),
        ("--timeout", "nan", "is not between"),
        ("--timeout", "inf", "is not between"),
        ("--timeout", "1e12", "is not between"),
        ("--timeout", "soon", "is no number of seconds"),
        ("--format", "pdf", "pdf"),
        ("--allow-mode", "report", "name it with --allow"),
        ("--on-forbidden", "panic", "--policy CLASS=forbid"),
    ],
)
def test_wrong_usage(fails, vmlinux, option, value, says):
    fails(ExitCode.USAGE, says, vmlinux, option, value)


def test_a_scan_that_is_none(fails, vmlinux, tmp_path):
    path = tmp_path / "scan.json"
    path.write_text("{}")
    fails(ExitCode.BAD_INPUT_FILE, "is not the result of", vmlinux, "--scan", path)
    fails(ExitCode.BAD_INPUT_FILE, "cannot be read", vmlinux, "--scan", tmp_path / "none")


def test_an_output_that_cannot_be_written(fails, vmlinux, tmp_path):
    fails(ExitCode.OUTPUT_FAILED, "", vmlinux, "-o", tmp_path / "no" / "folder")
