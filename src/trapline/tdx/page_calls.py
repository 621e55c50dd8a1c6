"""TDCALL leaves about pages: MEM.PAGE.ACCEPT, MEM.PAGE.ATTR.RD and MEM.PAGE.ATTR.WR.

Sources: TDX module 1.5.01, tdg_mem_page_accept.c, tdg_mem_page_attr_rd.c,
tdg_mem_page_attr_wr.c, td_other_exits.c (async_tdexit_ept_violation).
"""

from typing import TYPE_CHECKING, Final

from trapline.cpu.engine import Reg
from trapline.tdx.completions import RAISE_GP, TD_EXIT
from trapline.tdx.page_access import QUALIFICATION_WRITE
from trapline.tdx.sept import (
    LARGE_SIZE,
    LEVEL_2M,
    LEVEL_4K,
    PAGE_SIZE,
    Accept,
    AcceptResult,
    SeptState,
)
from trapline.tdx.vmm_interface import ExitReason, ExtendedQualification, TdExit

if TYPE_CHECKING:
    from trapline.cpu.engine import Vcpu
    from trapline.tdx.completions import Completions
    from trapline.tdx.page_access import PageAccess
    from trapline.tdx.sept import Sept
    from trapline.tdx.vmm_interface import Vmm

ACCEPT: Final = 6  # leaves
ATTRIBUTES_READ: Final = 23
ATTRIBUTES_WRITE: Final = 24
SUCCESS: Final = 0
LEVEL_MASK: Final = 7
LEVEL_1G: Final = 2
PAGE_INFO_RESERVED: Final = 0xFFF << 52 | 0x1FF << 3
PAGE_INFO_GPA: Final = 0x000F_FFFF_FFFF_F000
ATTRIBUTES_PENDING: Final = 1 << 12  # in the page information that ATTR.RD returns
_LEVEL_SHIFT = {LEVEL_4K: 12, LEVEL_2M: 21, LEVEL_1G: 30}


class PageCalls:
    """The page leaves of one TD."""

    def __init__(
        self,
        vcpu: "Vcpu",
        vmm: "Vmm",
        completions: "Completions",
        sept: "Sept",
        access: "PageAccess",
    ) -> None:
        self._vcpu = vcpu
        self._vmm = vmm
        self._sept = sept
        self._access = access
        of = completions.of
        self._accepted = of(ACCEPT, "ok")
        self._bad_accept = of(ACCEPT, "bad_gpa_or_level")
        self._not_accepted = of(ACCEPT, "not_pending", may_exit=True)
        self._failed = {
            AcceptResult.ALREADY_ACCEPTED: of(ACCEPT, "already_accepted"),
            AcceptResult.SIZE_MISMATCH: of(ACCEPT, "size_mismatch"),
        }
        self._read = of(ATTRIBUTES_READ, "ok")
        self._bad_read = of(ATTRIBUTES_READ, "bad_gpa")
        self._not_read = of(ATTRIBUTES_READ, "not_mapped", may_exit=True)
        self._bad_attributes = of(ATTRIBUTES_WRITE, "attributes_not_0")
        self._bad_flags = of(ATTRIBUTES_WRITE, "flags_not_0")
        self._bad_write = of(ATTRIBUTES_WRITE, "bad_gpa_or_level")
        self._not_written = of(None, "unknown_leaf")

    def accept(self) -> int | None:
        """TDG.MEM.PAGE.ACCEPT."""
        page = self._page_information(self._vcpu.regs[Reg.RCX], LEVEL_2M)
        if page is None:
            return self._bad_accept
        gpa, level = page
        outcome = self._sept.accept(gpa, level)
        if outcome.result is AcceptResult.ACCEPTED:
            return self._accepted
        failed = self._failed.get(outcome.result)
        if failed is not None:
            return failed if failed == RAISE_GP else failed | outcome.level
        if self._not_accepted != TD_EXIT:
            return self._not_accepted
        self._not_pending(gpa, level, outcome)
        return None

    def attributes_read(self) -> int | None:
        """TDG.MEM.PAGE.ATTR.RD."""
        regs = self._vcpu.regs
        gpa = regs[Reg.RCX]
        if not self._access.is_valid(gpa, private_only=True):
            regs[Reg.RCX] = regs[Reg.RDX] = 0
            return self._bad_read
        state = self._sept.private_state(gpa)
        if state not in {SeptState.MAPPED, SeptState.PENDING}:
            if self._not_read != TD_EXIT:
                return self._not_read
            self._vmm.ept_violation(
                TdExit(SUCCESS, ExitReason.EPT_VIOLATION, gpa=gpa & PAGE_INFO_GPA)
            )
            return None
        level = self._sept.level(gpa)
        size = LARGE_SIZE if level == LEVEL_2M else PAGE_SIZE
        pending = ATTRIBUTES_PENDING if state == SeptState.PENDING else 0
        regs[Reg.RCX] = gpa & ~(size - 1) | level | pending
        regs[Reg.RDX] = 0
        return self._read

    def attributes_write(self) -> int:
        """TDG.MEM.PAGE.ATTR.WR: refused, there are no L2 VMs to give attributes to."""
        regs = self._vcpu.regs
        if regs[Reg.RDX]:
            return self._bad_attributes
        if regs[Reg.R8]:
            return self._bad_flags
        if self._page_information(regs[Reg.RCX], LEVEL_1G) is None:
            return self._bad_write
        return self._not_written

    def _page_information(self, value: int, highest: int) -> tuple[int, int] | None:
        """Split a GPA and level as RCX holds them; None if they are not valid."""
        level = value & LEVEL_MASK
        gpa = value & PAGE_INFO_GPA
        if (
            value & PAGE_INFO_RESERVED
            or level > highest
            or gpa & ((1 << _LEVEL_SHIFT[level]) - 1)
            or not self._access.is_valid(gpa, private_only=True)
        ):
            return None
        return gpa, level

    def _not_pending(self, gpa: int, level: int, outcome: Accept) -> None:
        information = level | outcome.level << 3 | outcome.state.public << 6 | outcome.is_leaf << 14
        self._vmm.ept_violation(
            TdExit(
                status=SUCCESS,
                reason=ExitReason.EPT_VIOLATION,
                qualification=QUALIFICATION_WRITE,
                extended_type=ExtendedQualification.ACCEPT,
                extended_info=information,
                gpa=gpa,
            )
        )
