"""TDCALL leaves: every case of the table `tdcalls` that the model has."""

import hashlib
import struct

import pytest
from fake_td import CODE_32, Recorder

from trapline.cpu.engine import Exit, Reg
from trapline.tdx.sept import LEVEL_2M
from trapline.tdx.vmm_interface import ExtendedQualification

GP = ("fault", 13, 0)
VE = ("fault", 20, None)
SHARED = 1 << 39
NO_FIELD = (1 << 64) - 1
CONFIG_FLAGS, TD_CTLS = 0x1110000300000016, 0x1110000300000017
NOTIFY_ENABLES = 0x9100000000000010


@pytest.fixture
def status(rules):
    """The completion code that a followed row of the table says."""

    def of(row_id):
        row = next(r for r in rules.tdcalls if r.id == row_id)
        assert row.followed
        return rules.status(row.status, row.operand)

    return of


# Mode and leaf.


def test_mode(td):
    td.vcpu.cs = CODE_32
    assert td.take(Exit.TDCALL, rax=1) == [GP]
    td.vcpu.cs = td.vcpu.cs._replace(attributes=0x00AF9B00)
    td.vcpu.msrs[0xC0000080] = 0
    assert td.take(Exit.TDCALL, rax=1) == [GP]


@pytest.mark.parametrize("leaf", [12, 13, 17, 21, 28, 33, 100, 254, 0xFFFF])
def test_unknown_leaves(td, status, leaf):
    assert td.call(leaf) == status("tdcall-unknown-leaf")


@pytest.mark.parametrize("rax", [1 << 24 | 1, 1 << 63, 1 << 32 | 7])
def test_reserved_rax_bits(td, status, rax):
    assert td.call(rax) == status("tdcall-reserved-rax-bits")


@pytest.mark.parametrize("leaf", [0, 1, 3, 6, 8, 9, 11])
def test_versions(td, status, leaf):
    assert td.call(1 << 16 | leaf) == status("tdcall-version-not-supported")


def test_rip_moves_and_the_listener_is_told(td):
    rip = td.regs[Reg.RIP]
    td.call(1)
    assert td.regs[Reg.RIP] == rip + 4
    assert td.traps.tdcalls == [(rip, 1, 0)]


# TDG.VP.VMCALL.


def test_vmcall_shows_only_what_is_selected(td, status):
    for number in range(16):
        if number != Reg.RSP:
            td.regs[number] = 0x1000 + number
    rip = td.regs[Reg.RIP]
    mask = 1 << Reg.R10 | 1 << Reg.R11 | 1 << Reg.R12
    td.vmm.answer = {Reg.R10: 0, Reg.R11: 0xAA, Reg.R13: 0xBB, Reg.RDX: 0xCC}
    assert td.call(0, rcx=mask) == status("tdcall-0-ok")
    (seen,) = td.vmm.calls
    assert seen == [0x1000 + n if mask >> n & 1 else 0 for n in range(16)]
    assert td.regs[Reg.R11] == 0xAA
    assert td.regs[Reg.R13] == 0x100D  # not selected: not copied back
    assert td.regs[Reg.RDX] == 0x1002
    assert td.regs[Reg.RCX] == mask
    assert td.regs[Reg.RIP] == rip + 4
    assert td.traps.tdvmcalls == [(rip, seen)]
    assert td.traps.tdcalls == []


def test_vmcall_answers_are_cut_to_64_bits(td):
    td.vmm.answer = {Reg.R11: (1 << 70) + 5, Reg.R10: -1}
    td.call(0, rcx=3 << 10)
    assert td.regs[Reg.R11] == 5
    assert td.regs[Reg.R10] == (1 << 64) - 1


@pytest.mark.parametrize("bit", [0, 1, 4, 32, 63])
def test_vmcall_reserved_bits(td, status, bit):
    rip = td.regs[Reg.RIP]
    assert td.call(0, rcx=1 << bit | 1 << 10) == status("tdcall-0-reserved-rcx-bits")
    assert td.vmm.calls == []
    assert td.regs[Reg.RIP] == rip + 4


def test_vmcall_rbp(make_td, status):
    assert make_td().call(0, rcx=1 << 5) == 0
    td = make_td(no_rbp_mod=True)
    assert td.call(0, rcx=1 << 5) == status("tdcall-0-reserved-rcx-bits")


def test_vmcall_registers_are_cleared_between_calls(td):
    td.vmm.answer = {Reg.R15: 0x5EC2E7}
    td.call(0, rcx=1 << 10)
    td.call(0, rcx=1 << 10 | 1 << 15, r15=0)
    assert td.vmm.calls[1][Reg.R15] == 0


# VP.INFO, CPUIDVE.SET.


def test_vp_info(make_td, status):
    td = make_td(attributes=1 << 28, max_vcpus=4)
    assert td.call(1, r11=7) == status("tdcall-1-ok")
    assert td.regs[Reg.RCX] == 40
    assert td.regs[Reg.RDX] == 1 << 28
    assert td.regs[Reg.R8] == 1 | 4 << 32
    assert [td.regs[r] for r in (Reg.R9, Reg.R10, Reg.R11)] == [0, 1, 0]


def test_cpuidve_set(td, status):
    assert td.call(5, rcx=3) == status("tdcall-5-ok")
    assert td.call(5, rcx=4) == status("tdcall-5-reserved-bits")


# VEINFO.GET: see test_td_nesting.


def test_veinfo_get(td, status):
    assert td.call(3) == status("tdcall-3-nothing-valid")
    td.take(Exit.HLT)
    assert td.call(3) == status("tdcall-3-ok")


# Measurements.


def test_rtmr_extend(td, status):
    td.memory.ram[0x2000:0x2030] = bytes(range(48))
    assert td.call(2, rcx=0x2000, rdx=2) == status("tdcall-2-ok")
    expected = hashlib.sha384(bytes(48) + bytes(range(48))).digest()
    assert td.module.measurements.rtmrs[2] == expected
    assert td.call(2, rcx=0x2000, rdx=2) == 0
    assert td.module.measurements.rtmrs[2] == hashlib.sha384(expected + bytes(range(48))).digest()
    assert td.module.measurements.rtmrs[0] == bytes(48)


@pytest.mark.parametrize(
    ("gpa", "index", "row"),
    [
        (0x2001, 0, "unaligned-data"),
        (SHARED | 0x2000, 0, "data-not-private"),
        (1 << 50, 0, "data-not-private"),
        (0x2000, 4, "bad-index"),
        (0x2000, 1 << 63, "bad-index"),
    ],
)
def test_rtmr_extend_operands(td, status, gpa, index, row):
    assert td.call(2, rcx=gpa, rdx=index) == status(f"tdcall-2-{row}")
    assert td.module.measurements.rtmrs == [bytes(48)] * 4


def test_report(make_td, status):
    td = make_td(mr_owner=b"owner".ljust(48, b"\0"))
    td.memory.ram[0x2000:0x2040] = b"nonce".ljust(64, b"!")
    assert td.call(4, rcx=0x3000, rdx=0x2000, r8=0) == status("tdcall-4-ok")
    report = bytes(td.memory.ram[0x3000:0x3400])
    mac, tcb_info, td_info = report[:256], report[256:512], report[512:]
    assert mac[:4] == b"\x81\0\0\0"
    assert mac[80:128] == hashlib.sha384(td_info).digest()
    assert mac[32:80] == hashlib.sha384(tcb_info[:239]).digest()
    assert mac[128:192] == b"nonce".ljust(64, b"!")
    assert mac[224:256] == bytes(32)  # no MAC
    assert b"unsigned" in tcb_info
    assert struct.unpack_from("<QQ", td_info) == (1 << 28, 3)
    assert td_info[112:117] == b"owner"


@pytest.mark.parametrize(
    ("registers", "row"),
    [
        ({"rcx": 0x3200}, "unaligned-report"),
        ({"rdx": 0x2020}, "unaligned-data"),
        ({"rdx": 1 << 45}, "bad-data-gpa"),
        ({"rcx": 1 << 45}, "bad-report-gpa"),
        ({"r8": 1}, "bad-subtype"),
        ({"r8": 0x100}, "bad-subtype"),
    ],
)
def test_report_operands(td, status, registers, row):
    registers = {"rcx": 0x3000, "rdx": 0x2000, "r8": 0} | registers
    assert td.call(4, **registers) == status(f"tdcall-4-{row}")
    assert not any(td.memory.ram[0x3000:0x3400])


def test_operands_may_be_shared_pages(td):
    td.module.sept.share(0x3000, 0x1000)
    assert td.call(4, rcx=SHARED | 0x3000, rdx=0x2000, r8=0) == 0
    assert td.memory.ram[0x3000] == 0x81


def test_an_mmio_operand_is_a_ve_of_the_module(td):
    rip = td.regs[Reg.RIP]
    mmio = SHARED | 0xFEC00000
    assert td.take(Exit.TDCALL, rax=4, rcx=0x3000, rdx=mmio, r8=0) == [VE]
    assert (td.module.ve_info.gpa, td.module.ve_info.gla) == (mmio, 0)
    assert td.regs[Reg.RIP] == rip
    # Unlike an access of the guest, a second one is #DF.
    assert td.take(Exit.TDCALL, rax=4, rcx=0x3000, rdx=mmio, r8=0) == [("fault", 8, 0)]
    assert td.vmm.violations == []


def test_absent_operands_are_td_exits(td):
    rip = td.regs[Reg.RIP]
    td.module.sept.remove(0x3000, 0x1000)
    assert td.take(Exit.TDCALL, rax=4, rcx=0x3000, rdx=0x2000, r8=0) == []
    assert td.take(Exit.TDCALL, rax=4, rcx=SHARED | 0x4000, rdx=0x2000, r8=0) == []
    assert [v.gpa for v in td.vmm.violations] == [0x3000, SHARED | 0x4000]
    assert [v.qualification for v in td.vmm.violations] == [2, 2]
    assert td.regs[Reg.RIP] == rip


@pytest.mark.parametrize(("attributes", "is_ve"), [(0, True), (1 << 28, False)])
def test_pending_operands(make_td, attributes, is_ve):
    td = make_td(attributes=attributes)
    td.module.sept.remove(0x2000, 0x1000)
    td.module.sept.aug(0x2000, 0x1000)
    events = td.take(Exit.TDCALL, rax=2, rcx=0x2000, rdx=0)
    assert events == ([VE] if is_ve else [])
    kinds = [v.extended_type for v in td.vmm.violations]
    assert kinds == ([] if is_ve else [ExtendedQualification.PENDING_EPT_VIOLATION])


# MEM.PAGE.ACCEPT.


def test_accept(td, status):
    sept = td.module.sept
    sept.remove(0, 4 << 20)
    sept.aug(0, 2 << 20, LEVEL_2M)
    sept.aug(2 << 20, 0x1000)
    td.memory.ram[0x1FFFFF] = 9
    assert td.call(6, rcx=1) == status("tdcall-6-ok")
    assert td.memory.ram[0x1FFFFF] == 0
    assert td.call(6, rcx=1) == status("tdcall-6-already-accepted") | 1
    assert td.call(6, rcx=0x5000) == status("tdcall-6-already-accepted") | 1
    assert td.call(6, rcx=2 << 20 | 1) == status("tdcall-6-size-mismatch") | 1
    assert td.call(6, rcx=2 << 20) == 0
    assert td.call(6, rcx=2 << 20) == status("tdcall-6-already-accepted")


@pytest.mark.parametrize(
    "rcx",
    [
        2,  # 1 GiB
        7,
        0x1001,  # 2 MiB, not aligned
        1 << 3,
        1 << 11,
        1 << 52,
        SHARED,
        1 << 40,
    ],
)
def test_accept_operands(td, status, rcx):
    assert td.call(6, rcx=rcx) == status("tdcall-6-bad-gpa-or-level")


def test_accept_of_what_is_not_pending_is_a_td_exit(td):
    td.module.sept.remove(0x5000, 0x1000)
    td.module.sept.block(0x6000, 0x1000)
    rip = td.regs[Reg.RIP]
    for gpa in (0x5000, 0x6000):
        td.take(Exit.TDCALL, rax=6, rcx=gpa)
        assert td.regs[Reg.RAX] == 6  # nothing was answered
    assert td.regs[Reg.RIP] == rip
    free, blocked = td.vmm.violations
    assert free.extended_type is ExtendedQualification.ACCEPT
    assert (free.gpa, free.extended_info) == (0x5000, 0)
    assert (blocked.gpa, blocked.extended_info) == (0x6000, 1 << 6 | 1 << 14)
    assert free.qualification == 2


def test_the_vmm_can_provide_the_page_and_the_call_runs_again(td):
    td.module.sept.remove(0x5000, 0x1000)
    td.vmm.ept_violation = lambda td_exit: td.module.sept.aug(td_exit.gpa, 0x1000)
    td.take(Exit.TDCALL, rax=6, rcx=0x5000)
    assert td.call(6, rcx=0x5000) == 0


# MEM.PAGE.ATTR.


def test_attributes_read(td, status):
    td.module.sept.remove(0, 2 << 20)
    td.module.sept.aug(0, 2 << 20, LEVEL_2M)
    assert td.call(23, rcx=0x5123, rdx=9) == status("tdcall-23-ok")
    assert (td.regs[Reg.RCX], td.regs[Reg.RDX]) == (1 | 1 << 12, 0)
    assert td.call(23, rcx=0x201234) == 0
    assert td.regs[Reg.RCX] == 0x201000
    assert td.call(23, rcx=SHARED, rdx=9) == status("tdcall-23-bad-gpa")
    assert (td.regs[Reg.RCX], td.regs[Reg.RDX]) == (0, 0)


def test_attributes_read_of_a_missing_page(td):
    td.module.sept.remove(0x5000, 0x1000)
    td.take(Exit.TDCALL, rax=23, rcx=0x5000)
    assert [v.gpa for v in td.vmm.violations] == [0x5000]


def test_attributes_write(td, status):
    assert td.call(24, rcx=0, rdx=1, r8=0) == status("tdcall-24-attributes-not-0")
    assert td.call(24, rcx=0, rdx=0, r8=1) == status("tdcall-24-flags-not-0")
    assert td.call(24, rcx=3, rdx=0, r8=0) == status("tdcall-24-bad-gpa-or-level")
    assert td.call(24, rcx=0, rdx=0, r8=0) == status("tdcall-unknown-leaf")  # not modelled


# Metadata.


def read(td, field, version=0):
    return td.call(version << 16 | 7, rcx=0, rdx=field), td.regs[Reg.R8]


def write(td, field, value, mask):
    return td.call(8, rcx=0, rdx=field, r8=value, r9=mask), td.regs[Reg.R8]


def test_vm_rd(make_td, status):
    td = make_td(attributes=0x10000000, max_vcpus=2)
    assert read(td, 0x1110000300000000) == (status("tdcall-7-ok"), 0x10000000)
    assert read(td, 0x1110000300000001) == (0, 3)
    assert read(td, 0x1110000200000002) == (0, 2)
    assert read(td, 0x111000010000000C) == (0, 80)
    assert read(td, CONFIG_FLAGS) == (0, 2)
    assert read(td, NOTIFY_ENABLES) == (0, 0)
    # Size, context and increment bits do not matter.
    assert read(td, 0x1100000000000001) == (0, 3)


def test_vm_rd_hashes(td):
    td.module.measurements.page_added(0x1000)
    td.module.measurements.finalize()
    parts = [read(td, 0x1310000300000000 + n)[1] for n in range(6)]
    assert b"".join(p.to_bytes(8, "little") for p in parts) == td.module.measurements.mrtd


def test_vm_rd_failures(td, status):
    assert td.call(7, rcx=1, rdx=CONFIG_FLAGS) == status("tdcall-7-not-own-td")
    assert td.call(2 << 16 | 7, rcx=0, rdx=CONFIG_FLAGS) == status("tdcall-7-version-above-1")
    for field in (0x1110000300FF0000, CONFIG_FLAGS | 1 << 24, CONFIG_FLAGS | 1 << 34, NO_FIELD):
        assert read(td, field) == (status("tdcall-7-bad-field-id"), 0)
    assert read(td, 0x8010000000000001) == (status("tdcall-7-not-readable"), 0)


def test_vm_rd_walks_all_readable_fields(td, rules, status):
    first, _ = read(td, NO_FIELD, version=1)
    assert first == status("tdcall-7-first-field")
    seen = []
    field = td.regs[Reg.RDX]
    while field != NO_FIELD:
        seen.append(field)
        completion, _ = read(td, field, version=1)
        assert completion == 0
        field = td.regs[Reg.RDX]
        assert len(seen) < 1000
    readable = [r for r in rules.fields if r.scope == "td" and r.read_mask]
    assert len(seen) == sum(r.elements for r in readable)
    assert seen[0] == readable[0].code


def test_vm_wr(td, status):
    assert write(td, NOTIFY_ENABLES, 1, 1) == (status("tdcall-8-ok"), 0)
    assert write(td, NOTIFY_ENABLES, 0, 1) == (0, 1)
    assert td.call(8, rcx=1, rdx=TD_CTLS, r8=0, r9=1) == status("tdcall-8-not-own-td")
    assert write(td, 0x1110000300FF0000, 0, 1)[0] == status("tdcall-8-bad-field-id")
    assert write(td, CONFIG_FLAGS, 0, 1)[0] == status("tdcall-8-not-writable")
    assert write(td, TD_CTLS, 1, 0)[0] == status("tdcall-8-not-writable")


def test_what_linux_asks_for_and_1_5_01_refuses(td, status):
    """REDUCE_VE and ENUM_TOPOLOGY came with later modules."""
    for bit in (1, 3):
        assert write(td, TD_CTLS, 1 << bit, 1 << bit)[0] == status("tdcall-8-not-writable")
    assert write(td, TD_CTLS, 1 | 1 << 3, 1 | 1 << 3)[0] == status("tdcall-8-forbidden-bits-change")
    assert read(td, TD_CTLS) == (0, 1)


def test_pending_ve_disable_needs_the_flag(make_td, status):
    td = make_td(attributes=0)
    assert write(td, TD_CTLS, 1, 1) == (0, 0)
    td = make_td(attributes=0, flexible_pending_ve=False)
    assert write(td, TD_CTLS, 1, 1)[0] == status("tdcall-8-value-not-taken")
    assert write(td, TD_CTLS, 0, 1) == (0, 0)  # no change is no offence


def test_vp_rd_and_wr(td, status):
    user_ve = 0xA020000000000008
    assert td.call(10, rcx=0, rdx=user_ve, r8=1, r9=0xFF) == status("tdcall-10-ok")
    assert td.call(9, rcx=0, rdx=user_ve) == status("tdcall-9-ok")
    assert td.regs[Reg.R8] == 1
    assert td.call(9, rcx=1, rdx=user_ve) == status("tdcall-9-rcx-not-0")
    assert td.regs[Reg.RDX] == NO_FIELD
    assert td.call(10, rcx=1, rdx=user_ve, r8=0, r9=1) == status("tdcall-10-rcx-not-0")
    assert td.call(9, rcx=0, rdx=0xA0200000000FFFFF) == status("tdcall-9-bad-field-id")
    assert td.call(10, rcx=0, rdx=0xA0200000000FFFFF, r8=0, r9=1) == status(
        "tdcall-10-bad-field-id"
    )
    assert td.call(9, rcx=0, rdx=0x0220000300000004) == status("tdcall-9-not-readable")
    assert td.call(10, rcx=0, rdx=0xA020000200000002, r8=0, r9=1) == status(
        "tdcall-10-not-writable"
    )
    assert td.call(9, rcx=0, rdx=NO_FIELD) == status("tdcall-9-first-field")
    assert td.regs[Reg.RDX] == 0xA020000200000002


def test_sys_rd(td, status):
    assert td.call(11, rdx=0x0800000200000000) == status("tdcall-11-ok")
    assert td.regs[Reg.R8] == 0x8086
    assert td.call(11, rdx=0x0800000100000003) == 0
    assert td.regs[Reg.R8] == 5
    assert td.call(11, rdx=NO_FIELD) == status("tdcall-11-first-field")
    assert td.call(11, rdx=0x0800000100FF0000) == status("tdcall-11-bad-field-id")


# What a TD without L2 VMs and service TDs may ask.


def test_leaves_without_a_subject(td, status):
    assert td.call(18) == status("tdcall-18-not-bound")
    assert td.call(20) == status("tdcall-20-not-bound")
    assert td.call(22, rcx=0) == status("tdcall-22-not-available")
    assert td.call(25, rcx=1 << 52, rdx=0x10) == status("tdcall-25-bad-list")
    assert td.call(25, rcx=1 << 52, rdx=0x100) == status("tdcall-25-no-such-vm")
    assert td.call(26, rcx=0) == status("tdcall-26-ok")
    assert td.call(26, rcx=2) == status("tdcall-26-no-such-vm")
    assert td.call(27, rcx=1, rdx=0) == status("tdcall-27-no-such-vm")


def test_a_listener_is_told_while_its_context_lasts(td):
    other, only = Recorder(), Recorder()
    with td.module.listening(other):
        td.call(1)
        with td.module.listening(only, alone=True):
            td.call(3)
            td.take(Exit.HLT)
        td.call(0)
    td.call(7)
    assert [leaf for _, leaf, _ in td.traps.tdcalls] == [1, 7]
    assert [leaf for _, leaf, _ in other.tdcalls] == [1]
    assert [leaf for _, leaf, _ in only.tdcalls] == [3]
    assert (len(td.traps.tdvmcalls), len(other.tdvmcalls), len(only.tdvmcalls)) == (1, 1, 0)
    assert (len(td.traps.ve), len(other.ve), len(only.ve)) == (0, 0, 1)


def test_a_listener_goes_with_its_context_whatever_ends_it(td):
    gone = Recorder()
    with pytest.raises(KeyError), td.module.listening(gone, alone=True):
        raise KeyError
    td.call(1)
    assert gone.tdcalls == []
    assert len(td.traps.tdcalls) == 1
