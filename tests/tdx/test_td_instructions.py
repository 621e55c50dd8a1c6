"""Exits that the table `instructions` decides, and those that only pass through."""

from dataclasses import replace

import pytest

from trapline.base.errors import BadInputFileError
from trapline.cpu.engine import CrWrite, Exit, Fault, IoAccess, Reg
from trapline.rules.rows import Outcome
from trapline.tdx.vmm_interface import ExitReason

VE = ("fault", 20, None)
GP = ("fault", 13, 0)
UD = ("fault", 6, None)
CR0 = 0x80010033
CR4 = 0x668
FOLLOWED = {
    Exit.HLT: ("HLT", "cpl_0"),
    Exit.MONITOR: ("MONITOR", "cpl_0"),
    Exit.MWAIT: ("MWAIT", "cpl_0"),
    Exit.WBINVD: ("WBINVD", "cpl_0"),
    Exit.INVD: ("INVD", "cpl_0"),
    Exit.VMCALL: ("VMCALL", "always"),
}


@pytest.mark.parametrize("exit_", FOLLOWED)
def test_ve_with_the_reason_and_length_of_the_table(td, rules, exit_):
    row = next(r for r in rules.instructions if r.followed and r.key == FOLLOWED[exit_])
    assert row.outcome == Outcome.VE
    td.vcpu.length = 5  # with prefixes
    assert td.take(exit_) == [VE]
    assert td.module.ve_info.reason == row.exit_reason
    assert td.module.ve_info.length == 5


def change(rules, key, **columns):
    return replace(
        rules,
        instructions=tuple(
            replace(row, **columns) if row.followed and row.key == key else row
            for row in rules.instructions
        ),
    )


@pytest.mark.parametrize(
    ("outcome", "events", "moved"),
    [(Outcome.GP, [GP], 0), (Outcome.UD, [UD], 0), (Outcome.NATIVE, [], 2)],
)
def test_the_table_decides(make_td, rules, outcome, events, moved):
    td = make_td(rules=change(rules, ("WBINVD", "cpl_0"), outcome=outcome))
    rip = td.regs[Reg.RIP]
    assert td.take(Exit.WBINVD) == events
    assert td.regs[Reg.RIP] - rip == moved


def test_port_io_follows_the_table_too(make_td, rules):
    td = make_td(rules=change(rules, ("OUTS", "always"), outcome=Outcome.GP))
    td.vcpu.io = IoAccess(0x3F8, 1, False, True, True, False, 2)
    assert td.take(Exit.IO) == [GP]
    td.vcpu.io = IoAccess(0x3F8, 1, False, False, False, False, 1)
    assert td.take(Exit.IO) == [VE]


def test_a_table_the_model_cannot_follow_is_refused(make_td, rules):
    with pytest.raises(BadInputFileError, match="hlt-cpl-0 says 'td_exit'"):
        make_td(rules=change(rules, ("HLT", "cpl_0"), outcome=Outcome.TD_EXIT))
    without = replace(
        rules, instructions=tuple(r for r in rules.instructions if r.mnemonic != "HLT")
    )
    with pytest.raises(BadInputFileError, match="no row answers for HLT, cpl_0"):
        make_td(rules=without)


@pytest.mark.parametrize(
    ("access", "qualification", "information"),
    [
        (IoAccess(0x80, 1, False, False, False, True, 2), 0x80 << 16 | 1 << 6, 0),
        (IoAccess(0xCFC, 4, True, False, False, False, 1), 0xCFC << 16 | 1 << 3 | 3, 0),
        (
            IoAccess(0x1F0, 2, True, True, True, False, 3),
            0x1F0 << 16 | 1 << 5 | 1 << 4 | 1 << 3 | 1,
            2 << 7,
        ),
    ],
)
def test_io_qualification(td, access, qualification, information):
    td.vcpu.io = access
    assert td.take(Exit.IO) == [VE]
    info = td.module.ve_info
    assert info.qualification == qualification
    assert (info.length, info.info) == (access.length, information)


def test_rdpmc_without_perfmon(td):
    assert td.take(Exit.RDPMC) == [GP]


def test_undefined_instructions(td):
    assert td.take(Exit.UNDEFINED) == [UD]


def test_windows_and_boundaries_are_the_vmms(td):
    for exit_ in (Exit.INTERRUPT_WINDOW, Exit.BOUNDARY, Exit.BREAKPOINT):
        assert td.take(exit_) == []
    assert (td.vmm.windows, td.vmm.boundaries, td.vmm.breakpoints) == (1, 1, 1)


def test_a_triple_fault_ends_the_vcpu(td, rules):
    td.take(Exit.TRIPLE_FAULT)
    (td_exit,) = td.vmm.exits
    assert td_exit.status == rules.status("TDX_NON_RECOVERABLE_VCPU")
    assert td_exit.reason == ExitReason.TRIPLE_FAULT


def test_a_machine_check_ends_the_td(td, rules):
    td.vcpu.fault = Fault(18, 0)
    assert td.take(Exit.EXCEPTION) == []
    (td_exit,) = td.vmm.exits
    assert td_exit.status == rules.status("TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE")
    assert td_exit.interruption_info == 1 << 31 | 3 << 8 | 18


def test_other_exceptions_are_the_guests_unless_the_vmm_takes_them(td):
    td.vcpu.fault = Fault(14, 2)
    assert td.take(Exit.EXCEPTION) == [("fault", 14, 2)]
    td.vcpu.fault = Fault(3, 0)
    assert td.take(Exit.EXCEPTION) == [("fault", 3, None)]
    td.vmm.takes_exception = True
    assert td.take(Exit.EXCEPTION) == []


# Control registers.


def write_cr(td, number, value):
    td.vcpu.cr_write = CrWrite(number, value, 3)
    rip = td.regs[Reg.RIP]
    events = td.take(Exit.CR_WRITE)
    assert (td.regs[Reg.RIP] - rip == 3) != bool(events)
    return events


@pytest.mark.parametrize(
    ("value", "events"),
    [
        (CR0 & ~(1 << 5), [GP]),  # NE
        (CR0 & ~1, [GP]),  # PE, with PG set
        (CR0 & ~(1 | 1 << 31), [VE]),  # PE and PG
        (CR0 | 1 << 29, [VE]),  # NW
        (CR0 | 1 << 30, [VE]),  # CD
        (CR0 | 1 << 32, [GP]),
    ],
)
def test_cr0_bits_the_module_owns(td, value, events):
    assert write_cr(td, 0, value) == events
    assert td.vcpu.crs[0] == CR0
    if events == [VE]:
        info = td.module.ve_info
        assert (info.reason, info.qualification, info.length) == (ExitReason.CR_ACCESS, 0, 3)


def test_cr0_ignored_bits_keep_their_value(td):
    assert write_cr(td, 0, CR0 | 1 << 6 | 1 << 28) == []
    assert td.vcpu.crs[0] == CR0


def test_cr0_bits_of_the_guest(td):
    assert write_cr(td, 0, CR0 | 1 << 3) == []
    assert td.vcpu.crs[0] == CR0 | 1 << 3


def test_cr0_paging_cannot_be_switched_off_in_64bit_code(td):
    assert write_cr(td, 0, CR0 & ~(1 << 31)) == [GP]


@pytest.mark.parametrize(
    ("value", "events"),
    [
        (CR4 & ~(1 << 6), [VE]),  # MCE
        (CR4 | 1 << 13, [VE]),  # VMXE
        (CR4 | 1 << 14, [VE]),  # SMXE
        (CR4 | 1 << 15, [GP]),  # reserved
        (CR4 | 1 << 17, [GP]),  # PCIDE, which the processor shown does not have
        (CR4 | 1 << 19, [GP]),  # KL
        (CR4 | 1 << 22, [GP]),  # PKE without XFAM
        (CR4 | 1 << 23, [GP]),  # CET without XFAM
        (CR4 | 1 << 24, [GP]),  # PKS without ATTRIBUTES
        (CR4 | 1 << 25, [GP]),  # UINTR without XFAM
        (CR4 | 1 << 63, [GP]),
        (CR4 & ~(1 << 5), [GP]),  # PAE in long mode
        (CR4 | 1 << 20 | 1 << 18, []),  # SMEP, OSXSAVE
    ],
)
def test_cr4(td, value, events):
    assert write_cr(td, 4, value) == events
    assert td.vcpu.crs[4] == (value if not events else CR4)


def test_the_engine_is_told_which_bits_to_watch(td):
    assert td.vcpu.watched[0] & 0xFFFFFFFF == 0x7FFAFFE1
    assert td.vcpu.watched[4] & (1 << 6 | 1 << 13 | 1 << 14) == 1 << 6 | 1 << 13 | 1 << 14
    assert not td.vcpu.watched[4] & (1 << 7 | 1 << 20)


def test_other_control_registers_are_native(td):
    assert write_cr(td, 3, 0x1000) == []
    assert td.vcpu.crs[3] == 0x1000
