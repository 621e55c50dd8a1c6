"""MSRs that a kernel names in front of its sites are tried."""

import pytest

import tiny_kernel
from trapline.allowlist.listfile import load
from trapline.kernel.find.kernelfiles import KernelFiles
from trapline.rules import tables
from trapline.scan.wholekernel import scan
from trapline.verify.cases import Subjects, first_round, second_round
from trapline.verify.named import msrs_of

_SOURCE = """
    static inline void wrmsr(unsigned int number, unsigned long value) {
        asm volatile("wrmsr" : : "c" (number), "a" (value), "d" (value >> 32)); }
    void one(unsigned long v) { wrmsr(0x1234, v); }
    void two(unsigned long v) { wrmsr(0x4b564d07, v); wrmsr(0xc0011029, v); }
    void chosen(unsigned int number, unsigned long v) { wrmsr(number, v); }
    void no_msr(unsigned long v) { wrmsr(0x12345678, v); }
"""


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    path = tiny_kernel.build_vmlinux(tmp_path_factory.mktemp("named"), {"kernel/one.c": _SOURCE})
    found = scan(KernelFiles("6.12.0", path, None, ()), load(), workers=1)
    return msrs_of(found, path)


def test_constants_in_front_of_sites_are_found(numbers):
    assert {0x1234, 0x4B564D07, 0xC0011029} <= set(numbers)
    assert 0x12345678 not in numbers


def test_each_is_tried_by_both_instructions(numbers):
    forms, _ = first_round()
    pinned = {
        (case.code, case.pinned[0][1])
        for case in second_round(forms, frozenset(), Subjects.of(tables.load(), numbers))
        if case.trap == "msr" and case.pinned
    }
    for number in numbers:
        assert {(b"\x0f\x30", number), (b"\x0f\x32", number)} <= pinned
    assert (b"\x0f\x30", 0x1234) not in {
        (case.code, case.pinned[0][1])
        for case in second_round(forms, frozenset(), Subjects.of(tables.load()))
        if case.trap == "msr" and case.pinned
    }
