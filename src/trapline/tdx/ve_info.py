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

from trapline.cpu.engine import Reg
from trapline.rules.rows import MemoryRule, NestingRule, Outcome
from trapline.rules.ruleset import choose

if TYPE_CHECKING:
    from collections.abc import Callable

    from trapline.cpu.engine import Vcpu
    from trapline.rules.ruleset import RuleSet
    from trapline.tdx.vmm_interface import TrapListener, VeInfo

VECTOR_UD = 6
VECTOR_DF = 8
VECTOR_GP = 13
VECTOR_PF = 14
VECTOR_MC = 18
VECTOR_VE = 20
RFLAGS_RF = 1 << 16

# What the rules for a second #VE may say: vector and error code.
_SECOND_VE = {
    Outcome.DF: (VECTOR_DF, 0),
    Outcome.GP: (VECTOR_GP, 0),
}
# What they may say of an EPT violation on MMIO: whether it becomes a #VE, or vector and error.
_CONVERTED: dict[Outcome, bool | tuple[int, int]] = {
    Outcome.VE: True,
    Outcome.TD_EXIT: False,
    **_SECOND_VE,
}


class VeSnapshot(NamedTuple):
    """What `VeState.save` returns."""

    info: "VeInfo | None"
    nmis: int


class VeState:
    """VE_INFO and PEND_NMI of the one VCPU, and the delivery of the module's exceptions.

    `listeners` are told of traps; the list is the module's, which changes it. `divert` is asked
    before each #VE, at the instruction; True means that it carried the instruction out.
    """

    def __init__(self, vcpu: "Vcpu", rules: "RuleSet", listeners: "list[TrapListener]") -> None:
        self.info: VeInfo | None = None  # None: VALID is 0
        self.nmis = 0  # held: PEND_NMI
        self._nmi_window = False  # NMI-window exiting is on
        self.listeners = listeners
        self.divert: Callable[[VeInfo], bool] | None = None
        #: Why the last #DF or #GP of the module came, or why an access became no #VE.
        self.because = ""
        self._vcpu = vcpu

        def event(question: str, condition: str) -> NestingRule:
            return rules.ask(NestingRule, question, condition)

        def mmio(condition: str) -> MemoryRule:
            return rules.ask(MemoryRule, "any", "shared", "mmio", condition)

        second = event("second-ve", "injected_by_module")
        operand = event("second-ve", "tdcall_operand")
        converted = event("second-ve", "delivered_by_cpu_mmio")
        vectoring = mmio("during_event_delivery")
        self._second = choose(second, _SECOND_VE)
        self._second_operand = choose(operand, _SECOND_VE)
        busy = "VE_INFO was still in use when the next #VE was due"
        self._second_because = f"{busy} (rule {second.id})"
        self._operand_because = f"{busy} (rule {operand.id})"
        self._busy_because = (
            f"VE_INFO was still in use, so that it could become no #VE (rule {converted.id})"
        )
        self._vectoring_because = (
            f"an event was being delivered, so that it could become no #VE (rule {vectoring.id})"
        )
        rf = {Outcome.RF_SET: RFLAGS_RF, Outcome.RF_KEPT: 0}
        self._rf = choose(event("ve-delivery", "injected_by_module"), rf)
        self._mmio_free = choose(mmio("ve_info_free"), _CONVERTED)
        self._mmio_busy = choose(converted, _CONVERTED)
        self._mmio_vectoring = choose(vectoring, _CONVERTED)
        held = {Outcome.HELD: True, Outcome.DELIVERED: False}
        self._valid_holds_nmi = choose(event("nmi", "ve_info_valid"), held)
        self._free_holds_nmi = choose(event("nmi", "after_veinfo_get"), held)
        self._nmis_merge = choose(
            event("nmi", "several_pended"), {Outcome.MERGED: True, Outcome.DELIVERED: False}
        )

    # Exceptions of the module; each is taken at the instruction, which has not executed.

    def inject(self, info: "VeInfo") -> None:
        """#VE by the module, or what the rules say when VE_INFO is still valid."""
        if self.divert is not None and self.divert(info):
            return
        self._raise(info, self._second, self._second_because)

    def inject_for_operand(self, info: "VeInfo") -> None:
        """#VE by the module for a memory operand of a TDCALL."""
        if self.divert is not None and self.divert(info):
            return
        self._raise(info, self._second_operand, self._operand_because)

    def _raise(self, info: "VeInfo", second: tuple[int, int], because: str) -> None:
        vcpu = self._vcpu
        is_second = self.info is not None
        if is_second:
            self.because = because
        for listener in self.listeners:
            listener.on_ve(vcpu.regs[Reg.RIP], info, double_fault=is_second)
        vcpu.rflags |= self._rf
        if is_second:
            vcpu.deliver(*second)
        else:
            self.info = info
            vcpu.deliver(VECTOR_VE)

    def convert(self, info: "VeInfo") -> bool:
        """#VE by the CPU for an EPT violation; False when the violation is not convertible.

        By the rules it is not while VE_INFO is valid, nor during event delivery; and the CPU
        converts none with CR0.PE clear.
        """
        vcpu = self._vcpu
        if self.divert is not None and self.divert(info):
            return True
        if not vcpu.cr(0) & 1:
            self.because = "the processor makes no #VE with CR0.PE clear"
            return False
        if self.info is not None:
            answer = self._mmio_busy
            self.because = self._busy_because
        else:
            self.because = self._vectoring_because
            answer = self._mmio_free if vcpu.vectoring is None else self._mmio_vectoring
        if answer is True:
            self._raise(info, self._second, self._second_because)
        elif isinstance(answer, tuple):
            vcpu.rflags |= self._rf
            vcpu.deliver(*answer)
        return answer is not False

    def general_protection(self) -> None:
        """#GP(0)."""
        self._vcpu.rflags |= self._rf
        self._vcpu.deliver(VECTOR_GP, 0)

    def undefined(self) -> None:
        """#UD."""
        self._vcpu.rflags |= self._rf
        self._vcpu.deliver(VECTOR_UD)

    def page_fault(self, gla: int, error_code: int) -> None:
        """#PF with CR2."""
        self._vcpu.set_cr(2, gla)
        self._vcpu.rflags |= self._rf
        self._vcpu.deliver(VECTOR_PF, error_code)

    # Collection by the guest.

    def take(self) -> "VeInfo | None":
        """TDG.VP.VEINFO.GET: hand out VE_INFO and free it."""
        info, self.info = self.info, None
        return info

    # NMIs.

    def pend_nmi(self) -> None:
        """Hold an NMI for the guest, as TDH.VP.WR of PEND_NMI does; several become one."""
        self.nmis = 1 if self._nmis_merge else self.nmis + 1
        self.arm_nmi_window()

    def _nmi_may_come(self) -> bool:
        held = self._free_holds_nmi if self.info is None else self._valid_holds_nmi
        return self.nmis > 0 and not held

    def arm_nmi_window(self) -> None:
        """Ask for NMI-window exiting if an NMI is held and VE_INFO is free."""
        if not self._nmi_window and self._nmi_may_come():
            self._nmi_window = True
            self._vcpu.request_nmi_window(wanted=True)

    def on_nmi_window(self) -> None:
        """NMIs are not blocked here: deliver the held one, unless a #VE came in between."""
        if self._nmi_may_come():
            self.nmis -= 1
            self._vcpu.deliver_nmi()
        self._nmi_window = False
        self._vcpu.request_nmi_window(wanted=False)

    # Snapshots.

    def save(self) -> VeSnapshot:
        """Return VE_INFO and PEND_NMI."""
        return VeSnapshot(self.info, self.nmis)

    def restore(self, snapshot: VeSnapshot) -> None:
        """Go back to a saved state; the engine's NMI window is made to fit it."""
        self.info, self.nmis = snapshot
        self._nmi_window = self._nmi_may_come()
        self._vcpu.request_nmi_window(wanted=self._nmi_window)
