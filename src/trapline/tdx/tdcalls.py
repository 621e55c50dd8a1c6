"""TDCALL: the leaf functions, their operand checks and completion codes.

A leaf answers with a completion code, or with None when the TDCALL has ended otherwise: with
a #VE, a TD exit, or in TDG.VP.VMCALL with the VMM's answer in place.

Sources: TDX module 1.5.01, tdx_td_dispatcher.c (td_call), vm_exits/tdg_*.c; table `tdcalls`.
"""

from functools import partial
from typing import TYPE_CHECKING, Final

from trapline.cpu.engine import Reg
from trapline.rules.rows import FieldScope, TdcallRule
from trapline.tdx.completions import RAISE_GP
from trapline.tdx.measurement import HASH_SIZE, REPORT_DATA_SIZE, REPORT_SIZE, RTMRS
from trapline.tdx.metadata import NO_FIELD, OK, Metadata
from trapline.tdx.vmm_interface import VeInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from trapline.cpu.engine import Vcpu
    from trapline.rules.ruleset import RuleSet
    from trapline.tdx.completions import Completions
    from trapline.tdx.controls import Controls
    from trapline.tdx.cpuid import Cpuid
    from trapline.tdx.measurement import Measurements
    from trapline.tdx.page_access import PageAccess
    from trapline.tdx.page_calls import PageCalls
    from trapline.tdx.ve_info import VeState
    from trapline.tdx.vmm_interface import TdConfig, Vmm

M64: Final = (1 << 64) - 1
VP_VMCALL, VP_INFO, RTMR_EXTEND, VEINFO_GET, REPORT, CPUIDVE_SET, ACCEPT = range(7)
VM_RD, VM_WR, VP_RD, VP_WR, SYS_RD = 7, 8, 9, 10, 11
SERVTD_RD, SERVTD_WR, VERIFYREPORT = 18, 20, 22
ATTR_RD, ATTR_WR, VP_ENTER, INVEPT, INVVPID = 23, 24, 25, 26, 27
_READS: Final = {
    VM_RD: ("not_own_td", FieldScope.TD),
    VP_RD: ("rcx_not_0", FieldScope.VP),
    SYS_RD: ("", FieldScope.SYS),
}
_READ_CASES: Final = (OK, "bad_field_id", "not_readable", "first_field")
_WRITES: Final = {VM_WR: ("not_own_td", FieldScope.TD), VP_WR: ("rcx_not_0", FieldScope.VP)}
_WRITE_CASES: Final = (
    OK, "bad_field_id", "not_writable", "forbidden_bits_change", "value_not_taken",
)  # fmt: skip
LEAF_MASK, VERSION_SHIFT = 0xFFFF, 16
LEAF_AND_VERSION: Final = 0xFF_FFFF
SYS_RD_AVAILABLE: Final = 1
_NO_VE: Final = VeInfo(0)
_ZEROS: Final = [0] * 16


class Tdcalls:
    """Handles Exit.TDCALL."""

    def __init__(
        self,
        vcpu: "Vcpu",
        ve: "VeState",
        vmm: "Vmm",
        rules: "RuleSet",
        config: "TdConfig",
        *,
        completions: "Completions",
        controls: "Controls",
        cpuid: "Cpuid",
        access: "PageAccess",
        pages: "PageCalls",
        measurements: "Measurements",
    ) -> None:
        self._vcpu = vcpu
        self._ve = ve
        self._vmm = vmm
        self._config = config
        self._cpuid = cpuid
        self._access = access
        self._measurements = measurements
        self._metadata = Metadata(rules, config, controls, cpuid, measurements)
        of = completions.of
        self._unknown_leaf = of(None, "unknown_leaf")
        self._reserved_rax = of(None, "reserved_rax_bits")
        self._no_version = of(None, "version_not_supported")
        self._vmcall_ok = of(VP_VMCALL, OK)
        self._vmcall_refused = of(VP_VMCALL, "reserved_rcx_bits")
        self._info_ok = of(VP_INFO, OK)
        self._veinfo = {True: of(VEINFO_GET, OK), False: of(VEINFO_GET, "nothing_valid")}
        # The leaves that have a version 1: TDG.VP.VEINFO.GET only in newer modules.
        self._versioned = {VM_RD}
        self._veinfo_1 = self._veinfo_version = self._no_version
        if rules.find(TdcallRule, VEINFO_GET, "version_1") is not None:
            self._versioned.add(VEINFO_GET)
            self._veinfo_1 = of(VEINFO_GET, "version_1")
            self._veinfo_version = of(VEINFO_GET, "version_above_1")
        self._cpuidve_ok = of(CPUIDVE_SET, OK)
        self._cpuidve_refused = of(CPUIDVE_SET, "reserved_bits")
        self._rtmr = {
            case: of(RTMR_EXTEND, case)
            for case in (OK, "unaligned_data", "data_not_private", "bad_index")
        }
        self._report = {
            case: of(REPORT, case)
            for case in (
                OK, "unaligned_report", "unaligned_data", "bad_data_gpa", "bad_report_gpa",
                "bad_subtype",
            )
        }  # fmt: skip
        self._vm_rd_version = of(VM_RD, "version_above_1")
        self._reads = {
            leaf: {case: of(leaf, case) for case in (*_READ_CASES, refused) if case}
            for leaf, (refused, _) in _READS.items()
        }
        self._writes = {
            leaf: {case: of(leaf, case) for case in (*_WRITE_CASES, refused)}
            for leaf, (refused, _) in _WRITES.items()
        }
        not_bound = {leaf: of(leaf, "not_bound") for leaf in (SERVTD_RD, SERVTD_WR)}
        not_available = of(VERIFYREPORT, "not_available")
        self._bad_list = of(VP_ENTER, "bad_list")
        self._no_vm = {leaf: of(leaf, "no_such_vm") for leaf in (VP_ENTER, INVEPT, INVVPID)}
        self._invept_ok = of(INVEPT, OK)
        reserved = _bits_of(Reg.RAX, Reg.RCX, Reg.RSP)
        if controls.no_rbp_mod:
            reserved |= _bits_of(Reg.RBP)
        self._vmcall_reserved = M64 & ~0xFFFF_FFFF | reserved
        self._selected: dict[int, tuple[int, ...]] = {}  # GPR mask -> register numbers
        self._registers = [0] * 16  # what the VMM sees of a TDVMCALL
        self._leaves: dict[int, Callable[[], int | None]] = {
            VP_INFO: self._vp_info,
            RTMR_EXTEND: self._mr_rtmr_extend,
            VEINFO_GET: self._vp_veinfo_get,
            REPORT: self._mr_report,
            CPUIDVE_SET: self._vp_cpuidve_set,
            ACCEPT: pages.accept,
            VM_RD: self._vm_rd,
            VM_WR: partial(self._write, VM_WR),
            VP_RD: self._vp_rd,
            VP_WR: partial(self._write, VP_WR),
            SYS_RD: self._sys_rd,
            SERVTD_RD: lambda: not_bound[SERVTD_RD],
            SERVTD_WR: lambda: not_bound[SERVTD_WR],
            VERIFYREPORT: lambda: not_available,
            ATTR_RD: pages.attributes_read,
            ATTR_WR: pages.attributes_write,
            VP_ENTER: self._vp_enter,
            INVEPT: self._vp_invept,
            INVVPID: lambda: self._no_vm[INVVPID],
        }

    def on_tdcall(self) -> None:
        """Find the leaf, complete. The mode is 64-bit."""
        vcpu = self._vcpu
        regs = vcpu.regs
        rip = regs[Reg.RIP]
        rax = regs[Reg.RAX]
        if rax == VP_VMCALL:
            status = self._vp_vmcall(rip)
        elif rax & ~LEAF_AND_VERSION:
            status = self._reserved_rax
        elif rax >> VERSION_SHIFT and rax & LEAF_MASK not in self._versioned:
            status = self._no_version
        else:
            leaf = self._leaves.get(rax & LEAF_MASK)
            status = self._unknown_leaf if leaf is None else leaf()
        if status is None:
            return
        if status == RAISE_GP:
            self._ve.general_protection()
            return
        regs[Reg.RAX] = status
        vcpu.advance(vcpu.length)
        for listener in self._ve.listeners:
            listener.on_tdcall(rip, rax & LEAF_MASK, status)

    # Calls to the VMM.

    def _vp_vmcall(self, rip: int) -> int | None:
        vcpu = self._vcpu
        regs = vcpu.regs
        control = regs[Reg.RCX]
        if control & self._vmcall_reserved:
            return self._vmcall_refused
        selected = self._selected.get(control & 0xFFFF)
        if selected is None:
            selected = tuple(number for number in range(16) if control >> number & 1)
            self._selected[control & 0xFFFF] = selected
        registers = self._registers
        registers[:] = _ZEROS
        for number in selected:
            registers[number] = regs[number]
        vcpu.advance(vcpu.length)
        for listener in self._ve.listeners:
            listener.on_tdvmcall(rip, registers)
        self._vmm.tdvmcall(registers)
        for number in selected:
            regs[number] = registers[number] & M64
        regs[Reg.RAX] = self._vmcall_ok & M64
        return None

    # The VCPU.

    def _vp_info(self) -> int:
        regs = self._vcpu.regs
        regs[Reg.RCX] = self._vcpu.memory.shared_bit.bit_length()
        regs[Reg.RDX] = self._config.attributes
        regs[Reg.R8] = 1 | self._config.max_vcpus << 32
        regs[Reg.R9] = 0
        regs[Reg.R10] = SYS_RD_AVAILABLE
        regs[Reg.R11] = 0
        return self._info_ok

    def _vp_veinfo_get(self) -> int:
        regs = self._vcpu.regs
        if regs[Reg.RAX] >> VERSION_SHIFT > 1:
            for register in (Reg.RCX, Reg.RDX, Reg.R8, Reg.R9, Reg.R10):
                regs[register] = 0
            return self._veinfo_version
        taken = self._ve.take()
        info = _NO_VE if taken is None else taken
        regs[Reg.RCX] = info.reason
        regs[Reg.RDX] = info.qualification
        regs[Reg.R8] = info.gla
        regs[Reg.R9] = info.gpa
        regs[Reg.R10] = info.length | info.info << 32
        if taken is not None and regs[Reg.RAX] >> VERSION_SHIFT:
            return self._veinfo_1
        return self._veinfo[taken is not None]

    def _vp_cpuidve_set(self) -> int:
        control = self._vcpu.regs[Reg.RCX]
        if control & ~3:
            return self._cpuidve_refused
        self._cpuid.supervisor_ve = bool(control & 1)
        self._cpuid.user_ve = bool(control & 2)
        return self._cpuidve_ok

    # Measurements.

    def _mr_rtmr_extend(self) -> int | None:
        regs = self._vcpu.regs
        gpa, index = regs[Reg.RCX], regs[Reg.RDX]
        if gpa % 64:
            return self._rtmr["unaligned_data"]
        if not self._access.is_valid(gpa, private_only=True):
            return self._rtmr["data_not_private"]
        data = self._access.operand(gpa, HASH_SIZE, write=False)
        if data is None:
            return None
        if index >= RTMRS:
            return self._rtmr["bad_index"]
        self._measurements.extend_rtmr(index, bytes(data))
        return self._rtmr[OK]

    def _mr_report(self) -> int | None:
        regs = self._vcpu.regs
        report_gpa, data_gpa = regs[Reg.RCX], regs[Reg.RDX]
        if report_gpa % REPORT_SIZE:
            return self._report["unaligned_report"]
        if data_gpa % REPORT_DATA_SIZE:
            return self._report["unaligned_data"]
        if not self._access.is_valid(data_gpa, private_only=False):
            return self._report["bad_data_gpa"]
        data = self._access.operand(data_gpa, REPORT_DATA_SIZE, write=False)
        if data is None:
            return None
        if regs[Reg.R8]:
            return self._report["bad_subtype"]
        report = self._measurements.report(bytes(data))
        if not self._access.is_valid(report_gpa, private_only=False):
            return self._report["bad_report_gpa"]
        target = self._access.operand(report_gpa, REPORT_SIZE, write=True)
        if target is None:
            return None
        target[:] = report
        return self._report[OK]

    # Metadata.

    def _vm_rd(self) -> int:
        regs = self._vcpu.regs
        version = regs[Reg.RAX] >> VERSION_SHIFT
        field_id = regs[Reg.RDX]
        regs[Reg.R8] = 0
        if version > 0:
            regs[Reg.RDX] = NO_FIELD
        if version > 1:
            return self._vm_rd_version
        if regs[Reg.RCX]:
            return self._reads[VM_RD]["not_own_td"]
        return self._read(VM_RD, field_id, walk=version > 0)

    def _vp_rd(self) -> int:
        regs = self._vcpu.regs
        field_id = regs[Reg.RDX]
        regs[Reg.RDX], regs[Reg.R8] = NO_FIELD, 0
        if regs[Reg.RCX]:
            return self._reads[VP_RD]["rcx_not_0"]
        return self._read(VP_RD, field_id, walk=True)

    def _sys_rd(self) -> int:
        regs = self._vcpu.regs
        field_id = regs[Reg.RDX]
        regs[Reg.RDX], regs[Reg.R8] = NO_FIELD, 0
        return self._read(SYS_RD, field_id, walk=True)

    def _read(self, leaf: int, field_id: int, *, walk: bool) -> int:
        regs = self._vcpu.regs
        scope = _READS[leaf][1]
        if walk and Metadata.is_null(field_id):
            regs[Reg.RDX] = self._metadata.next_readable(scope, NO_FIELD)
            return self._reads[leaf]["first_field"]
        case, value = self._metadata.read(scope, field_id)
        regs[Reg.R8] = value
        if walk and case == OK:
            regs[Reg.RDX] = self._metadata.next_readable(scope, field_id)
        return self._reads[leaf][case]

    def _write(self, leaf: int) -> int:
        regs = self._vcpu.regs
        refused, scope = _WRITES[leaf]
        value, mask = regs[Reg.R8], regs[Reg.R9]
        regs[Reg.R8] = 0
        if regs[Reg.RCX]:
            return self._writes[leaf][refused]
        case, old = self._metadata.write(scope, regs[Reg.RDX], value, mask)
        regs[Reg.R8] = old
        return self._writes[leaf][case]

    # What a TD without L2 VMs can still ask for.

    def _vp_enter(self) -> int:
        gpa = self._vcpu.regs[Reg.RDX]
        if gpa % 256 or not self._access.is_valid(gpa, private_only=True):
            return self._bad_list
        return self._no_vm[VP_ENTER]

    def _vp_invept(self) -> int:
        return self._no_vm[INVEPT] if self._vcpu.regs[Reg.RCX] else self._invept_ok


def _bits_of(*registers: Reg) -> int:
    return sum(1 << register for register in registers)
