"""Instructions that exit for their own sake: #VE, #GP or #UD by the table `instructions`.

RDMSR, WRMSR, CPUID, TDCALL and MOV to control registers have files of their own.

Source: TDX module 1.5.01, tdx_td_dispatcher.c, td_other_exits.c; layout of the I/O
qualification: SDM volume 3, table 28-5.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from trapline.base.errors import BadInputFileError
from trapline.cpu.engine import Exit
from trapline.rules.rows import InstructionRule, Outcome
from trapline.tdx.vmm_interface import VeInfo

if TYPE_CHECKING:
    from trapline.cpu.engine import Vcpu
    from trapline.rules.tables import RuleSet
    from trapline.tdx.ve_info import VeState
    from trapline.tdx.vmm_interface import TdConfig

ATTRIBUTE_PERFMON = 1 << 63

QUALIFICATION_IN = 1 << 3
QUALIFICATION_STRING = 1 << 4
QUALIFICATION_REP = 1 << 5
QUALIFICATION_IMMEDIATE = 1 << 6
PORT_SHIFT = 16
INFORMATION_ADDRESS_64 = 2 << 7  # instruction information of INS and OUTS

# Exit -> the question of the table. The CPU has checked CPL before it exits.
_QUESTIONS = {
    Exit.HLT: ("HLT", "cpl_0"),
    Exit.MONITOR: ("MONITOR", "cpl_0"),
    Exit.MWAIT: ("MWAIT", "cpl_0"),
    Exit.WBINVD: ("WBINVD", "cpl_0"),
    Exit.INVD: ("INVD", "cpl_0"),
    Exit.VMCALL: ("VMCALL", "always"),
}
_IO_QUESTIONS = {(True, False): "IN", (False, False): "OUT", (True, True): "INS"} | {
    (False, True): "OUTS"
}


class Instructions:
    """Handlers for the exits that only the table decides; `handlers` maps each exit to one."""

    def __init__(self, vcpu: "Vcpu", ve: "VeState", rules: "RuleSet", config: "TdConfig") -> None:
        self._vcpu = vcpu
        self._ve = ve
        self._followed = {row.key: row for row in rules.instructions if row.followed}
        self.handlers: dict[Exit, Callable[[], None]] = {
            exit_: self._handler(*question) for exit_, question in _QUESTIONS.items()
        }
        perfmon = "perfmon_on" if config.attributes & ATTRIBUTE_PERFMON else "perfmon_off"
        self.handlers[Exit.RDPMC] = self._handler("RDPMC", perfmon)
        self.handlers[Exit.UNDEFINED] = ve.undefined
        self.handlers[Exit.IO] = self._on_io
        self._io = {
            kind: self._handler(mnemonic, "always") for kind, mnemonic in _IO_QUESTIONS.items()
        }
        self._io_reason = self._rule("IN", "always").exit_reason or 0
        self._plain_io = all(
            self._rule(mnemonic, "always").outcome == Outcome.VE
            for mnemonic in _IO_QUESTIONS.values()
        )

    def _rule(self, mnemonic: str, condition: str) -> InstructionRule:
        row = self._followed.get((mnemonic, condition))
        if row is None:
            raise BadInputFileError(
                f"instructions.csv: nothing is followed for {mnemonic} ({condition}); add a row."
            )
        return row

    def _handler(self, mnemonic: str, condition: str) -> Callable[[], None]:
        """Turn a row into what to do."""
        row = self._rule(mnemonic, condition)
        if row.outcome == Outcome.VE:
            return partial(self._inject, row.exit_reason or 0)
        if row.outcome == Outcome.GP:
            return self._ve.general_protection
        if row.outcome == Outcome.UD:
            return self._ve.undefined
        if row.outcome == Outcome.NATIVE:
            return self._skip
        raise BadInputFileError(
            f"instructions.csv: {row.id} follows {row.outcome.value!r}, which the software TD "
            "cannot do; follow 've', 'gp', 'ud' or 'native'."
        )

    def _inject(self, reason: int) -> None:
        self._ve.inject(VeInfo(reason, length=self._vcpu.length))

    def _skip(self) -> None:
        self._vcpu.advance(self._vcpu.length)

    def _on_io(self) -> None:
        access = self._vcpu.io
        if not self._plain_io:
            self._io[access.is_in, access.is_string]()
            return
        qualification = access.size - 1 | access.port << PORT_SHIFT
        information = 0
        if access.is_in:
            qualification |= QUALIFICATION_IN
        if access.is_string:
            qualification |= QUALIFICATION_STRING
            information = INFORMATION_ADDRESS_64
            if access.has_rep:
                qualification |= QUALIFICATION_REP
        if access.immediate:
            qualification |= QUALIFICATION_IMMEDIATE
        self._ve.inject(
            VeInfo(self._io_reason, qualification, length=access.length, info=information)
        )
