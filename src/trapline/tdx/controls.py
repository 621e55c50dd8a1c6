"""The TD-scope fields that steer the module and that the guest may write.

Source: TDX module 1.5.01, td_control_structures.h, metadata_td.c.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from trapline.tdx.vmm_interface import TdConfig

ATTRIBUTE_SEPT_VE_DISABLE: Final = 1 << 28
PENDING_VE_DISABLE: Final = 1 << 0  # TD_CTLS
NOTIFY_EPT_FAULTS: Final = 1 << 0  # NOTIFY_ENABLES
GPAW, FLEXIBLE_PENDING_VE, NO_RBP_MOD = 1 << 0, 1 << 1, 1 << 2  # CONFIG_FLAGS
GPA_WIDTH_WIDE: Final = 52


class ControlsSnapshot(NamedTuple):
    """What `Controls.save` returns."""

    td_ctls: int
    notify_enables: int


class Controls:
    """TD_CTLS, NOTIFY_ENABLES and CONFIG_FLAGS."""

    def __init__(self, config: "TdConfig", gpa_width: int) -> None:
        self.td_ctls = PENDING_VE_DISABLE if config.attributes & ATTRIBUTE_SEPT_VE_DISABLE else 0
        self.notify_enables = 0
        self.config_flags = GPAW if gpa_width == GPA_WIDTH_WIDE else 0
        if config.flexible_pending_ve:
            self.config_flags |= FLEXIBLE_PENDING_VE
        if config.no_rbp_mod:
            self.config_flags |= NO_RBP_MOD

    @property
    def pending_ve_disable(self) -> bool:
        """Whether an access to a PENDING page is a TD exit and not a #VE."""
        return bool(self.td_ctls & PENDING_VE_DISABLE)

    @property
    def notify_ept_faults(self) -> bool:
        """Whether the guest wants to be told of suspected zero-stepping."""
        return bool(self.notify_enables & NOTIFY_EPT_FAULTS)

    def save(self) -> ControlsSnapshot:
        """Return what the guest can change."""
        return ControlsSnapshot(self.td_ctls, self.notify_enables)

    def restore(self, snapshot: ControlsSnapshot) -> None:
        """Go back to a saved state."""
        self.td_ctls, self.notify_enables = snapshot
