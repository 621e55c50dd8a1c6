"""Processes of a scan: a death, an interrupt, and what the others make of it."""

import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import tiny_kernel
from trapline.allowlist.listfile import load
from trapline.base.errors import BadImageError
from trapline.kernel.find.files import KernelFiles, ModuleFile
from trapline.linux import ve_handler
from trapline.scan.kernelfacts import ScanContext
from trapline.scan.pool import Pool
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


def children(process):
    listing = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
    return [int(child) for child in listing.split()]


def test_ctrl_c_does_not_reach_a_process_that_starts():
    context = ScanContext(paravirt={}, handler=ve_handler.UPSTREAM)
    with Pool(context, 2) as pool:
        for process, _ in pool._workers:
            # From the first moment on: it has not even loaded Python.
            status = Path(f"/proc/{process.pid}/status").read_text()
            masks = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            kept_off = int(masks["SigBlk"], 16) | int(masks["SigIgn"], 16)
            assert kept_off >> (signal.SIGINT - 1) & 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_ctrl_c_ends_all_processes_without_a_traceback(kernel, tmp_path):
    vmlinux, _ = kernel
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
            import sys
            from pathlib import Path
            from trapline.allowlist.listfile import load
            from trapline.kernel.find.files import KernelFiles
            from trapline.scan import wholekernel

            def progress(done, total):
                print("started", flush=True)
                sys.stdin.read()  # until the interrupt

            if __name__ == "__main__":
                kernel = KernelFiles("6.12.0", Path({str(vmlinux)!r}), None)
                try:
                    wholekernel.scan(kernel, load(), progress, workers=2)
                except KeyboardInterrupt:
                    sys.exit(130)
        """)
    )
    process = subprocess.Popen(
        [sys.executable, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline() == b"started\n"
    workers = [os.pidfd_open(pid) for pid in children(process.pid)]
    assert workers
    # To the whole group, as a terminal does.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""
    for worker in workers:
        # Readable once the process has ended.
        assert select.select([worker], [], [], 60)[0]
        os.close(worker)
