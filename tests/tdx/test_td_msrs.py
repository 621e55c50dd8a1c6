"""RDMSR and WRMSR: every row of the table, and the rows with a rule of their own."""

import pytest

from trapline.cpu.engine import Exit, Reg
from trapline.rules.rows import CpuAccess, MsrAction, MsrKind, MsrSpecial
from trapline.rules.tables import load
from trapline.tdx.msr import ENGINE_MSRS
from trapline.tdx.vmm_interface import ExitReason

VE = ("fault", 20, None)
GP = ("fault", 13, 0)
EFER, EFER_VALUE = 0xC0000080, 0x500
ROWS = [r for r in load("1.5.01").msrs if r.followed and r.kind == MsrKind.RANGE]
OFF = {
    MsrAction.NATIVE_UNLESS_GP: GP,
    MsrAction.NATIVE_UNLESS_EMULATED: None,
    MsrAction.GP: GP,
    MsrAction.VE: VE,
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_every_row_read_and_written(td, row):
    """With all optional features off but the TSC deadline timer, at both ends of the range."""
    deadline = row.read_feature == "tsc_deadline"
    for index in (row.first, row.last):
        outcome = td.msr(index)
        expected = OFF.get(row.read, VE if deadline else GP)
        if row.read in {MsrAction.NATIVE, MsrAction.EMULATED}:
            expected = GP if row.cpu_access == CpuAccess.WRITE else None
        assert outcome == expected if expected else isinstance(outcome, int), row.id
        if outcome == VE:
            assert td.module.ve_info.reason == ExitReason.RDMSR
            td.call(3)
        if row.special != MsrSpecial.NONE:
            continue  # below
        outcome = td.msr(index, 0)
        expected = OFF.get(row.write, VE if deadline else GP)
        if row.write in {MsrAction.NATIVE, MsrAction.EMULATED}:
            expected = GP if row.cpu_access == CpuAccess.READ else []
        assert outcome == expected, row.id
        if outcome == VE:
            assert td.module.ve_info.reason == ExitReason.WRMSR
            td.call(3)


@pytest.mark.parametrize(
    "index", [0x1B, 0x8B, 0xFE, 0x179, 0x1FFF, 0x2000, 0x802, 0x830, 0xC0000083, 0xFFFFFFFF]
)
def test_absent_msrs_are_ve(td, index):
    assert td.msr(index) == VE
    td.call(3)
    assert td.msr(index, 5) == VE


def test_upper_half_of_rcx_is_ignored(td):
    assert td.msr(0x48, 1) == []
    assert td.msr(0xABCD_0000_0048) == 1


@pytest.mark.parametrize(
    ("config", "index"),
    [
        ({"attributes": 1 << 63 | 1 << 28}, 0xC1),
        ({"attributes": 1 << 30}, 0x6E1),
        ({"xfam": 3 | 1 << 8}, 0x560),
        ({"xfam": 3 | 3 << 11}, 0x6A0),
        ({"xfam": 3 | 1 << 14}, 0x985),
        ({"xfam": 3 | 1 << 15}, 0x14CE),
        ({"xfam": 3 | 3 << 17}, 0x1C4),
    ],
)
def test_a_feature_makes_its_msrs_native(make_td, config, index):
    assert make_td().msr(index) == GP
    td = make_td(**config)
    assert td.msr(index, 0x7) == []
    assert td.msr(index) == 7


def test_perf_capabilities_is_native_with_perfmon_and_pt(make_td):
    assert make_td().msr(0x345) == 0
    assert make_td().msr(0x345, 0) == GP
    assert make_td(attributes=1 << 63, xfam=0x103).msr(0x345, 0) == []


def test_tsc_deadline_follows_the_cpuid_bit(make_td):
    assert make_td().msr(0x6E0, 1) == VE
    assert make_td(features_on=frozenset()).msr(0x6E0, 1) == GP


def test_the_tsc_is_the_engines(td):
    td.vcpu.cycles = 0x1_2345_6789
    assert td.msr(0x10) == 0x1_2345_6789
    assert td.msr(0x10, 0) == VE


def test_efer_only_sce_may_change(td):
    assert td.msr(EFER, EFER_VALUE | 1) == []
    assert td.vcpu.msrs[EFER] == EFER_VALUE | 1
    assert td.msr(EFER, EFER_VALUE & ~0x400) == []  # LMA is ignored, SCE goes
    assert td.vcpu.msrs[EFER] == EFER_VALUE
    assert td.msr(EFER, EFER_VALUE | 1 << 11) == VE  # NXE


def test_xss_within_xfam(make_td):
    td = make_td()
    assert td.msr(0xDA0, 0) == []
    assert td.msr(0xDA0, 1 << 11) == GP
    td = make_td(xfam=3 | 3 << 11)
    assert td.msr(0xDA0, 3 << 11) == []
    assert td.msr(0xDA0) == 3 << 11
    assert td.msr(0xDA0, 3) == GP  # user state does not belong there


@pytest.mark.parametrize(
    ("value", "outcome", "read"),
    [
        (0, [], 0),
        (1 << 2, [], 1 << 2),
        (1 << 6, VE, 0),
        (1 << 6 | 1 << 7, [], 1 << 6 | 1 << 7),
        (1 << 13, [], 0),
        (1 << 3, GP, 0),
        (1 << 16, GP, 0),
        (1 << 40, GP, 0),
    ],
)
def test_debugctl(td, value, outcome, read):
    assert td.msr(0x1D9, value) == outcome
    assert td.msr(0x1D9) == read


def test_what_the_module_answers(td):
    assert td.msr(0xBD) == 1
    # No XAPIC_DISABLE_STATUS, PBRSB_NO, GDS_NO, RFDS_NO; nothing that the VMM would ask for.
    assert td.msr(0x10A) == 0xF16B
    assert td.msr(0x1A0) >> 12 & 1  # no PEBS
    assert not td.msr(0x1A0) >> 7 & 1  # no performance monitoring
    assert td.msr(0x486) == 0x80000021
    assert td.msr(0x480, 0) == GP


@pytest.mark.parametrize(("index", "good", "bad"), [(0x48, 0x5, 0x80), (0x49, 1, 2), (0x10B, 1, 4)])
def test_reserved_bits_of_native_msrs(td, index, good, bad):
    assert td.msr(index, good) == []
    assert td.msr(index, bad) == GP


def test_commands_are_not_stored(td):
    td.msr(0x49, 1)
    assert td.module.save().msrs == ()


def test_msrs_of_the_cpu_are_left_to_the_engine(td):
    assert set(td.vcpu.native) == ENGINE_MSRS
    assert td.vcpu.native[EFER] == (True, False)
    assert td.vcpu.native[0xC0000102] == (True, True)
    assert td.msr(0xC0000102, 0x1234) == []
    assert td.vcpu.msrs[0xC0000102] == 0x1234
    assert td.msr(0xC0000102) == 0x1234


# The virtual APIC page.


@pytest.mark.parametrize("index", [0x808, 0x80A, 0x80B, 0x80C, 0x810, 0x81F, 0x827, 0x83F])
def test_x2apic_reads(td, index):
    td.apic.values[index] = 0x77
    assert td.msr(index) == 0x77


@pytest.mark.parametrize("index", [0x809, 0x80A, 0x80C, 0x80E, 0x810, 0x818, 0x827])
def test_x2apic_read_only_registers(td, index):
    assert td.msr(index, 0) == GP


def test_x2apic_writes(td):
    assert td.msr(0x808, 0x20) == []
    assert td.msr(0x80B, 0) == []
    assert td.msr(0x83F, 0xEC) == []
    assert td.apic.values == {0x808: 0x20, 0x80B: 0, 0x83F: 0xEC}
    for index, value in ((0x808, 0x100), (0x80B, 1), (0x83F, 0x1EC)):
        assert td.msr(index, value) == GP
    td.apic.refuses.add(0x808)
    assert td.msr(0x808, 0x30) == GP


def test_self_ipi_with_a_low_vector_is_a_trap_like_ve(td):
    rip = td.regs[Reg.RIP]
    assert td.take(Exit.WRMSR, rcx=0x83F, rax=15, rdx=0) == [VE]
    assert td.regs[Reg.RIP] == rip + 2
    assert td.module.ve_info.reason == ExitReason.APIC_WRITE
    assert td.apic.values == {}
