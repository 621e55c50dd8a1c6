"""What is code of a kernel, and what a section only calls code."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_kernel
from trapline.allowlist.listfile import load
from trapline.base.errors import ExitCode
from trapline.kernel.codespans import CodeSpans
from trapline.kernel.find.kernelfiles import KernelFiles, ModuleFile
from trapline.report.records import SCAN
from trapline.results.findings import exit_code
from trapline.scan.wholekernel import scan

# As arch/x86/kernel/relocate_kernel_64.S has it since v6.14: code in .data, which makes all of
# .data executable by the section's flags. "\xee" is OUT, "\xf4" HLT, "\x0f\x30" WRMSR.
_CODE_IN_DATA = """
    .section .data..more, "awx", @progbits
    .globl table
    .type table, @object
    table: .fill 64, 1, 0xee
        .byte 0xf4, 0x0f, 0x30
    .size table, . - table
    label: .fill 16, 1, 0xf4
    .globl relocate
    relocate: mov %rax, %cr4
        ret
    .size relocate, . - relocate
"""
_PATTERNS = 64 + 2 + 16


def kernel(vmlinux, *modules):
    return KernelFiles("6.12.0", vmlinux, None, modules)


@pytest.fixture(scope="module")
def vmlinux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    return tiny_kernel.build_vmlinux(folder, {"arch/x86/kernel/relocate.S": _CODE_IN_DATA})


def strip(folder, vmlinux, *options):
    bare = folder / "vmlinux"
    tiny_kernel.run(folder, "objcopy", *options, vmlinux, bare)
    return bare


@pytest.mark.parametrize("options", [[], ["--strip-debug"]])
def test_data_that_are_flagged_as_code_are_no_sites_but_code_among_them_is(
    tmp_path, vmlinux, options
):
    found = scan(kernel(strip(tmp_path, vmlinux, *options)), load(), workers=1)
    assert [(s.function, s.trap) for s in found.sites if s.section == ".data..more"] == [
        ("relocate", "cr")
    ]
    (outside,) = found.coverage.outside
    assert (outside.section, outside.writable, outside.patterns) == (".data..more", True, _PATTERNS)
    assert outside.size >= _PATTERNS
    said = " ".join("".join(part.decode() for part in SCAN.render(found, "text")).split())
    assert f"{_PATTERNS} patterns in .data..more" in said
    assert "writable and executable" in said


def test_a_kernel_without_such_data_says_nothing(tmp_path):
    found = scan(kernel(tiny_kernel.build_vmlinux(tmp_path)), load(), workers=1)
    assert found.coverage.outside == ()


def test_without_symbols_a_writable_section_is_not_believed(tmp_path, vmlinux):
    found = scan(kernel(strip(tmp_path, vmlinux, "--strip-all")), load(), workers=1)
    assert {site.section for site in found.sites} >= {".text", ".altinstr_replacement"}
    assert ".data..more" not in {site.section for site in found.sites}
    (outside,) = found.coverage.outside
    assert outside.patterns == _PATTERNS + 1


def test_a_vmlinux_without_its_code_is_no_clean_kernel(tmp_path, vmlinux):
    found = scan(kernel(strip(tmp_path, vmlinux, "--only-keep-debug")), load(), workers=1)
    assert found.sites == ()
    assert not found.coverage.complete
    assert found.coverage.missing[0].startswith("vmlinux has no code")
    assert exit_code(found) == ExitCode.INCOMPLETE
    lines = b"".join(SCAN.render(found, "text")).splitlines()
    assert any(line.startswith(b"INCOMPLETE") for line in lines[:6])


def test_a_module_without_its_code_is_named(tmp_path, vmlinux):
    whole = tiny_kernel.build_module(tmp_path, "demo", ["drivers/demo/demo.c"])
    hollow = tmp_path / "hollow.ko"
    tiny_kernel.run(tmp_path, "objcopy", "--only-keep-debug", whole, hollow)
    modules = [ModuleFile(p.stem, p, p, f"kernel/drivers/{p.name}") for p in (whole, hollow)]
    found = scan(kernel(vmlinux, modules[0]), load(), workers=1)
    assert found.coverage.complete
    found = scan(kernel(vmlinux, *modules), load(), workers=1)
    assert found.coverage.missing == (
        "hollow is without code, in files of debug information only.",
    )


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), max_size=20))
def test_unions_hold_what_their_parts_hold(parts):
    pairs = [
        (np.array([start], np.uint64), np.array([start + size], np.uint64)) for start, size in parts
    ]
    spans = CodeSpans.union(pairs)
    inside = {at for start, size in parts for at in range(start, start + size)}
    held = spans.hold(np.arange(400, dtype=np.uint64))
    assert {int(at) for at in np.flatnonzero(held)} == inside
    assert spans.size_within(50, 200) == len({at for at in inside if 50 <= at < 200})
    assert np.all(spans.starts[1:] > spans.ends[:-1])
