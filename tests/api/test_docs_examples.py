"""The examples of docs/api.md run, one after the other, as a reader would paste them."""

import re
from pathlib import Path

import pytest

import guests
import tiny_kernel
import trapline
from trapline.machine.loader import initramfs

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
_FENCE = re.compile(r"(<!-- needs a Debian kernel -->\n)?```python\n(.*?)```\n", re.DOTALL)
_SCENARIO = """
title = "a system call"
[start]
syscall = 39
nth = 4
[[inject]]
event = "nmi"
"""


def examples(*, debian):
    return [code for mark, code in _FENCE.findall(PAGE.read_text("utf-8")) if bool(mark) == debian]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of a reader who has built a kernel and a guest."""
    (tmp_path / "build").mkdir()
    tiny_kernel.build_vmlinux(tmp_path / "build")
    (tmp_path / "guest").mkdir()
    (tmp_path / "guest" / "vmlinux").symlink_to(guests.build(("VE_ON_IST", "TRAP")))
    (tmp_path / "guest" / "initrd.img").write_bytes(initramfs.newc([]))
    (tmp_path / "guest" / "getpid.toml").write_text(_SCENARIO)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_example_runs(place, capsys):
    names = {}
    for code in examples(debian=False):
        exec(compile(code, str(PAGE), "exec"), names)
    out = capsys.readouterr().out
    assert "scanned: 1 of 1\n" in out
    assert f"{len(names['result'].sites)} places may trap to the host\n" in out
    assert names["result"].sites
    assert len((place / "sites.csv").read_text().splitlines()) == 1 + len(names["result"].sites)
    assert "error " in out
    assert "powered-off {'cpuid': " in out
    assert names["run"].screams
    assert names["campaign"].injected == 3
    assert "no/such/kernel: no such file or folder" in out
    assert "KERNEL_NOT_FOUND" in out


@pytest.mark.kernel
def test_the_example_on_a_debian_kernel(debian_kernel_name, capsys):
    (code,) = examples(debian=True)
    assert debian_kernel_name in code
    exec(compile(code, str(PAGE), "exec"), {"trapline": trapline})
    assert "verified: " in capsys.readouterr().out


@pytest.mark.parametrize("name", [n for n in trapline.__all__ if n[0].islower()])
def test_every_function_is_on_the_page(name):
    assert f"trapline.{name}" in PAGE.read_text("utf-8") or f"`{name}`" in PAGE.read_text("utf-8")
