"""Accesses that the second-level tables refuse, and operands of TDCALLs in guest memory.

An EPT violation becomes #VE, a TD exit or #PF by the half of the GPA space and the state of
the page. A TDCALL that names a GPA is checked alike, but there the module, not the CPU,
injects the #VE, so that a second one is #DF even for a shared page.

Sources: TDX module 1.5.01, td_ept_violation.c, td_other_exits.c, helpers.c
(check_gpa_validity, check_walk_and_map_guest_side_gpa), td_exit_stepping.c; table `memory`.
"""

from typing import TYPE_CHECKING, Final

from trapline.cpu.engine import Reg
from trapline.tdx.sept import SeptState, SharedState
from trapline.tdx.vmm_interface import ExitReason, ExtendedQualification, TdExit, VeInfo

if TYPE_CHECKING:
    from trapline.cpu.engine import Vcpu
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


class PageAccess:
    """Handles Exit.EPT_VIOLATION and hands out the memory operands of TDCALLs."""

    def __init__(
        self, vcpu: "Vcpu", ve: "VeState", vmm: "Vmm", sept: "Sept", controls: "Controls"
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
            self._beyond_shared_bit(info)
        elif access.gpa & self._shared_bit:
            self._shared(info, is_fetch=access.is_fetch)
        else:
            self._private(info)

    def _beyond_shared_bit(self, info: VeInfo) -> None:
        error = PFEC_PRESENT | PFEC_RESERVED
        if info.qualification & QUALIFICATION_WRITE:
            error |= PFEC_WRITE
        if info.qualification & QUALIFICATION_FETCH:
            error |= PFEC_FETCH
        if self._vcpu.cpl == 3:
            error |= PFEC_USER
        self._ve.page_fault(info.gla, error)

    def _shared(self, info: VeInfo, *, is_fetch: bool) -> None:
        state = self._sept.shared_state(info.gpa & ~self._shared_bit)
        if state == SharedState.MMIO and not is_fetch and self._ve.convert(info):
            return
        self._exit(info)

    def _private(self, info: VeInfo) -> None:
        if self._sept.private_state(info.gpa) != SeptState.PENDING:
            self._exit(info)
            self._look_for_stepping(info)
        elif self._controls.pending_ve_disable:
            self._exit(info, ExtendedQualification.PENDING_EPT_VIOLATION)
            self._look_for_stepping(info)
        else:
            self._ve.inject(info)

    def _exit(
        self, info: VeInfo, extended: ExtendedQualification = ExtendedQualification.NONE
    ) -> None:
        self._vmm.ept_violation(
            TdExit(
                status=0,
                reason=ExitReason.EPT_VIOLATION,
                qualification=info.qualification & ~CLEARED_FOR_VMM,
                extended_type=extended,
                gpa=info.gpa & PAGE_MASK,
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
        if self._suspects:
            self.notify(self._suspects[-1], info.qualification)

    def notify(self, gpa: int, qualification: int = QUALIFICATION_READ) -> bool:
        """Inject the notification #VE of TDH.VP.ENTER; False when it may not be injected.

        The guest must have asked for it (NOTIFY_ENABLES), NMIs must not be blocked, no event
        may be under delivery and VE_INFO must be free.
        """
        if (
            not self._controls.notify_ept_faults
            or self._vcpu.nmi_blocked
            or self._vcpu.vectoring is not None
            or self._ve.info is not None
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
                self._ve.inject(info)
            else:
                self._exit(info)
            return None
        if self._sept.private_state(offset) == SeptState.MAPPED:
            return self._vcpu.memory.ram[offset : offset + size]
        if self._sept.private_state(offset) != SeptState.PENDING:
            self._exit(info)
        elif self._controls.pending_ve_disable:
            self._exit(info, ExtendedQualification.PENDING_EPT_VIOLATION)
        else:
            self._ve.inject(info)
        return None

    # Snapshots.

    def save(self) -> tuple[int, int, tuple[int, ...]]:
        """Return what is remembered of suspected stepping."""
        return self._rip, self._violations, tuple(self._suspects)

    def restore(self, snapshot: tuple[int, int, tuple[int, ...]]) -> None:
        """Go back to a saved state."""
        self._rip, self._violations, suspects = snapshot
        self._suspects = list(suspects)
