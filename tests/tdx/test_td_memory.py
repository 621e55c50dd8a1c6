"""EPT violations, against the table `memory`."""

import pytest

from trapline.cpu.engine import EptViolation, Exit
from trapline.tdx.vmm_interface import ExtendedQualification

VE = ("fault", 20, None)
SHARED = 1 << 39
TD_CTLS = 0x1110000300000017


def touch(td, gpa, *, write=False, fetch=False, walk=False, gla=0x7000):
    td.vcpu.ept = EptViolation(gpa, gla, write, fetch, walk)
    return td.take(Exit.EPT_VIOLATION)


def test_a_pending_page_is_a_td_exit_by_default(td):
    td.module.sept.remove(0x5000, 0x1000)
    td.module.sept.aug(0x5000, 0x1000)
    assert touch(td, 0x5123, write=True) == []
    (violation,) = td.vmm.violations
    assert violation.gpa == 0x5000
    assert violation.extended_type is ExtendedQualification.PENDING_EPT_VIOLATION
    assert violation.qualification == 2
    assert not violation.status >> 62 & 1  # NON_RECOVERABLE


def test_a_pending_page_is_a_ve_without_sept_ve_disable(make_td):
    td = make_td(attributes=0)
    td.module.sept.remove(0x5000, 0x1000)
    td.module.sept.aug(0x5000, 0x1000)
    assert touch(td, 0x5123, gla=0xFFFF888000005123) == [VE]
    info = td.module.ve_info
    assert (info.reason, info.gpa, info.gla) == (48, 0x5123, 0xFFFF888000005123)
    assert info.qualification == 1 | 1 << 7 | 1 << 8


def test_the_guest_can_switch_it(make_td):
    td = make_td(attributes=0)
    td.module.sept.remove(0x5000, 0x1000)
    td.module.sept.aug(0x5000, 0x1000)
    assert td.call(8, rcx=0, rdx=TD_CTLS, r8=1, r9=1) == 0
    assert touch(td, 0x5000) == []
    assert len(td.vmm.violations) == 1


def test_free_and_blocked_private_pages_are_td_exits(td):
    td.module.sept.remove(0x5000, 0x1000)
    td.module.sept.block(0x6000, 0x1000)
    for gpa in (0x5000, 0x6000, 1 << 38):
        assert touch(td, gpa) == []
    assert [v.gpa for v in td.vmm.violations] == [0x5000, 0x6000, 1 << 38]
    assert {v.extended_type for v in td.vmm.violations} == {ExtendedQualification.NONE}


def test_shared_pages_the_host_did_not_map_are_td_exits(td):
    assert touch(td, SHARED | 0x5000, write=True) == []
    (violation,) = td.vmm.violations
    assert violation.gpa == SHARED | 0x5000


def test_code_fetch_from_mmio_is_a_td_exit(td):
    assert touch(td, SHARED | 0xFED00000, fetch=True) == []
    (violation,) = td.vmm.violations
    assert violation.qualification == 4


def test_a_page_walk_is_told_apart(make_td):
    td = make_td(attributes=0)
    td.module.sept.remove(0x5000, 0x1000)
    td.module.sept.aug(0x5000, 0x1000)
    touch(td, 0x5000, walk=True)
    assert td.module.ve_info.qualification == 1 | 1 << 7


@pytest.mark.parametrize(
    ("access", "cpl", "error"),
    [({}, 0, 0x9), ({"write": True}, 0, 0xB), ({"fetch": True}, 3, 0x1D)],
)
def test_bits_above_the_shared_bit_are_a_page_fault(td, access, cpl, error):
    td.vcpu.cpl = cpl
    assert touch(td, 1 << 41, gla=0x1234, **access) == [("fault", 14, error)]
    assert td.vcpu.crs[2] == 0x1234
