"""MSRs that the host answers for: those that KVM emulates for a TD.

The list is that of `tdx_has_emulated_msr` (Linux, arch/x86/kvm/vmx/tdx.c), what it answers that
of `kvm_get_msr_common` and `kvm_set_msr_common` (x86.c) and of mtrr.c. Every other MSR is refused,
which the guest turns into #GP. Local APIC registers go to the APIC. Left out are
ARCH_CAPABILITIES, which a TD never asks the host for, and the CPUID faulting that KVM offers in
PLATFORM_INFO; there are no machine check banks, so their registers are refused as KVM does then.
"""

from enum import IntEnum
from typing import Final

from trapline.machine.devices.lapic import APIC_ID, ApicMsr, LocalApic

X2APIC: Final = range(0x800, 0x900)


class Msr(IntEnum):
    """MSR indices (SDM 4, chapter 2)."""

    APIC_BASE = 0x1B
    FEATURE_CONTROL = 0x3A
    MICROCODE_REVISION = 0x8B
    MTRR_CAP = 0xFE
    PLATFORM_INFO = 0xCE
    MISC_FEATURES_ENABLES = 0x140
    MCG_CAP = 0x179
    MCG_STATUS = 0x17A
    MISC_ENABLE = 0x1A0
    POWER_CTL = 0x1FC
    PAT = 0x277
    MTRR_DEF_TYPE = 0x2FF
    EFER = 0xC000_0080


APIC_BASE_ENABLED: Final = 1 << 11
APIC_BASE_X2APIC: Final = 1 << 10
APIC_BASE_BSP: Final = 1 << 8
APIC_BASE_VALUE: Final = 0xFEE0_0000 | APIC_BASE_ENABLED | APIC_BASE_X2APIC | APIC_BASE_BSP
FEATURE_CONTROL_LOCKED: Final = 1
MTRR_CAP_VALUE: Final = 0x508  # eight variable ranges, fixed ranges, write combining
MISC_ENABLE_READ_ONLY: Final = 1 << 12 | 1 << 11  # MSR_IA32_MISC_ENABLE_PMU_RO_MASK
MISC_ENABLE_VALUE: Final = MISC_ENABLE_READ_ONLY  # neither PEBS nor BTS
PAT_VALUE: Final = 0x0007_0406_0007_0406  # at reset (SDM 3A, 12.12)
EFER_VALUE: Final = 0xD01  # SCE, LME, LMA, NX: a TD cannot leave 64-bit mode
MTRR_PHYSICAL: Final = range(0x200, 0x210)  # base and mask of each range
MTRR_FIXED: Final = (0x250, 0x258, 0x259, *range(0x268, 0x270))
MTRR_TYPES: Final = frozenset((0, 1, 4, 5, 6))
PAT_TYPES: Final = MTRR_TYPES | {7}
MTRR_RESERVED: Final = 0xFFF << 52
# KVM's default: the revision is in the upper half.
MICROCODE_REVISION: Final = 1 << 32

# Writes are refused.
_READ_ONLY: Final[dict[int, int]] = {
    Msr.APIC_BASE: APIC_BASE_VALUE,
    Msr.FEATURE_CONTROL: FEATURE_CONTROL_LOCKED,
    Msr.PLATFORM_INFO: 0,
    Msr.MTRR_CAP: MTRR_CAP_VALUE,
    Msr.MCG_CAP: 0,  # no machine check banks
    Msr.EFER: EFER_VALUE,
}
# Writes have no effect: only the host's own change the revision.
_FIXED: Final[dict[int, int]] = {Msr.MICROCODE_REVISION: MICROCODE_REVISION}
_WRITABLE: Final[dict[int, int]] = {
    Msr.MISC_FEATURES_ENABLES: 0,
    Msr.MCG_STATUS: 0,
    Msr.MISC_ENABLE: MISC_ENABLE_VALUE,
    Msr.POWER_CTL: 0,
    Msr.PAT: PAT_VALUE,
    Msr.MTRR_DEF_TYPE: 0,
    **dict.fromkeys((*MTRR_PHYSICAL, *MTRR_FIXED), 0),
}
MAX_NOTED: Final = 1024


class HostMsrs:
    """RDMSR and WRMSR calls; `refused` counts the calls that were refused, by index."""

    def __init__(self, apic: LocalApic) -> None:
        assert APIC_ID == 0, "APIC_BASE says that this is the boot processor"
        self._apic = apic
        self._values = dict(_WRITABLE)
        self.refused: dict[int, int] = {}

    def read(self, index: int) -> int | None:
        """Return the value, or None where the call fails."""
        if index in X2APIC or index == ApicMsr.TSC_DEADLINE:
            value = self._apic.read_msr(index)
        else:
            value = self._values.get(index, _READ_ONLY.get(index, _FIXED.get(index)))
        if value is None:
            self._refuse(index)
        return value

    def write(self, index: int, value: int) -> bool:
        """Write; False where the call fails."""
        if index in X2APIC or index == ApicMsr.TSC_DEADLINE:
            done = self._apic.write_msr(index, value)
        elif index in self._values:
            done = _is_valid(index, value)
            if done:
                self._values[index] = value
        else:
            done = index in _FIXED
        if not done:
            self._refuse(index)
        return done

    def _refuse(self, index: int) -> None:
        if index in self.refused or len(self.refused) < MAX_NOTED:
            self.refused[index] = self.refused.get(index, 0) + 1


def _is_valid(index: int, value: int) -> bool:
    """Say whether KVM takes a value (kvm_mtrr_valid, kvm_pat_valid)."""
    if index == Msr.MISC_FEATURES_ENABLES:
        return value == 0  # PLATFORM_INFO offers nothing
    if index == Msr.MISC_ENABLE:
        return value & MISC_ENABLE_READ_ONLY == MISC_ENABLE_VALUE
    if index == Msr.PAT:
        return PAT_TYPES.issuperset(value.to_bytes(8, "little"))
    if index in MTRR_FIXED:
        return MTRR_TYPES.issuperset(value.to_bytes(8, "little"))
    if index == Msr.MTRR_DEF_TYPE:
        return not value & ~0xCFF and value & 0xFF in MTRR_TYPES
    if index in MTRR_PHYSICAL:
        if index & 1:  # the mask
            return not value & (MTRR_RESERVED | 0x7FF)
        return not value & (MTRR_RESERVED | 0xF00) and value & 0xFF in MTRR_TYPES
    return True
