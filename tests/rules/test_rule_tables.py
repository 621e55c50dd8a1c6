"""The tables against facts that were read elsewhere, so that an edit cannot bend them."""

import pytest

from trapline.rules.rows import CpuidOutcome, MsrAction, MsrKind, Outcome
from trapline.rules.tables import load


@pytest.fixture(scope="module")
def rules():
    return load("1.5.01")


def test_the_module_table_has_134_msr_ranges(rules):
    # MAX_NUM_MSR_LOOKUP; rows that only spell out the rule for absent MSRs are beside it.
    listed = [r for r in rules.msrs if "msr_config_lookup.c" in r.source]
    assert len(listed) == 134
    assert sum(r.kind == MsrKind.ABSENT for r in rules.msrs) == 1


@pytest.mark.parametrize(
    ("index", "read", "write"),
    [
        (0x10, MsrAction.NATIVE, MsrAction.VE),
        (0x8D, MsrAction.GP, MsrAction.GP),
        (0x6E0, MsrAction.GP_UNLESS_VE, MsrAction.GP_UNLESS_VE),
        (0x808, MsrAction.NATIVE, MsrAction.NATIVE),
        (0x830, MsrAction.VE, MsrAction.VE),
        (0xDA0, MsrAction.NATIVE, MsrAction.EMULATED),
        (0xC0000080, MsrAction.NATIVE, MsrAction.EMULATED),
    ],
)
def test_known_msrs(rules, index, read, write):
    found = [
        r
        for r in rules.msrs
        if r.followed and r.kind == MsrKind.RANGE and r.first <= index <= r.last
    ]
    assert [(r.read, r.write) for r in found] == [(read, write)]


@pytest.mark.parametrize("leaf", [2, 6, 0xB, 0x16, 0x1F, 0x40000000, 0x80000002, 0x80000006])
def test_faulting_cpuid_leaves(rules, leaf):
    found = [
        r for r in rules.cpuid if r.followed and r.first is not None and r.first <= leaf <= r.last
    ]
    assert found
    assert {r.outcome for r in found} == {CpuidOutcome.VE}


def test_every_answer_on_a_second_ve_is_carried(rules):
    answers = {
        r.claimant: r.outcome for r in rules.nesting if r.key == ("second-ve", "injected_by_module")
    }
    assert answers == {
        "module": Outcome.DF,
        "module-comment": Outcome.GP,
        "linux-doc": Outcome.DF,
        "sdv": Outcome.GP,
        "mail": Outcome.TRIPLE_FAULT,
    }
    mmio = [r for r in rules.nesting if r.key == ("second-ve", "delivered_by_cpu_mmio")]
    assert [r.outcome for r in mmio if r.followed] == [Outcome.TD_EXIT]


@pytest.mark.parametrize(
    ("name", "operand", "value"),
    [
        ("TDX_SUCCESS", "", 0),
        ("TDX_OPERAND_INVALID", "RCX", 0xC000010000000001),
        ("TDX_NO_VALID_VE_INFO", "", 0xC000070400000000),
        ("TDX_PAGE_ALREADY_ACCEPTED", "", 0x00000B0A00000000),
        ("TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED", "", 0x8000000000000003),
    ],
)
def test_status_values(rules, name, operand, value):
    assert rules.status(name, operand) == value


def test_the_fields_linux_uses(rules):
    # Linux asks with its own size and class bits: only class and code identify a field.
    named = {(r.code >> 56 & 0x3F, r.code & 0xFFFFFF): r for r in rules.fields if r.scope == "td"}
    for linux_id, name, write_mask in (
        (0x1110000300000016, "CONFIG_FLAGS", 0),
        (0x1110000300000017, "TD_CTLS", 1),
        (0x9100000000000010, "NOTIFY_ENABLES", 1),
    ):
        row = named[linux_id >> 56 & 0x3F, linux_id & 0xFFFFFF]
        assert (row.name, row.write_mask) == (name, write_mask)


def test_ids_do_not_hold_spaces(rules):
    for table in ("instructions", "msrs", "cpuid", "memory", "tdcalls", "nesting", "fields"):
        assert all(" " not in row.id for row in rules.table(table)), table
