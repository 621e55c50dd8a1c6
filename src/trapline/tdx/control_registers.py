"""MOV to CR0 and CR4: which bits the module owns, and what a write of them becomes.

A write that leaves the bits of the guest/host mask as the read shadow shows them runs
natively; all others reach the module, which injects #GP(0), injects #VE, or carries on.

Sources: TDX module 1.5.01, td_vmcs_init.c (masks and shadows), helpers.c (write_guest_cr0,
write_guest_cr4); table `instructions`, rows MOV CR0 and MOV CR4.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from trapline.cpu.engine import CrWrite
from trapline.rules.rows import InstructionRule, Outcome
from trapline.rules.ruleset import choose
from trapline.tdx.vmm_interface import ExitReason, TdConfig, VeInfo

if TYPE_CHECKING:
    from trapline.cpu.engine import Vcpu
    from trapline.rules.ruleset import RuleSet
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

EFER, EFER_LMA = 0xC000_0080, 1 << 10
CS_LONG = 1 << 21  # in the high word of a code segment descriptor


class ControlRegisters:
    """Handles Exit.CR_WRITE, and tells the engine which bits make it."""

    def __init__(self, vcpu: "Vcpu", ve: "VeState", rules: "RuleSet", config: TdConfig) -> None:
        self._vcpu = vcpu
        self._ve = ve
        features = CR4_KL | CR4_PKE  # neither is in the modelled CPU
        for bit, kind, names in (
            (CR4_CET, "xfam", ("CET_U", "CET_S")),
            (CR4_UINTR, "xfam", ("UINTR",)),
            (CR4_PKS, "attribute", ("PKS",)),
        ):
            wanted = rules.mask(kind, *names)
            held = config.xfam if kind == "xfam" else config.attributes
            if held & wanted != wanted:
                features |= bit
        self._cr4_features = features  # bits that XFAM and ATTRIBUTES do not allow
        owned = CR4_MCE | CR4_VMXE | CR4_SMXE | features | ~CR4_FIXED1
        self._cr4_owned = owned & _M64

        def does(mnemonic: str, condition: str) -> Callable[[CrWrite], None]:
            can: dict[Outcome, Callable[[CrWrite], None]] = {
                Outcome.GP: lambda _write: ve.general_protection(),
                Outcome.VE: self._inject,
                Outcome.NATIVE: self._carry_out,
            }
            if condition == "sets_ignored_bit":
                can[Outcome.EMULATED] = self._carry_out_without_ignored
            return choose(rules.ask(InstructionRule, mnemonic, condition), can)

        self._cr0_invalid = does("MOV CR0", "natively_invalid")
        self._cr0_clears_ne = does("MOV CR0", "clears_ne")
        self._cr0_clears_pe = does("MOV CR0", "clears_pe_and_pg")
        self._cr0_cache = does("MOV CR0", "sets_nw_or_cd")
        self._cr0_ignored = does("MOV CR0", "sets_ignored_bit")
        self._cr0_other = does("MOV CR0", "other")
        self._cr4_invalid = does("MOV CR4", "natively_invalid")
        self._cr4_not_allowed = does("MOV CR4", "feature_not_in_xfam_or_attributes")
        self._cr4_changes = does("MOV CR4", "changes_mce_vmxe_or_smxe")
        self._cr4_other = does("MOV CR4", "other")
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
            self._carry_out(write)

    def _write_cr0(self, write: CrWrite) -> None:
        value = write.value
        if not (value ^ CR0_SHADOW) & CR0_OWNED:
            (self._cr0_invalid if self._cr0_is_invalid(value) else self._cr0_other)(write)
        elif ~value & CR0_NE:
            self._cr0_clears_ne(write)
        elif (
            value & ~CR0_FIXED1
            or (value & CR0_PG and not value & CR0_PE)
            or (self._vcpu.cr(4) & CR4_CET and not value & CR0_WP)
        ):
            self._cr0_invalid(write)
        elif not value & CR0_PE:
            self._cr0_clears_pe(write)
        elif value & (CR0_NW | CR0_CD):
            self._cr0_cache(write)
        else:
            self._cr0_ignored(write)

    def _cr0_is_invalid(self, value: int) -> bool:
        """Say whether the CPU refuses a write that does not exit (SDM 3A, 2.5)."""
        if not value & CR0_PG and self._vcpu.msr(EFER) & EFER_LMA:
            return bool(self._vcpu.segment("cs").attributes & CS_LONG)
        return bool(self._vcpu.cr(4) & CR4_CET and not value & CR0_WP)

    def _write_cr4(self, write: CrWrite) -> None:
        value = write.value
        if not (value ^ CR4_MCE) & self._cr4_owned:
            without_pae = not value & CR4_PAE and self._vcpu.msr(EFER) & EFER_LMA
            (self._cr4_invalid if without_pae else self._cr4_other)(write)
        elif value & ~CR4_FIXED1 & ~self._cr4_features:
            self._cr4_invalid(write)
        elif value & self._cr4_features:
            self._cr4_not_allowed(write)
        else:
            self._cr4_changes(write)

    def _carry_out(self, write: CrWrite) -> None:
        self._vcpu.set_cr(write.number, write.value)
        self._vcpu.advance(write.length)

    def _carry_out_without_ignored(self, write: CrWrite) -> None:
        ignored = CR0_IGNORED if write.number == 0 else 0
        old = self._vcpu.cr(write.number)
        self._carry_out(write._replace(value=write.value & ~ignored | old & ignored))

    def _inject(self, write: CrWrite) -> None:
        # Bits 11:8, the general register, stay 0: the engine reports its value instead.
        self._ve.inject(VeInfo(ExitReason.CR_ACCESS, write.number, length=write.length))
