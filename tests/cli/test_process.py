"""The program as a process: closed descriptors, Ctrl-C at any moment, too little of all."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

import tiny_kernel
from trapline.base.errors import ExitCode

PROGRAM = [sys.executable, "-c", "from trapline.cli.start import main; main()"]


@pytest.fixture(scope="module")
def vmlinux(tmp_path_factory):
    return tiny_kernel.build_vmlinux(tmp_path_factory.mktemp("kernel"))


def shell(redirection, *arguments):
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_closed_standard_output(vmlinux, tmp_path):
    done = shell(">&-", "scan", vmlinux)
    assert (done.returncode, done.stderr) == (
        ExitCode.OUTPUT_FAILED,
        "trapline: standard output is closed; open it, or give -o a file.\n",
    )
    done = shell(">&-", "scan", vmlinux, "-o", tmp_path / "out")
    assert done.returncode == ExitCode.FINDINGS
    assert (tmp_path / "out").stat().st_size
    assert shell(">&-", "--help").returncode == ExitCode.CLEAN


@pytest.mark.parametrize("redirection", ["2>&-", "<&-", "<&- 2>&-"])
def test_other_closed_descriptors(vmlinux, redirection):
    done, sound = shell(redirection, "scan", vmlinux), shell("", "scan", vmlinux)
    assert (done.returncode, done.stdout) == (ExitCode.FINDINGS, sound.stdout)
    assert shell(redirection, "scan", "/nowhere").returncode == ExitCode.KERNEL_NOT_FOUND


def test_all_closed(vmlinux, tmp_path):
    done = shell("<&- >&- 2>&-", "scan", vmlinux, "-o", tmp_path / "out")
    assert done.returncode == ExitCode.FINDINGS
    assert (tmp_path / "out").read_text().startswith("trapline ")


def limited(kind, value, *arguments):
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        preexec_fn=lambda: resource.setrlimit(kind, (value, value)),
        capture_output=True,
        text=True,
        check=False,
    )


def test_too_few_files(vmlinux):
    done = limited(resource.RLIMIT_NOFILE, 6, "scan", vmlinux)
    assert done.returncode == ExitCode.OUT_OF_RESOURCES == 30
    (line,) = done.stderr.splitlines()
    assert line.startswith("trapline: there are too many open files; this process may have 6 (")


def test_too_little_memory(tmp_path):
    """For a file that is mapped whole: it is sparse, and its size is all that counts."""
    path = tmp_path / "vmlinux"
    with path.open("wb") as stream:
        stream.truncate(4 << 30)
    done = limited(resource.RLIMIT_AS, 1 << 30, "scan", path)
    assert done.returncode == ExitCode.OUT_OF_RESOURCES
    assert "there is not enough memory: this process may have 1,024 MiB (ulimit -v)" in done.stderr


def test_ctrl_c_at_any_moment_is_quiet(vmlinux):
    """From the first moment that is ours on; Python itself starts before it."""
    chance = random.Random(7)
    program = "import os; os.write(1, b'.'); from trapline.cli.start import main; main()"
    for _ in range(12):
        with subprocess.Popen(
            [sys.executable, "-c", program, "scan", vmlinux, "-o", "/dev/null"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        ) as process:
            assert process.stdout.read(1) == "."
            time.sleep(chance.uniform(0.05, 1.5))
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert process.returncode in {ExitCode.INTERRUPTED, ExitCode.FINDINGS}
        lines = filter(None, errors.splitlines())  # what a terminal shows of ^C ends with a line
        said = [line for line in lines if not line.startswith("trapline: scanned")]
        assert said in ([], ["trapline: interrupted; nothing was written."]), errors
