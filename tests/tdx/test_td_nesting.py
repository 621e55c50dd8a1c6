"""VE_INFO, the second #VE, and what waits for VEINFO.GET, against the table `nesting`."""

from dataclasses import replace

import pytest

from trapline.base.errors import BadInputFileError
from trapline.cpu.engine import EptViolation, Exit, IoAccess, Reg
from trapline.rules.rows import Outcome, Standing
from trapline.tdx.vmm_interface import ExitReason, VeInfo

VE = ("fault", 20, None)
DF = ("fault", 8, 0)
MMIO = 1 << 39 | 0xFEC00000
VEINFO_GET = 3


def follow(rules, row_id):
    """The rules, with another answer followed to the question of `row_id`."""
    chosen = next(row for row in rules.nesting if row.id == row_id)
    return replace(
        rules,
        nesting=tuple(
            replace(row, standing=Standing.ENFORCED if row.id == row_id else Standing.CLAIMED)
            if row.key == chosen.key
            else row
            for row in rules.nesting
        ),
    )


def test_a_ve_fills_ve_info_and_get_frees_it(td):
    td.vcpu.io = IoAccess(0x3F8, 2, True, False, False, True, 3)
    assert td.take(Exit.IO) == [VE]
    assert td.call(VEINFO_GET) == 0
    regs = td.regs
    assert regs[Reg.RCX] == ExitReason.IO_INSTRUCTION
    assert regs[Reg.RDX] == 1 | 1 << 3 | 1 << 6 | 0x3F8 << 16
    assert (regs[Reg.R8], regs[Reg.R9]) == (0, 0)
    assert regs[Reg.R10] == 3
    assert td.module.ve_info is None


def test_get_with_nothing_valid_returns_zeros(td, rules):
    for name in ("RCX", "RDX", "R8", "R9", "R10"):
        td.regs[Reg[name]] = 0x55
    assert td.call(VEINFO_GET) == rules.status("TDX_NO_VALID_VE_INFO")
    assert all(td.regs[Reg[n]] == 0 for n in ("RCX", "RDX", "R8", "R9", "R10"))


def test_the_instruction_behind_a_ve_has_not_executed(td):
    rip = td.regs[Reg.RIP]
    td.take(Exit.HLT)
    assert td.regs[Reg.RIP] == rip


def test_exceptions_of_the_module_set_rf(td):
    td.take(Exit.HLT)
    assert td.vcpu.rflags >> 16 & 1


def test_a_second_ve_of_the_module_is_a_double_fault(td):
    assert td.take(Exit.HLT) == [VE]
    assert td.take(Exit.WBINVD) == [DF]
    assert td.module.ve_info.reason == ExitReason.HLT  # the first one is kept
    assert [double for _, _, double in td.traps.ve] == [False, True]
    assert td.module.because == (
        "VE_INFO was still in use when the next #VE was due (rule second-ve-module)"
    )


def test_the_second_ve_follows_the_table(make_td, rules):
    td = make_td(rules=follow(rules, "second-ve-sdv"))
    td.take(Exit.HLT)
    assert td.take(Exit.HLT) == [("fault", 13, 0)]


def test_an_answer_the_model_cannot_give_is_refused(make_td, rules):
    with pytest.raises(BadInputFileError, match="second-ve-mail says 'triple_fault'"):
        make_td(rules=follow(rules, "second-ve-mail"))
    none = replace(rules, nesting=tuple(r for r in rules.nesting if r.outcome != Outcome.DF))
    with pytest.raises(BadInputFileError, match="no row answers for second-ve, injected_by_module"):
        make_td(rules=none)


def test_mmio_is_a_ve_of_the_cpu(td):
    td.vcpu.ept = EptViolation(MMIO, 0xFFFFC90000001000, True, False, False)
    assert td.take(Exit.EPT_VIOLATION) == [VE]
    info = td.module.ve_info
    assert (info.reason, info.gpa, info.gla) == (48, MMIO, 0xFFFFC90000001000)
    assert info.qualification == 2 | 1 << 7 | 1 << 8


def test_mmio_before_get_is_a_td_exit_and_no_double_fault(td):
    td.take(Exit.HLT)
    td.vcpu.ept = EptViolation(MMIO | 0x10, 0xFFFFC90000001010, False, False, False)
    assert td.take(Exit.EPT_VIOLATION) == []
    assert td.module.ve_info.reason == ExitReason.HLT
    (violation,) = td.vmm.violations
    assert violation.gpa == MMIO  # low 12 bits cleared, shared bit kept
    assert violation.qualification == 1  # bits 12:7 cleared
    assert violation.because == (
        "VE_INFO was still in use, so that it could become no #VE (rule second-ve-mmio)"
    )


@pytest.mark.parametrize("spoil", ["vectoring", "real mode"])
def test_mmio_that_is_not_convertible_is_a_td_exit(td, spoil):
    if spoil == "vectoring":
        td.vcpu.vectoring = 14
    else:
        td.vcpu.crs[0] = 0
    td.vcpu.ept = EptViolation(MMIO, 0x1000, False, False, False)
    assert td.take(Exit.EPT_VIOLATION) == []
    (violation,) = td.vmm.violations
    words = {"vectoring": "being delivered", "real mode": "CR0.PE"}
    assert words[spoil] in violation.because


def test_an_nmi_waits_for_get(td):
    td.take(Exit.HLT)
    td.module.pend_nmi()
    assert not td.vcpu.nmi_window
    td.call(VEINFO_GET)
    assert td.vcpu.nmi_window
    assert td.take(Exit.NMI_WINDOW) == [("nmi",)]
    assert not td.vcpu.nmi_window
    assert not td.module.nmi_pending


def test_an_nmi_with_ve_info_free_asks_for_its_window_at_once(td):
    td.module.pend_nmi()
    td.module.pend_nmi()  # merged into one
    assert td.vcpu.nmi_window
    assert td.take(Exit.NMI_WINDOW) == [("nmi",)]
    assert td.take(Exit.BOUNDARY) == []


def test_a_ve_that_overtakes_the_window_holds_the_nmi(td):
    td.module.pend_nmi()
    td.take(Exit.HLT)
    assert td.take(Exit.NMI_WINDOW) == []
    assert not td.vcpu.nmi_window
    assert td.module.nmi_pending
    td.call(VEINFO_GET)
    assert td.take(Exit.NMI_WINDOW) == [("nmi",)]


NOTIFY_ENABLES = 0x9100000000000010
VM_WR = 8


def test_notification_only_when_asked_for(td):
    assert not td.module.notify_ept_fault(0x5000)
    assert td.call(VM_WR, rcx=0, rdx=NOTIFY_ENABLES, r8=1, r9=1) == 0
    td.vcpu.events.clear()
    assert td.module.notify_ept_fault(0x5000)
    assert td.vcpu.events == [VE]
    assert td.module.ve_info.gpa == 0x5000
    assert td.module.ve_info.gla == 0


@pytest.mark.parametrize("spoil", ["nmi", "vectoring", "valid"])
def test_notification_is_not_injected(td, spoil):
    td.call(VM_WR, rcx=0, rdx=NOTIFY_ENABLES, r8=1, r9=1)
    if spoil == "nmi":
        td.vcpu.nmi_blocked = True
    elif spoil == "vectoring":
        td.vcpu.vectoring = 14
    else:
        td.take(Exit.HLT)
    assert not td.module.notify_ept_fault(0x5000)


def test_repeated_violations_at_one_rip_notify_the_guest(td):
    td.call(VM_WR, rcx=0, rdx=NOTIFY_ENABLES, r8=1, r9=1)
    td.module.sept.remove(0x5000, 0x1000)
    td.vcpu.ept = EptViolation(0x5008, 0x5008, False, False, False)
    for _ in range(6):  # STEPPING_EPF_THRESHOLD
        assert td.take(Exit.EPT_VIOLATION) == []
    assert td.take(Exit.EPT_VIOLATION) == [VE]
    assert td.module.ve_info.gpa == 0x5000
    # Progress in between starts the count anew.
    td.call(VEINFO_GET)
    assert td.take(Exit.EPT_VIOLATION) == []


def test_inject_ve_is_the_modules(td):
    info = VeInfo(ExitReason.EPT_VIOLATION, 1, 0, 0x9000)
    td.module.inject_ve(info)
    td.module.inject_ve(info)
    assert td.vcpu.events == [VE, DF]


def test_save_and_restore(td):
    td.take(Exit.HLT)
    td.module.pend_nmi()
    td.call(5, rcx=3)
    td.msr(0x48, 1)
    state = td.module.save()
    td.call(VEINFO_GET)
    td.take(Exit.NMI_WINDOW)
    td.call(5, rcx=0)
    td.msr(0x48, 0)
    td.call(2, rcx=0x2000, rdx=0)
    td.module.sept.remove(0x3000, 0x1000)
    td.module.restore(state)
    assert td.module.save() == state
    assert td.module.ve_info.reason == ExitReason.HLT
    assert td.module.nmi_pending
    assert not td.vcpu.nmi_window
    assert 3 in td.memory.mapped_private()
