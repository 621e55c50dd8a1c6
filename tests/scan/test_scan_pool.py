"""Processes of a scan: a death, and what the others make of it."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

import tiny_kernel
from trapline.allowlist.listfile import load
from trapline.base.errors import BadImageError, ResourceError, WorkersLostError
from trapline.kernel.find.kernelfiles import KernelFiles, ModuleFile
from trapline.scan import pool
from trapline.scan.wholekernel import scan

# Inlined functions nested a million deep: more than a native stack holds.
_NESTED = """
    .text
    .globl f
    .type f, @function
    f: hlt
    1:
    .size f, 1b - f
    .section .debug_str,"MS",@progbits,1
    0: .asciz "readl"
    .section .debug_abbrev
    .uleb128 1; .uleb128 0x11; .byte 1; .uleb128 0x11, 0x01; .uleb128 0x12, 0x07; .byte 0, 0
    .uleb128 2; .uleb128 0x2e; .byte 1; .uleb128 0x11, 0x01; .uleb128 0x12, 0x07; .byte 0, 0
    .uleb128 3; .uleb128 0x1d; .byte 1; .uleb128 0x11, 0x01; .uleb128 0x12, 0x07
    .uleb128 0x31, 0x13; .byte 0, 0
    .byte 0
    .section .debug_info
    2: .long 4f - 3f
    3: .value 4; .long .debug_abbrev; .byte 8
    .uleb128 1; .quad f; .quad 1
    5: .uleb128 2; .quad f; .quad 1
    .rept 1000000
    .uleb128 3; .quad f; .quad 1; .long 5b - 2b
    .endr
    .byte 0
    4:
"""


def module(path):
    return ModuleFile(path.name.partition(".")[0], path, path, f"kernel/drivers/{path.name}")


@pytest.fixture(scope="module")
def deadly(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deadly")
    (folder / "deadly.S").write_text(_NESTED)
    tiny_kernel.run(folder, "gcc", "-c", "-o", "deadly.o", "deadly.S")
    tiny_kernel.run(folder, "ld", "-r", "-o", "deadly.ko", "deadly.o")
    return folder / "deadly.ko"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    vmlinux = tiny_kernel.build_vmlinux(folder)
    return vmlinux, tiny_kernel.build_module(folder, "demo", ["drivers/demo/demo.c"])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_dies_costs_one_module(kernel, deadly, workers):
    vmlinux, demo = kernel
    files = KernelFiles("6.12.0", vmlinux, None, (module(deadly), module(demo)))
    result = scan(files, load(), workers=workers)
    (text,) = result.coverage.missing
    assert text.startswith("Module deadly was not scanned: the process that scanned it ")
    assert "SIG" in text
    assert {site.module for site in result.sites} == {"vmlinux", "demo"}


def test_a_process_that_dies_of_vmlinux_is_an_error(tmp_path, deadly):
    tiny_kernel.run(tmp_path, "ld", "-e", "0", "-Ttext=0xffffffff81000000", deadly, "-o", "vmlinux")
    with pytest.raises(BadImageError, match="vmlinux could not be scanned: the process"):
        scan(KernelFiles("6.12.0", tmp_path / "vmlinux", None), load())


def test_a_process_that_is_killed_is_replaced(kernel):
    """Unlike a crash, this is no fault of the module's."""
    vmlinux, demo = kernel
    files = KernelFiles("6.12.0", vmlinux, None, (module(demo),))
    before = set(multiprocessing.active_children())
    left = [1]

    def kill(*_):
        if left:
            left.pop()
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
                process.join()

    assert scan(files, load(), kill, workers=2) == scan(files, load(), workers=2)
    assert not left


def test_processes_that_are_killed_again_and_again_are_given_up(kernel, monkeypatch):
    vmlinux, _ = kernel
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(pool, "_Scanner", Killed)
    with pytest.raises(WorkersLostError, match=r"keep dying at vmlinux \(the last one was killed"):
        scan(KernelFiles("6.12.0", vmlinux, None), load())


def test_an_abort_under_a_limit_of_memory_is_no_fault_of_the_module(kernel, monkeypatch):
    vmlinux, demo = kernel
    monkeypatch.setattr(pool, "_Scanner", Aborting)
    files = KernelFiles("6.12.0", vmlinux, None, (module(demo),))
    monkeypatch.setattr(pool, "is_memory_limited", lambda: True)
    with pytest.raises(ResourceError, match="there is not enough memory"):
        scan(files, load())
    monkeypatch.setattr(pool, "is_memory_limited", lambda: False)
    with pytest.raises(BadImageError, match="died of SIGABRT"):
        scan(files, load())


class Aborting:
    def __init__(self, context):
        del context

    def __call__(self, _):
        os.kill(os.getpid(), signal.SIGABRT)


class Killed:
    def __init__(self, context):
        del context

    def __call__(self, _):
        os.kill(os.getpid(), signal.SIGKILL)
