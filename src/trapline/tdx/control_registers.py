"""MOV to CR0 and CR4: which bits the module owns, and what a write of them becomes.

A write that leaves the bits of the guest/host mask as the read shadow shows them runs
natively; all others reach the module, which injects #GP(0), injects #VE, or carries on.

Sources: TDX module 1.5.01, td_vmcs_init.c (masks and shadows), helpers.c (write_guest_cr0,
write_guest_cr4); table `instructions`, rows MOV CR0 and MOV CR4.
"""

from typing import TYPE_CHECKING

from trapline.cpu.engine import CrWrite
from trapline.tdx.vmm_interface import ExitReason, TdConfig, VeInfo

if TYPE_CHECKING:
    from trapline.cpu.engine import Vcpu
    from trapline.tdx.ve_info import VeState

_M64 = (1 << 64) - 1

CR0_PE, CR0_NE, CR0_WP = 1 << 0, 1 << 5, 1 << 16
CR0_NW, CR0_CD, CR0_PG = 1 << 29, 1 << 30, 1 << 31
CR0_FIXED0 = CR0_PE | CR0_NE | CR0_PG  # IA32_VMX_CR0_FIXED0 of every CPU with VMX
CR0_FIXED1 = 0xFFFF_FFFF
CR0_IGNORED = 0x1FFA_FFC0  # bits 28:19, 17 and 15:6 keep their value
CR0_OWNED = CR0_PE | CR0_NE | CR0_NW | CR0_CD | CR0_IGNORED | 0xFFFF_FFFF << 32
CR0_SHADOW = CR0_FIXED0

CR4_PAE, CR4_MCE, CR4_VMXE, CR4_SMXE = 1 << 5, 1 << 6, 1 << 13, 1 << 14
CR4_KL, CR4_PKE, CR4_CET, CR4_PKS, CR4_UINTR = 1 << 19, 1 << 22, 1 << 23, 1 << 24, 1 << 25
# What the modelled CPU knows: 10:0, VMXE, SMXE, FSGSBASE, OSXSAVE, SMEP, SMAP.
CR4_FIXED1 = 0x7FF | CR4_VMXE | CR4_SMXE | 1 << 16 | 1 << 18 | 1 << 20 | 1 << 21

XFAM_PK, XFAM_CET, XFAM_UINTR = 1 << 9, 3 << 11, 1 << 14
ATTRIBUTE_PKS = 1 << 30
EFER, EFER_LMA = 0xC000_0080, 1 << 10
CS_LONG = 1 << 21  # in the high word of a code segment descriptor


class ControlRegisters:
    """Handles Exit.CR_WRITE, and tells the engine which bits make it."""

    def __init__(self, vcpu: "Vcpu", ve: "VeState", config: TdConfig) -> None:
        self._vcpu = vcpu
        self._ve = ve
        features = CR4_KL
        if not config.xfam & XFAM_PK:
            features |= CR4_PKE
        if config.xfam & XFAM_CET != XFAM_CET:
            features |= CR4_CET
        if not config.xfam & XFAM_UINTR:
            features |= CR4_UINTR
        if not config.attributes & ATTRIBUTE_PKS:
            features |= CR4_PKS
        self._cr4_features = features  # bits that XFAM and ATTRIBUTES do not allow
        owned = CR4_MCE | CR4_VMXE | CR4_SMXE | features | ~CR4_FIXED1
        self._cr4_owned = owned & _M64
        vcpu.watch_cr(0, CR0_OWNED)
        vcpu.watch_cr(4, self._cr4_owned)

    def on_write(self) -> None:
        """Carry out or refuse the MOV behind the exit."""
        write = self._vcpu.cr_write
        if write.number == 0:
            self._write_cr0(write)
        elif write.number == 4:
            self._write_cr4(write)
        else:
            self._carry_out(write, write.value)

    def _write_cr0(self, write: CrWrite) -> None:
        value = write.value
        if not (value ^ CR0_SHADOW) & CR0_OWNED:
            if self._cr0_is_invalid(value):
                self._ve.general_protection()
            else:
                self._carry_out(write, value)
        elif (
            ~value & CR0_NE
            or value & ~CR0_FIXED1
            or (value & CR0_PG and not value & CR0_PE)
            or (self._vcpu.cr(4) & CR4_CET and not value & CR0_WP)
        ):
            self._ve.general_protection()
        elif not value & CR0_PE or value & (CR0_NW | CR0_CD):
            self._inject(write)
        else:
            old = self._vcpu.cr(0)
            self._carry_out(write, value & ~CR0_IGNORED | old & CR0_IGNORED)

    def _cr0_is_invalid(self, value: int) -> bool:
        """Say whether the CPU refuses a write that does not exit (SDM 3A, 2.5)."""
        if not value & CR0_PG and self._vcpu.msr(EFER) & EFER_LMA:
            return bool(self._vcpu.segment("cs").attributes & CS_LONG)
        return bool(self._vcpu.cr(4) & CR4_CET and not value & CR0_WP)

    def _write_cr4(self, write: CrWrite) -> None:
        value = write.value
        if not (value ^ CR4_MCE) & self._cr4_owned:
            if not value & CR4_PAE and self._vcpu.msr(EFER) & EFER_LMA:
                self._ve.general_protection()
            else:
                self._carry_out(write, value)
        elif value & ~CR4_FIXED1 or value & self._cr4_features:
            self._ve.general_protection()
        else:
            self._inject(write)

    def _carry_out(self, write: CrWrite, value: int) -> None:
        self._vcpu.set_cr(write.number, value)
        self._vcpu.advance(write.length)

    def _inject(self, write: CrWrite) -> None:
        # Bits 11:8, the general register, stay 0: the engine reports its value instead.
        self._ve.inject(VeInfo(ExitReason.CR_ACCESS, write.number, length=write.length))
