"""CPUID against the table, and the processor that a TD is shown."""

import pytest

from trapline.cpu.engine import Exit, Reg
from trapline.rules.rows import CpuidKind, CpuidOutcome
from trapline.rules.tables import load
from trapline.tdx.vmm_interface import ExitReason

VE = ("fault", 20, None)
LEAVES = [r for r in load("1.5.01").cpuid if r.followed and r.kind == CpuidKind.LEAF]


def cpuid(td, leaf, subleaf=0):
    """The four registers, or None for #VE."""
    events = td.take(Exit.CPUID, rax=leaf, rcx=subleaf)
    if events:
        assert events == [VE]
        assert td.module.ve_info.reason == ExitReason.CPUID
        td.call(3)
        return None
    return tuple(td.regs[r] for r in (Reg.RAX, Reg.RBX, Reg.RCX, Reg.RDX))


@pytest.mark.parametrize("row", LEAVES, ids=lambda row: row.id)
def test_every_row(td, row):
    for leaf in {row.first, row.last}:
        answer = cpuid(td, leaf, row.subleaf or 0)
        assert (answer is None) == (row.outcome == CpuidOutcome.VE)


@pytest.mark.parametrize(
    ("leaf", "subleaf"),
    [(4, 5), (7, 3), (0xD, 0x13), (0x14, 2), (0x1D, 2), (0x21, 1), (0x23, 4), (0x80000005, 0)],
)
def test_what_is_not_listed_is_ve(td, leaf, subleaf):
    assert cpuid(td, leaf, subleaf) is None


@pytest.mark.parametrize("leaf", [0x24, 0x100, 0x3FFFFFFF, 0x50000000, 0x80000009, 0xC0000000])
def test_a_leaf_above_the_maximum_is_the_last_one(td, leaf):
    assert cpuid(td, leaf, 0) == cpuid(td, 0x23, 0)
    assert cpuid(td, leaf, 4) is None


def test_hypervisor_leaves_are_never_clamped(td):
    assert cpuid(td, 0x40000000) is None
    assert cpuid(td, 0x4FFFFFFF) is None


def test_upper_halves_are_ignored_and_cleared(td):
    td.take(Exit.CPUID, rax=0xFFFF_0000_0000_0000, rcx=0)
    assert td.regs[Reg.RAX] == 0x23
    assert td.regs[Reg.RBX] == 0x756E6547


def test_signature_and_frequency(make_td):
    td = make_td(tsc_frequency=2_500_000_000)
    signature = b"".join(r.to_bytes(4, "little") for r in cpuid(td, 0x21)[1:])
    assert signature == b"Intel    lTDX"[:4] + b"    " + b"lTDX"
    assert cpuid(td, 0x15) == (1, 100, 25_000_000, 0)


def test_address_width_is_the_gpa_width(td):
    assert cpuid(td, 0x80000008)[0] == 40 | 48 << 8


@pytest.mark.parametrize(("bit", "value"), [(21, 1), (31, 1), (15, 1), (5, 0), (6, 0), (3, 0)])
def test_fixed_bits_of_leaf_1_ecx(make_td, bit, value):
    """As intel/lkvs expects them in a TD; no engine can take them away or add them."""
    for features in ({}, {(1, 0, "ecx"): 0xFFFFFFFF}):
        assert cpuid(make_td(features=features), 1)[2] >> bit & 1 == value


def test_only_what_the_engine_executes_is_shown(make_td):
    aes, sse3, pcid = 1 << 25, 1, 1 << 17
    shown = cpuid(make_td(features={(1, 0, "ecx"): sse3}), 1)[2]
    assert shown & sse3
    assert not shown & (aes | pcid)


def test_dynamic_bits(td):
    assert not cpuid(td, 1)[2] >> 27 & 1
    td.vcpu.crs[4] |= 1 << 18
    assert cpuid(td, 1)[2] >> 27 & 1
    assert not cpuid(td, 7)[2] >> 4 & 1
    td.vcpu.crs[4] |= 1 << 22
    assert cpuid(td, 7)[2] >> 4 & 1


def test_syscall_is_shown_in_64bit_mode_only(td):
    assert cpuid(td, 0x80000001)[3] >> 11 & 1
    td.vcpu.cs = td.vcpu.cs._replace(attributes=0x00CF9B00)
    assert not cpuid(td, 0x80000001)[3] >> 11 & 1


def test_tsc_deadline_can_be_left_out(make_td):
    assert cpuid(make_td(), 1)[2] >> 24 & 1
    assert not cpuid(make_td(features_on=frozenset()), 1)[2] >> 24 & 1


@pytest.mark.parametrize(
    ("control", "supervisor", "user"), [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)]
)
def test_the_guest_can_ask_for_ve(td, control, supervisor, user):
    assert td.call(5, rcx=control) == 0
    assert (cpuid(td, 1) is None) == bool(supervisor)
    td.vcpu.cpl = 3
    assert (td.take(Exit.CPUID, rax=1, rcx=0) == [VE]) == bool(user)


def test_the_guest_can_ask_for_ve_of_one_leaf(td, rules):
    index = next(r.index for r in rules.cpuid if r.id == "cpuid-0x15")
    assert td.call(10, rcx=0, rdx=0xA120000000000000 + index, r8=1, r9=3) == 0
    assert cpuid(td, 0x15) is None
    assert cpuid(td, 1) is not None
