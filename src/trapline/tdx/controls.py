"""The TD-scope fields that steer the module and that the guest may write.

Source: TDX module 1.5.01, td_control_structures.h, metadata_td.c.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from trapline.rules.ruleset import RuleSet
    from trapline.tdx.vmm_interface import TdConfig

GPA_WIDTH_WIDE: Final = 52


class ControlsSnapshot(NamedTuple):
    """What `Controls.save` returns."""

    td_ctls: int
    notify_enables: int


class Controls:
    """TD_CTLS, NOTIFY_ENABLES and CONFIG_FLAGS."""

    def __init__(self, rules: "RuleSet", config: "TdConfig", gpa_width: int) -> None:
        self._pending_ve_disable = rules.mask("td_ctl", "PENDING_VE_DISABLE")
        self._notify_ept_faults = rules.mask("notify_enable", "NOTIFY_EPT_FAULTS")
        self._flexible_pending_ve = rules.mask("config_flag", "FLEXIBLE_PENDING_VE")
        disabled = config.attributes & rules.mask("attribute", "SEPT_VE_DISABLE")
        self.td_ctls = self._pending_ve_disable if disabled else 0
        self.notify_enables = 0
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

    def write_td_ctls(self, value: int) -> bool:
        """Set TD_CTLS as the guest asks; False where it may not."""
        if (self.td_ctls ^ value) & self._pending_ve_disable and not (
            self.config_flags & self._flexible_pending_ve
        ):
            return False
        self.td_ctls = value
        return True

    def save(self) -> ControlsSnapshot:
        """Return what the guest can change."""
        return ControlsSnapshot(self.td_ctls, self.notify_enables)

    def restore(self, snapshot: ControlsSnapshot) -> None:
        """Go back to a saved state."""
        self.td_ctls, self.notify_enables = snapshot
