"""VE_INFO, the #VE that fills it, and the NMI that waits for it.

The module injects #VE for instructions, MSRs, CPUID leaves, control registers and PENDING
pages; the CPU itself delivers it for accesses to MMIO pages. Both need VE_INFO to be free and
mark it valid; TDG.VP.VEINFO.GET frees it. What happens when it is not free is read from the
table `nesting`. RFLAGS.RF is set in the image that is pushed, for every exception the module
injects.

Sources: TDX module 1.5.01, td_other_exits.c (tdx_inject_ve, td_nmi_exit), tdh_vp_enter.c;
SDM volume 3, "Virtualization Exceptions" and "Convertible EPT Violations".
"""

from typing import TYPE_CHECKING, NamedTuple

from trapline.base.errors import BadInputFileError
from trapline.cpu.engine import Reg
from trapline.rules.rows import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from trapline.cpu.engine import Vcpu
    from trapline.rules.tables import RuleSet
    from trapline.tdx.vmm_interface import TrapListener, VeInfo

VECTOR_UD = 6
VECTOR_DF = 8
VECTOR_GP = 13
VECTOR_PF = 14
VECTOR_MC = 18
VECTOR_VE = 20
RFLAGS_RF = 1 << 16

# What the followed rule for a second #VE may be: vector and error code.
_SECOND_VE = {
    Outcome.DF: (VECTOR_DF, 0),
    Outcome.GP: (VECTOR_GP, 0),
}


class VeSnapshot(NamedTuple):
    """What `VeState.save` returns."""

    info: "VeInfo | None"
    nmi_pending: bool


class VeState:
    """VE_INFO and PEND_NMI of the one VCPU, and the delivery of the module's exceptions.

    `listeners` are told of traps; the list is the module's, which changes it. `divert` is asked
    before each #VE, at the instruction; True means that it carried the instruction out.
    """

    def __init__(self, vcpu: "Vcpu", rules: "RuleSet", listeners: "list[TrapListener]") -> None:
        self.info: VeInfo | None = None  # None: VALID is 0
        self.nmi_pending = False
        self._nmi_window = False  # NMI-window exiting is on
        self.listeners = listeners
        self.divert: Callable[[VeInfo], bool] | None = None
        self._vcpu = vcpu
        self._second_vector, self._second_error = _second_ve(rules)

    # Exceptions of the module; each is taken at the instruction, which has not executed.

    def inject(self, info: "VeInfo") -> None:
        """#VE by the module, or what the rules say when VE_INFO is still valid."""
        if self.divert is not None and self.divert(info):
            return
        self._raise(info)

    def _raise(self, info: "VeInfo") -> None:
        vcpu = self._vcpu
        second = self.info is not None
        for listener in self.listeners:
            listener.on_ve(vcpu.regs[Reg.RIP], info, double_fault=second)
        vcpu.rflags |= RFLAGS_RF
        if second:
            vcpu.deliver(self._second_vector, self._second_error)
        else:
            self.info = info
            vcpu.deliver(VECTOR_VE)

    def convert(self, info: "VeInfo") -> bool:
        """#VE by the CPU for an EPT violation; False when the violation is not convertible.

        It is not while VE_INFO is valid, during event delivery, or with CR0.PE clear.
        """
        vcpu = self._vcpu
        if self.divert is not None and self.divert(info):
            return True
        if self.info is not None or vcpu.vectoring is not None or not vcpu.cr(0) & 1:
            return False
        self._raise(info)
        return True

    def general_protection(self) -> None:
        """#GP(0)."""
        self._vcpu.rflags |= RFLAGS_RF
        self._vcpu.deliver(VECTOR_GP, 0)

    def undefined(self) -> None:
        """#UD."""
        self._vcpu.rflags |= RFLAGS_RF
        self._vcpu.deliver(VECTOR_UD)

    def page_fault(self, gla: int, error_code: int) -> None:
        """#PF with CR2."""
        self._vcpu.set_cr(2, gla)
        self._vcpu.rflags |= RFLAGS_RF
        self._vcpu.deliver(VECTOR_PF, error_code)

    # Collection by the guest.

    def take(self) -> "VeInfo | None":
        """TDG.VP.VEINFO.GET: hand out VE_INFO and free it."""
        info, self.info = self.info, None
        return info

    # NMIs.

    def pend_nmi(self) -> None:
        """Hold an NMI for the guest, as TDH.VP.WR of PEND_NMI does; several become one."""
        self.nmi_pending = True
        self.arm_nmi_window()

    def arm_nmi_window(self) -> None:
        """Ask for NMI-window exiting if an NMI is held and VE_INFO is free."""
        if self.nmi_pending and self.info is None and not self._nmi_window:
            self._nmi_window = True
            self._vcpu.request_nmi_window(wanted=True)

    def on_nmi_window(self) -> None:
        """NMIs are not blocked here: deliver the held one, unless a #VE came in between."""
        if self.nmi_pending and self.info is None:
            self.nmi_pending = False
            self._vcpu.deliver_nmi()
        self._nmi_window = False
        self._vcpu.request_nmi_window(wanted=False)

    # Snapshots.

    def save(self) -> VeSnapshot:
        """Return VE_INFO and PEND_NMI."""
        return VeSnapshot(self.info, self.nmi_pending)

    def restore(self, snapshot: VeSnapshot) -> None:
        """Go back to a saved state; the engine's NMI window is made to fit it."""
        self.info, self.nmi_pending = snapshot
        self._nmi_window = self.nmi_pending and self.info is None
        self._vcpu.request_nmi_window(wanted=self._nmi_window)


def _second_ve(rules: "RuleSet") -> tuple[int, int]:
    for row in rules.nesting:
        if row.followed and row.key == ("second-ve", "injected_by_module"):
            if row.outcome not in _SECOND_VE:
                raise BadInputFileError(
                    f"nesting.csv: {row.id} follows {row.outcome.value!r}, which the software "
                    "TD cannot do; follow 'df' or 'gp'."
                )
            return _SECOND_VE[row.outcome]
    raise BadInputFileError("nesting.csv: nothing is followed for a second #VE; add a row.")
