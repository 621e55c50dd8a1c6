"""Accesses that the second-level tables refuse, and operands of TDCALLs in guest memory.

An EPT violation becomes #VE, a TD exit or #PF by the half of the GPA space and the state of
the page. A TDCALL that names a GPA is checked alike, but there the module, not the CPU,
injects the #VE, so that a second one is #DF even for a shared page.

Sources: TDX module 1.5.01, td_ept_violation.c, td_other_exits.c, helpers.c
(check_gpa_validity, check_walk_and_map_guest_side_gpa), td_exit_stepping.c; table `memory`.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from trapline.cpu.engine import Reg
from trapline.rules.rows import MemoryRule, NestingRule, Outcome
from trapline.rules.ruleset import choose
from trapline.tdx.sept import SeptState, SharedState
from trapline.tdx.vmm_interface import ExitReason, ExtendedQualification, TdExit, VeInfo

if TYPE_CHECKING:
    from trapline.cpu.engine import Vcpu
    from trapline.rules.ruleset import RuleSet
    from trapline.tdx.controls import Controls
    from trapline.tdx.sept import Sept
    from trapline.tdx.ve_info import VeState
    from trapline.tdx.vmm_interface import Vmm

QUALIFICATION_READ, QUALIFICATION_WRITE, QUALIFICATION_FETCH = 1 << 0, 1 << 1, 1 << 2
QUALIFICATION_GLA_VALID, QUALIFICATION_NOT_WALK = 1 << 7, 1 << 8
CLEARED_FOR_VMM: Final = 0x3F << 7  # bits 12:7
PAGE_MASK: Final = ~0xFFF
PFEC_PRESENT, PFEC_WRITE, PFEC_USER, PFEC_RESERVED, PFEC_FETCH = 1, 2, 4, 8, 16
STEPPING_THRESHOLD: Final = 6  # EPT violations at one RIP (td_exit_stepping.h)
STEPPING_GPAS: Final = 32  # EPF_GPA_LIST_SIZE
_Violation = Callable[[VeInfo], None]
# Half, state and condition of a row of `memory`, as the cause of what it says.
_BECAUSE: Final = {
    ("private", "pending", "pending_ve_disabled"): "the page had not been accepted",
    ("private", "pending", "pending_ve_enabled"): "the page had not been accepted",
    ("private", "free", "always"): "the TD has no page there",
    ("private", "free", "page_was_converted_to_shared"): "the page had been made shared",
    ("private", "blocked", "always"): "the host has blocked the page",
    ("shared", "absent", "always"): "the host has nothing there",
    ("shared", "absent", "page_is_private"): "the page is private, and was not made shared",
    ("shared", "mmio", "always"): "device memory holds no code, and no operand",
    ("beyond", "any", "gpaw_0_with_gla"): "no physical address is as high",
}


class PageAccess:
    """Handles Exit.EPT_VIOLATION and hands out the memory operands of TDCALLs."""

    def __init__(
        self,
        vcpu: "Vcpu",
        ve: "VeState",
        vmm: "Vmm",
        rules: "RuleSet",
        sept: "Sept",
        controls: "Controls",
    ) -> None:
        self._vcpu = vcpu
        self._ve = ve
        self._vmm = vmm
        self._sept = sept
        self._controls = controls
        self._shared_bit = vcpu.memory.shared_bit
        self._gpa_end = vcpu.memory.shared_bit << 1
        # Suspected zero-stepping: private violations at `_rip` since it last changed.
        self._rip = -1
        self._violations = 0
        self._suspects: list[int] = []
        self._rules = rules
        self._resolve()
        self._resolve_operands()
        self._resolve_notifications()

    # What the rules say, as what to do.

    def _resolve(self) -> None:
        pending = ExtendedQualification.PENDING_EPT_VIOLATION
        self._pending = {
            True: self._row("any", "private", "pending", "pending_ve_disabled", extended=pending),
            False: self._row("any", "private", "pending", "pending_ve_enabled", extended=pending),
        }
        self._free = self._row("any", "private", "free", "always")
        self._converted = self._row("any", "private", "free", "page_was_converted_to_shared")
        self._blocked = self._row("any", "private", "blocked", "always")
        self._absent = self._row("any", "shared", "absent", "always")
        self._over_private = self._row("any", "shared", "absent", "page_is_private")
        self._fetch = self._row("fetch", "shared", "mmio", "always")
        self._beyond = self._row("any", "beyond", "any", "gpaw_0_with_gla")

    def _resolve_operands(self) -> None:
        pending = ExtendedQualification.PENDING_EPT_VIOLATION
        who = "tdcall_operand"
        self._operand_pending = {
            True: self._row(who, "private", "pending", "pending_ve_disabled", extended=pending),
            False: self._row(who, "private", "pending", "pending_ve_enabled", extended=pending),
        }
        self._operand_unmapped = self._row(who, "private", "free", "always")
        self._operand_mmio = self._row(who, "shared", "mmio", "always")
        self._operand_absent = self._row(who, "shared", "absent", "always")

    def _resolve_notifications(self) -> None:
        def may(condition: str) -> bool:
            row = self._rules.ask(NestingRule, "notification-ve", condition)
            return choose(row, {Outcome.VE: True, Outcome.NOT_INJECTED: False})

        self._stepping_notifies = may("same_rip_ept_violations")
        self._notifies_nmi_blocked = may("nmi_blocked")
        self._notifies_vectoring = may("idt_vectoring")
        self._notifies_busy = may("ve_info_valid")

    def _row(
        self,
        access: str,
        half: str,
        state: str,
        condition: str,
        *,
        extended: ExtendedQualification = ExtendedQualification.NONE,
    ) -> _Violation:
        row = self._rules.ask(MemoryRule, access, half, state, condition)
        because = f"{_BECAUSE.get((half, state, condition), state)} (rule {row.id})"
        by_operand = access == "tdcall_operand"
        counted = half == "private" and not by_operand
        can: dict[Outcome, _Violation] = {
            Outcome.VE: self._ve.inject_for_operand if by_operand else self._ve.inject,
            Outcome.TD_EXIT: partial(
                self._exit_private if counted else self._exit,
                extended=extended,
                because=because,
            ),
            Outcome.GP: lambda _info: self._ve.general_protection(),
            Outcome.PF: self._page_fault,
        }
        return choose(row, can)

    # What happens.

    def on_ept_violation(self) -> None:
        """Turn an access that found no mapping into what the guest or the VMM sees."""
        access = self._vcpu.ept
        qualification = QUALIFICATION_GLA_VALID
        if not access.is_walk:
            qualification |= QUALIFICATION_NOT_WALK
        if access.is_fetch:
            qualification |= QUALIFICATION_FETCH
        else:
            qualification |= QUALIFICATION_WRITE if access.is_write else QUALIFICATION_READ
        info = VeInfo(ExitReason.EPT_VIOLATION, qualification, access.gla, access.gpa)
        if access.gpa >= self._gpa_end:
            self._beyond(info)
        elif access.gpa & self._shared_bit:
            self._shared(info, is_fetch=access.is_fetch)
        else:
            self._private(info)

    def _page_fault(self, info: VeInfo) -> None:
        error = PFEC_PRESENT | PFEC_RESERVED
        if info.qualification & QUALIFICATION_WRITE:
            error |= PFEC_WRITE
        if info.qualification & QUALIFICATION_FETCH:
            error |= PFEC_FETCH
        if self._vcpu.cpl == 3:
            error |= PFEC_USER
        self._ve.page_fault(info.gla, error)

    def _shared(self, info: VeInfo, *, is_fetch: bool) -> None:
        gpa = info.gpa & ~self._shared_bit
        if self._sept.shared_state(gpa) == SharedState.MMIO:
            if is_fetch:
                self._fetch(info)
            elif not self._ve.convert(info):
                self._exit(info, because=self._ve.because)
        elif self._sept.private_state(gpa) == SeptState.MAPPED:
            self._over_private(info)
        else:
            self._absent(info)

    def _private(self, info: VeInfo) -> None:
        state = self._sept.private_state(info.gpa)
        if state == SeptState.PENDING:
            self._pending[self._controls.pending_ve_disable](info)
        elif state != SeptState.FREE:
            self._blocked(info)
        elif self._sept.shared_state(info.gpa) == SharedState.MAPPED:
            self._converted(info)
        else:
            self._free(info)

    def _exit_private(
        self,
        info: VeInfo,
        extended: ExtendedQualification = ExtendedQualification.NONE,
        because: str = "",
    ) -> None:
        self._exit(info, extended, because)
        self._look_for_stepping(info)

    def _exit(
        self,
        info: VeInfo,
        extended: ExtendedQualification = ExtendedQualification.NONE,
        because: str = "",
    ) -> None:
        self._vmm.ept_violation(
            TdExit(
                status=0,
                reason=ExitReason.EPT_VIOLATION,
                qualification=info.qualification & ~CLEARED_FOR_VMM,
                extended_type=extended,
                gpa=info.gpa & PAGE_MASK,
                because=because,
            )
        )

    # Zero-stepping.

    def _look_for_stepping(self, info: VeInfo) -> None:
        """Count private violations without progress; maybe tell the guest on re-entry."""
        rip = self._vcpu.regs[Reg.RIP]
        if rip != self._rip:
            self._rip, self._violations, self._suspects = rip, 0, []
        gpa = info.gpa & PAGE_MASK
        if self._violations < STEPPING_THRESHOLD:
            self._violations += 1
        elif len(self._suspects) < STEPPING_GPAS and gpa not in self._suspects:
            self._suspects.append(gpa)
        if self._suspects and self._stepping_notifies:
            self.notify(self._suspects[-1], info.qualification)

    def notify(self, gpa: int, qualification: int = QUALIFICATION_READ) -> bool:
        """Inject the notification #VE of TDH.VP.ENTER; False when it may not be injected.

        The guest must have asked for it (NOTIFY_ENABLES), NMIs must not be blocked, no event
        may be under delivery and VE_INFO must be free.
        """
        if (
            not self._controls.notify_ept_faults
            or (self._vcpu.nmi_blocked and not self._notifies_nmi_blocked)
            or (self._vcpu.vectoring is not None and not self._notifies_vectoring)
            or (self._ve.info is not None and not self._notifies_busy)
        ):
            return False
        self._ve.inject(VeInfo(ExitReason.EPT_VIOLATION, qualification, 0, gpa))
        return True

    # Operands of TDCALLs.

    def is_valid(self, gpa: int, *, private_only: bool) -> bool:
        """check_gpa_validity(): no bit above the shared bit, and maybe not that either."""
        return gpa < (self._shared_bit if private_only else self._gpa_end)

    def operand(self, gpa: int, size: int, *, write: bool) -> memoryview | None:
        """Return the bytes at a valid GPA, or None once the TDCALL has ended otherwise.

        It ends with a #VE for MMIO and PENDING pages, or with a TD exit; in both cases the
        instruction has not executed. The bytes must not cross a page.
        """
        offset = gpa & ~self._shared_bit
        qualification = QUALIFICATION_WRITE if write else QUALIFICATION_READ
        info = VeInfo(ExitReason.EPT_VIOLATION, qualification, 0, gpa)
        if gpa & self._shared_bit:
            state = self._sept.shared_state(offset)
            if state == SharedState.MAPPED:
                return self._vcpu.memory.shared_ram[offset : offset + size]
            if state == SharedState.MMIO:
                self._operand_mmio(info)
            else:
                self._operand_absent(info)
            return None
        if self._sept.private_state(offset) == SeptState.MAPPED:
            return self._vcpu.memory.ram[offset : offset + size]
        if self._sept.private_state(offset) != SeptState.PENDING:
            self._operand_unmapped(info)
        else:
            self._operand_pending[self._controls.pending_ve_disable](info)
        return None

    # Snapshots.

    def save(self) -> tuple[int, int, tuple[int, ...]]:
        """Return what is remembered of suspected stepping."""
        return self._rip, self._violations, tuple(self._suspects)

    def restore(self, snapshot: tuple[int, int, tuple[int, ...]]) -> None:
        """Go back to a saved state."""
        self._rip, self._violations, suspects = snapshot
        self._suspects = list(suspects)
