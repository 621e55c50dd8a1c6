"""TDCALL: the leaf functions, their operand checks and completion codes.

A leaf answers with a completion code, or with None when the TDCALL has ended otherwise: with
a #VE, a TD exit, or in TDG.VP.VMCALL with the VMM's answer in place.

Sources: TDX module 1.5.01, tdx_td_dispatcher.c (td_call), vm_exits/tdg_*.c; table `tdcalls`.
"""

from typing import TYPE_CHECKING, Final

from trapline.cpu.engine import Reg
from trapline.rules.rows import FieldScope
from trapline.tdx.controls import NO_RBP_MOD
from trapline.tdx.measurement import HASH_SIZE, REPORT_DATA_SIZE, REPORT_SIZE, RTMRS
from trapline.tdx.metadata import NO_FIELD, Metadata
from trapline.tdx.vmm_interface import VeInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from trapline.cpu.engine import Vcpu
    from trapline.rules.tables import RuleSet
    from trapline.tdx.controls import Controls
    from trapline.tdx.cpuid import Cpuid
    from trapline.tdx.measurement import Measurements
    from trapline.tdx.page_access import PageAccess
    from trapline.tdx.page_calls import PageCalls
    from trapline.tdx.ve_info import VeState
    from trapline.tdx.vmm_interface import TdConfig, Vmm

M64: Final = (1 << 64) - 1
SUCCESS: Final = 0
VP_VMCALL, VM_RD = 0, 7
LEAF_MASK, VERSION_SHIFT = 0xFFFF, 16
LEAF_AND_VERSION: Final = 0xFF_FFFF
VMCALL_RESERVED: Final = M64 & ~0xFFFF_FFFF | 1 << Reg.RAX | 1 << Reg.RCX | 1 << Reg.RSP
EFER, EFER_LMA, CS_LONG = 0xC000_0080, 1 << 10, 1 << 21
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
        self._no_ve_info = rules.status("TDX_NO_VALID_VE_INFO")
        self._first_field = rules.status("TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT")
        invalid = {
            register: rules.status("TDX_OPERAND_INVALID", register)
            for register in ("RAX", "RCX", "RDX", "R8")
        }
        self._bad_rax, self._bad_rcx = invalid["RAX"], invalid["RCX"]
        self._bad_rdx, self._bad_r8 = invalid["RDX"], invalid["R8"]
        self._vmcall_reserved = VMCALL_RESERVED
        if controls.config_flags & NO_RBP_MOD:
            self._vmcall_reserved |= 1 << Reg.RBP
        self._selected: dict[int, tuple[int, ...]] = {}  # GPR mask -> register numbers
        self._registers = [0] * 16  # what the VMM sees of a TDVMCALL
        self._leaves: dict[int, Callable[[], int | None]] = {
            1: self._vp_info,
            2: self._mr_rtmr_extend,
            3: self._vp_veinfo_get,
            4: self._mr_report,
            5: self._vp_cpuidve_set,
            6: pages.accept,
            VM_RD: self._vm_rd,
            8: self._vm_wr,
            9: self._vp_rd,
            10: self._vp_wr,
            11: self._sys_rd,
            18: self._servtd,
            20: self._servtd,
            23: pages.attributes_read,
            24: pages.attributes_write,
            25: self._vp_enter,
            26: self._vp_invept,
            27: self._vp_invvpid,
        }

    def on_tdcall(self) -> None:
        """Check the mode, find the leaf, complete."""
        vcpu = self._vcpu
        regs = vcpu.regs
        rip = regs[Reg.RIP]
        # The CPU has checked CPL. Compatibility mode has 32-bit RIPs: above, the two look-ups
        # can be saved.
        if not rip >> 32 and not self._in_64bit_mode():
            self._ve.general_protection()
            return
        rax = regs[Reg.RAX]
        if rax == VP_VMCALL:
            status = self._vp_vmcall(rip)
        elif rax & ~LEAF_AND_VERSION or (rax >> VERSION_SHIFT and rax & LEAF_MASK != VM_RD):
            status = self._bad_rax
        else:
            leaf = self._leaves.get(rax & LEAF_MASK)
            status = self._bad_rax if leaf is None else leaf()
        if status is None:
            return
        regs[Reg.RAX] = status
        vcpu.advance(vcpu.length)
        for listener in self._ve.listeners:
            listener.on_tdcall(rip, rax & LEAF_MASK, status)

    def _in_64bit_mode(self) -> bool:
        vcpu = self._vcpu
        return bool(vcpu.msr(EFER) & EFER_LMA and vcpu.segment("cs").attributes & CS_LONG)

    # Calls to the VMM.

    def _vp_vmcall(self, rip: int) -> int | None:
        vcpu = self._vcpu
        regs = vcpu.regs
        control = regs[Reg.RCX]
        if control & self._vmcall_reserved:
            return self._bad_rcx
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
        regs[Reg.RAX] = SUCCESS
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
        return SUCCESS

    def _vp_veinfo_get(self) -> int:
        regs = self._vcpu.regs
        taken = self._ve.take()
        info = _NO_VE if taken is None else taken
        regs[Reg.RCX] = info.reason
        regs[Reg.RDX] = info.qualification
        regs[Reg.R8] = info.gla
        regs[Reg.R9] = info.gpa
        regs[Reg.R10] = info.length | info.info << 32
        return self._no_ve_info if taken is None else SUCCESS

    def _vp_cpuidve_set(self) -> int:
        control = self._vcpu.regs[Reg.RCX]
        if control & ~3:
            return self._bad_rcx
        self._cpuid.supervisor_ve = bool(control & 1)
        self._cpuid.user_ve = bool(control & 2)
        return SUCCESS

    # Measurements.

    def _mr_rtmr_extend(self) -> int | None:
        regs = self._vcpu.regs
        gpa, index = regs[Reg.RCX], regs[Reg.RDX]
        if gpa % 64 or not self._access.is_valid(gpa, private_only=True):
            return self._bad_rcx
        data = self._access.operand(gpa, HASH_SIZE, write=False)
        if data is None:
            return None
        if index >= RTMRS:
            return self._bad_rdx
        self._measurements.extend_rtmr(index, bytes(data))
        return SUCCESS

    def _mr_report(self) -> int | None:
        regs = self._vcpu.regs
        report_gpa, data_gpa = regs[Reg.RCX], regs[Reg.RDX]
        if report_gpa % REPORT_SIZE:
            return self._bad_rcx
        if data_gpa % REPORT_DATA_SIZE or not self._access.is_valid(data_gpa, private_only=False):
            return self._bad_rdx
        data = self._access.operand(data_gpa, REPORT_DATA_SIZE, write=False)
        if data is None:
            return None
        if regs[Reg.R8]:
            return self._bad_r8
        report = self._measurements.report(bytes(data))
        if not self._access.is_valid(report_gpa, private_only=False):
            return self._bad_rcx
        target = self._access.operand(report_gpa, REPORT_SIZE, write=True)
        if target is None:
            return None
        target[:] = report
        return SUCCESS

    # Metadata.

    def _vm_rd(self) -> int:
        regs = self._vcpu.regs
        version = regs[Reg.RAX] >> VERSION_SHIFT
        field_id = regs[Reg.RDX]
        regs[Reg.R8] = 0
        if version > 0:
            regs[Reg.RDX] = NO_FIELD
        if version > 1:
            return self._bad_rax
        if regs[Reg.RCX]:
            return self._bad_rcx
        return self._read(FieldScope.TD, field_id, walk=version > 0)

    def _vm_wr(self) -> int:
        return self._write(FieldScope.TD)

    def _vp_rd(self) -> int:
        regs = self._vcpu.regs
        field_id = regs[Reg.RDX]
        regs[Reg.RDX], regs[Reg.R8] = NO_FIELD, 0
        if regs[Reg.RCX]:
            return self._bad_rcx
        return self._read(FieldScope.VP, field_id, walk=True)

    def _vp_wr(self) -> int:
        return self._write(FieldScope.VP)

    def _sys_rd(self) -> int:
        regs = self._vcpu.regs
        field_id = regs[Reg.RDX]
        regs[Reg.RDX], regs[Reg.R8] = NO_FIELD, 0
        return self._read(FieldScope.SYS, field_id, walk=True)

    def _read(self, scope: FieldScope, field_id: int, *, walk: bool) -> int:
        regs = self._vcpu.regs
        if walk and Metadata.is_null(field_id):
            regs[Reg.RDX] = self._metadata.next_readable(scope, NO_FIELD)
            return self._first_field
        status, value = self._metadata.read(scope, field_id)
        regs[Reg.R8] = value
        if walk and status == SUCCESS:
            regs[Reg.RDX] = self._metadata.next_readable(scope, field_id)
        return status

    def _write(self, scope: FieldScope) -> int:
        regs = self._vcpu.regs
        value, mask = regs[Reg.R8], regs[Reg.R9]
        regs[Reg.R8] = 0
        if regs[Reg.RCX]:
            return self._bad_rcx
        status, old = self._metadata.write(scope, regs[Reg.RDX], value, mask)
        regs[Reg.R8] = old
        return status

    # What a TD without L2 VMs and service TDs can still ask for.

    def _servtd(self) -> int:
        return self._bad_rcx

    def _vp_enter(self) -> int:
        gpa = self._vcpu.regs[Reg.RDX]
        if gpa % 256 or not self._access.is_valid(gpa, private_only=True):
            return self._bad_rdx
        return self._bad_rcx

    def _vp_invept(self) -> int:
        return self._bad_rcx if self._vcpu.regs[Reg.RCX] else SUCCESS

    def _vp_invvpid(self) -> int:
        return self._bad_rcx
