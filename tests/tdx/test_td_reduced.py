"""TD_CTLS and FEATURE_PARAVIRT_CTLS of newer modules: what one that wants fewer #VEs sees."""

import pytest

from trapline.cpu.engine import Exit, Reg
from trapline.rules.rows import Feature
from trapline.rules.tables import load

VE = ("fault", 20, None)
GP = ("fault", 13, 0)
UD = ("fault", 6, None)
CONFIG_FLAGS, TD_CTLS = 0x1110000300000016, 0x1110000300000017
TOPOLOGY_ENUM_CONFIGURED, FEATURE_PARAVIRT_CTLS = 0x9100000000000019, 0x9110000300000022
ENUM_TOPOLOGY, VIRT_CPUID2, REDUCE_VE, LOCK = 2, 4, 8, 1 << 63
VM_RD, VM_WR, VEINFO_GET = 7, 8, 3


@pytest.fixture(params=["1.5.34", "2.0.14"])
def td(request, make_td):
    return make_td(rules=load(request.param))


def write(td, field, value, mask=None):
    return td.call(VM_WR, rcx=0, rdx=field, r8=value, r9=value if mask is None else mask)


def read(td, field):
    assert td.call(VM_RD, rcx=0, rdx=field) == 0
    return td.regs[Reg.R8]


def cpuid(td, leaf, subleaf=0):
    """EAX to EDX, or None for #VE."""
    if td.take(Exit.CPUID, rax=leaf, rcx=subleaf) == [VE]:
        td.module._ve.take()
        return None
    return tuple(td.regs[Reg[name]] for name in ("RAX", "RBX", "RCX", "RDX"))


def shown(td):
    """Which of three features leaf 1 shows."""
    _, _, ecx, edx = cpuid(td, 1)
    bits = {"mtrr": edx >> 12, "mca": edx >> 14, "tsc_deadline": ecx >> 24}
    return {name for name, value in bits.items() if value & 1}


def test_an_old_module_knows_none_of_it(make_td):
    td = make_td(rules=load("1.5.01"))
    for bit in (ENUM_TOPOLOGY, VIRT_CPUID2, REDUCE_VE, LOCK):
        assert write(td, TD_CTLS, bit) == td.module.rules.status("TDX_METADATA_FIELD_NOT_WRITABLE")
    td = make_td(rules=load("1.5.06"))
    assert write(td, TD_CTLS, REDUCE_VE) != 0
    assert write(td, TD_CTLS, ENUM_TOPOLOGY | VIRT_CPUID2) == 0
    assert cpuid(td, 0xB) == (0, 1, 0x100, 0)
    assert cpuid(td, 2)[0] == 0x00FEFF01
    assert cpuid(td, 6) is None


def test_reduce_ve_brings_topology_and_leaf_2(td):
    assert cpuid(td, 0xB) is cpuid(td, 2) is cpuid(td, 6) is None
    assert write(td, TD_CTLS, REDUCE_VE) == 0
    assert read(td, TD_CTLS) == 1 | ENUM_TOPOLOGY | VIRT_CPUID2 | REDUCE_VE
    assert cpuid(td, 0xB, 1) == (0, 1, 0x201, 0)
    assert cpuid(td, 0x1F) == (0, 1, 0x100, 0)
    assert cpuid(td, 2) == (0x00FEFF01, 0, 0, 0)
    assert cpuid(td, 6) == (4, 0, 0, 0)
    assert cpuid(td, 0x80000002)[0] == 0x65746E49
    for leaf in (9, 0xC, 0xF, 0x10, 0x16, 0x17, 0x1B, 0x80000003, 0x80000005):
        assert cpuid(td, leaf) == (0, 0, 0, 0), hex(leaf)
    assert cpuid(td, 4, 9) == (0, 0, 0, 0)  # a sub-leaf that is not in the table
    assert cpuid(td, 0xB, 7) == (0, 0, 7, 0)
    assert cpuid(td, 0x40000000) is None  # the host's, always


def test_without_unique_apic_ids_there_is_no_topology(make_td):
    td = make_td(rules=load("1.5.34"), topology_configured=False)
    assert read(td, TOPOLOGY_ENUM_CONFIGURED) == 0
    invalid = td.module.rules.status("TDX_METADATA_FIELD_VALUE_NOT_VALID")
    assert write(td, TD_CTLS, REDUCE_VE) == write(td, TD_CTLS, ENUM_TOPOLOGY) == invalid
    assert write(td, TD_CTLS, VIRT_CPUID2) == 0
    assert cpuid(td, 2) is not None
    assert cpuid(td, 0xB) is None


def test_msrs_that_nobody_lists_are_gp_then(td):
    assert td.msr(0x1F00) == VE
    td.call(VEINFO_GET)
    assert write(td, TD_CTLS, REDUCE_VE) == 0
    assert td.msr(0x1F00) == GP
    assert td.msr(0x1F00, 1) == GP
    assert td.msr(0x40000000) == VE  # outside the bitmaps
    td.call(VEINFO_GET)
    assert td.msr(0x830) == VE  # the interrupt command register: a paravirtual interface
    td.call(VEINFO_GET)
    assert td.msr(0x3A) == 1
    assert td.msr(0x8B) == 0xFFFFFFFF
    assert td.msr(0x8B, 5) == []
    assert td.msr(0x8B) == 0xFFFFFFFF
    assert td.msr(0x140, 0) == []
    assert td.msr(0x140, 1) == GP
    assert td.msr(0x34, 7) == []
    assert td.msr(0x34) == 7
    assert td.msr(0x802) == 0


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        (0x1801, []),
        (0x1, []),  # bits 7, 11 and 12 are ignored
        (1 << 16, GP),  # EST
        (1 << 18, VE),  # MONITOR
        (1 << 22, VE),  # limit CPUID
        (1 << 34, GP),
        (2, GP),
    ],
)
def test_misc_enable_is_the_modules(td, value, outcome):
    assert td.msr(0x1A0, value) == VE
    td.call(VEINFO_GET)
    write(td, TD_CTLS, REDUCE_VE)
    assert td.msr(0x1A0, value) == outcome
    if outcome == VE:
        td.call(VEINFO_GET)
    assert td.msr(0x1A0) == 0x1801


def test_features_go_and_come_back_when_the_guest_asks(make_td):
    td = make_td(rules=load("1.5.34"), features_on=frozenset((Feature.TSC_DEADLINE,)))
    assert shown(td) == {"mtrr", "mca", "tsc_deadline"}
    assert td.msr(0xFE) == VE
    td.call(VEINFO_GET)
    write(td, TD_CTLS, REDUCE_VE)
    assert shown(td) == set()
    assert (td.msr(0xFE), td.msr(0x179), td.msr(0x6E0)) == (GP, GP, GP)
    assert write(td, FEATURE_PARAVIRT_CTLS, 1 << 4 | 1 << 11) == 0  # MTRR, TSC_DEADLINE
    assert shown(td) == {"mtrr", "tsc_deadline"}
    assert td.msr(0xFE) == VE
    td.call(VEINFO_GET)
    assert td.msr(0x6E0) == VE
    td.call(VEINFO_GET)
    # What the VMM has not given cannot be asked for.
    assert write(td, FEATURE_PARAVIRT_CTLS, 1 << 2) == 0
    assert td.msr(0x198) == GP


def test_lock_forbids_any_change(td):
    invalid = td.module.rules.status("TDX_METADATA_FIELD_VALUE_NOT_VALID")
    assert write(td, TD_CTLS, LOCK | REDUCE_VE) == 0
    assert write(td, TD_CTLS, 0, REDUCE_VE) == invalid
    assert write(td, TD_CTLS, REDUCE_VE) == 0  # no change
    assert write(td, FEATURE_PARAVIRT_CTLS, 1) == invalid
    assert cpuid(td, 6) is not None


def test_the_guests_own_wish_for_ve_comes_first(td):
    write(td, TD_CTLS, REDUCE_VE)
    td.call(5, rcx=1)
    assert cpuid(td, 6) is cpuid(td, 4, 9) is cpuid(td, 1) is None


def test_monitor_and_mwait_do_not_exist(td):
    assert td.take(Exit.MONITOR) == td.take(Exit.MWAIT) == [UD]


def test_version_1_of_veinfo_get(td, make_td):
    td.take(Exit.HLT)
    assert td.call(2 << 16 | VEINFO_GET) == td.module.rules.status("TDX_OPERAND_INVALID", "RAX")
    assert td.module.ve_info is not None
    assert td.call(1 << 16 | VEINFO_GET) == 0
    assert td.regs[Reg.RCX] & 0xFFFFFFFF == 12
    old = make_td(rules=load("1.5.01"))
    old.take(Exit.HLT)
    assert old.call(1 << 16 | VEINFO_GET) != 0


def test_a_snapshot_brings_the_rules_back(td):
    state = td.module.save()
    write(td, TD_CTLS, REDUCE_VE)
    reduced = td.module.save()
    td.module.restore(state)
    assert cpuid(td, 6) is None
    assert td.msr(0x1F00) == VE
    td.call(VEINFO_GET)
    td.module.restore(reduced)
    assert cpuid(td, 6) is not None
    assert td.msr(0x1F00) == GP
