"""The TD-scope fields that steer the module and that the guest may write.

What a module does not know of TD_CTLS and FEATURE_PARAVIRT_CTLS is no enforced row of the table
`attributes`, and no bit that the table `fields` lets the guest write.

Sources: TDX module 1.5.01, td_control_structures.h, metadata_td.c; 1.5.28, metadata_td.c
(md_td_write_element), helpers.c (update_mutable_cpuid_flags).
"""

from typing import TYPE_CHECKING, Final, NamedTuple

from trapline.rules.rows import Feature
from trapline.tdx.switches import features_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from trapline.rules.ruleset import RuleSet
    from trapline.tdx.vmm_interface import TdConfig

GPA_WIDTH_WIDE: Final = 52
# CPUID flags that are on unless #VE is reduced; the others only if the VMM has set them.
_ON: Final = frozenset((Feature.MTRR, Feature.MCA, Feature.CORE_CAPABILITIES))
# The bits of FEATURE_PARAVIRT_CTLS, and the flags that they let through where #VE is reduced.
_PARAVIRT: Final = (
    ("CORE_CAPABILITIES", Feature.CORE_CAPABILITIES),
    ("DCA", Feature.DCA),
    ("EST", Feature.EST),
    ("MCA", Feature.MCA),
    ("MTRR", Feature.MTRR),
    ("PCONFIG", Feature.MKTME),
    ("RDT_A", Feature.RDT_A),
    ("RDT_M", Feature.RDT_M),
    ("ACPI", Feature.ACPI),
    ("TM2", Feature.TM2),
    ("TME", Feature.TME),
    ("TSC_DEADLINE", Feature.TSC_DEADLINE),
)


class ControlsSnapshot(NamedTuple):
    """What `Controls.save` returns."""

    td_ctls: int
    notify_enables: int
    feature_paravirt_ctls: int


class Controls:
    """TD_CTLS, NOTIFY_ENABLES, FEATURE_PARAVIRT_CTLS and CONFIG_FLAGS.

    `on_features` is told what is on whenever that may have changed.
    """

    def __init__(self, rules: "RuleSet", config: "TdConfig", gpa_width: int) -> None:
        self._pending_ve_disable = rules.mask("td_ctl", "PENDING_VE_DISABLE")
        self._notify_ept_faults = rules.mask("notify_enable", "NOTIFY_EPT_FAULTS")
        self._flexible_pending_ve = rules.mask("config_flag", "FLEXIBLE_PENDING_VE")
        disabled = config.attributes & rules.mask("attribute", "SEPT_VE_DISABLE")
        self.td_ctls = self._pending_ve_disable if disabled else 0
        self.notify_enables = 0
        self.feature_paravirt_ctls = 0
        self.on_features: Callable[[frozenset[Feature]], None] | None = None
        self._given = features_of(rules, config)
        self._topology_configured = config.topology_configured
        self._enum_topology = rules.mask_if_known("td_ctl", "ENUM_TOPOLOGY")
        self._virt_cpuid2 = rules.mask_if_known("td_ctl", "VIRT_CPUID2")
        self._reduce_ve = rules.mask_if_known("td_ctl", "REDUCE_VE")
        self._lock = rules.mask_if_known("td_ctl", "LOCK")
        self._paravirt = tuple(
            (rules.mask_if_known("feature_paravirt_ctl", name), feature)
            for name, feature in _PARAVIRT
        )
        self.no_rbp_mod = config.no_rbp_mod
        self.config_flags = sum(
            mask
            for mask, wanted in (
                (rules.mask("config_flag", "GPAW"), gpa_width == GPA_WIDTH_WIDE),
                (self._flexible_pending_ve, config.flexible_pending_ve),
                (rules.mask("config_flag", "NO_RBP_MOD"), config.no_rbp_mod),
            )
            if wanted
        )

    @property
    def pending_ve_disable(self) -> bool:
        """Whether an access to a PENDING page is a TD exit and not a #VE."""
        return bool(self.td_ctls & self._pending_ve_disable)

    @property
    def notify_ept_faults(self) -> bool:
        """Whether the guest wants to be told of suspected zero-stepping."""
        return bool(self.notify_enables & self._notify_ept_faults)

    @property
    def topology_configured(self) -> bool:
        """Whether the VMM gave each VCPU an x2APIC id (TOPOLOGY_ENUM_CONFIGURED)."""
        return self._topology_configured

    def features(self) -> frozenset[Feature]:
        """Name what is on for MSRs and CPUID leaves."""
        switches = {
            feature
            for mask, feature in (
                (self._enum_topology, Feature.ENUM_TOPOLOGY),
                (self._virt_cpuid2, Feature.VIRT_CPUID2),
                (self._reduce_ve, Feature.REDUCE_VE),
            )
            if self.td_ctls & mask
        }
        on = self._given | _ON | switches
        if Feature.REDUCE_VE in switches:
            asked = self.feature_paravirt_ctls
            on -= {feature for mask, feature in self._paravirt if not asked & mask}
        return frozenset(on)

    def write_td_ctls(self, value: int) -> bool:
        """Set TD_CTLS as the guest asks; False where it may not."""
        changed = self.td_ctls ^ value
        if self.td_ctls & self._lock:
            return not changed
        if changed & self._pending_ve_disable and not (
            self.config_flags & self._flexible_pending_ve
        ):
            return False
        if value & self._reduce_ve:
            value |= self._enum_topology | self._virt_cpuid2
        if value & self._enum_topology and not self._topology_configured:
            return False
        self.td_ctls = value
        self._tell()
        return True

    def write_feature_paravirt_ctls(self, value: int) -> bool:
        """Set FEATURE_PARAVIRT_CTLS; False where the guest may not."""
        if self.td_ctls & self._lock:
            return value == self.feature_paravirt_ctls
        self.feature_paravirt_ctls = value
        self._tell()
        return True

    def _tell(self) -> None:
        if self.on_features is not None:
            self.on_features(self.features())

    def save(self) -> ControlsSnapshot:
        """Return what the guest can change."""
        return ControlsSnapshot(self.td_ctls, self.notify_enables, self.feature_paravirt_ctls)

    def restore(self, snapshot: ControlsSnapshot) -> None:
        """Go back to a saved state."""
        self.td_ctls, self.notify_enables, self.feature_paravirt_ctls = snapshot
        self._tell()
