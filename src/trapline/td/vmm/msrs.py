"""MSRs that the host answers for: those that KVM emulates for a TD.

The list is that of `tdx_has_emulated_msr` (Linux, arch/x86/kvm/vmx/tdx.c); every other MSR is
refused, which the guest turns into #GP. Local APIC registers go to the APIC.
"""

from enum import IntEnum
from typing import Final

from trapline.td.devices.lapic import APIC_ID, ApicMsr, LocalApic

X2APIC: Final = range(0x800, 0x900)


class Msr(IntEnum):
    """MSR indices (SDM 4, chapter 2)."""

    APIC_BASE = 0x1B
    FEATURE_CONTROL = 0x3A
    MICROCODE_REVISION = 0x8B
    PLATFORM_INFO = 0xCE
    MISC_FEATURES_ENABLES = 0x140
    MCG_CAP = 0x179
    MCG_STATUS = 0x17A
    POWER_CTL = 0x1FC


APIC_BASE_ENABLED: Final = 1 << 11
APIC_BASE_X2APIC: Final = 1 << 10
APIC_BASE_BSP: Final = 1 << 8
APIC_BASE_VALUE: Final = 0xFEE0_0000 | APIC_BASE_ENABLED | APIC_BASE_X2APIC | APIC_BASE_BSP
FEATURE_CONTROL_LOCKED: Final = 1
# KVM's default: the revision is in the upper half.
MICROCODE_REVISION: Final = 1 << 32

_READ_ONLY: Final[dict[int, int]] = {
    Msr.APIC_BASE: APIC_BASE_VALUE,
    Msr.FEATURE_CONTROL: FEATURE_CONTROL_LOCKED,
    Msr.PLATFORM_INFO: 0,
    Msr.MCG_CAP: 0,  # no machine check banks
    Msr.MISC_FEATURES_ENABLES: 0,
}
_WRITABLE: Final[dict[int, int]] = {
    Msr.MICROCODE_REVISION: MICROCODE_REVISION,
    Msr.MCG_STATUS: 0,
    Msr.POWER_CTL: 0,
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
            value = self._values.get(index, _READ_ONLY.get(index))
        if value is None:
            self._refuse(index)
        return value

    def write(self, index: int, value: int) -> bool:
        """Write; False where the call fails."""
        if index in X2APIC or index == ApicMsr.TSC_DEADLINE:
            done = self._apic.write_msr(index, value)
        elif index in self._values:
            self._values[index] = value
            done = True
        else:
            # Rewriting what is there succeeds: the guest may set what is already so.
            done = _READ_ONLY.get(index) == value
        if not done:
            self._refuse(index)
        return done

    def _refuse(self, index: int) -> None:
        if index in self.refused or len(self.refused) < MAX_NOTED:
            self.refused[index] = self.refused.get(index, 0) + 1
