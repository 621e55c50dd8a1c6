"""Instructions that exit for their own sake: #VE, #GP or #UD by the table `instructions`.

RDMSR, WRMSR, CPUID, TDCALL and MOV to control registers have files of their own.

Source: TDX module 1.5.01, tdx_td_dispatcher.c, td_other_exits.c; layout of the I/O
qualification: SDM volume 3, table 28-5.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

import iced_x86 as ix

from trapline.cpu.engine import Exit, Reg
from trapline.rules.rows import InstructionRule, Outcome
from trapline.rules.ruleset import choose
from trapline.tdx.vmm_interface import VeInfo

if TYPE_CHECKING:
    from trapline.cpu.engine import Vcpu
    from trapline.rules.ruleset import RuleSet
    from trapline.tdx.ve_info import VeState
    from trapline.tdx.vmm_interface import TdConfig

QUALIFICATION_IN = 1 << 3
QUALIFICATION_STRING = 1 << 4
QUALIFICATION_REP = 1 << 5
QUALIFICATION_IMMEDIATE = 1 << 6
PORT_SHIFT = 16
INFORMATION_ADDRESS_64 = 2 << 7  # instruction information of INS and OUTS

# Exit -> the question of the table. The CPU has checked CPL before it exits.
_QUESTIONS: Final = {
    Exit.HLT: ("HLT", "cpl_0"),
    Exit.MONITOR: ("MONITOR", "cpl_0"),
    Exit.MWAIT: ("MWAIT", "cpl_0"),
    Exit.INVD: ("INVD", "cpl_0"),
    Exit.VMCALL: ("VMCALL", "always"),
}
_IO_QUESTIONS: Final = {(True, False): "IN", (False, False): "OUT", (True, True): "INS"} | {
    (False, True): "OUTS"
}
# What the engine does not know, and what it is to a TD: the rest is #UD on any processor.
_UNKNOWN: Final = {
    ix.Mnemonic.GETSEC: ("GETSEC", "always"),
    ix.Mnemonic.RSM: ("RSM", "always"),
    ix.Mnemonic.VMCLEAR: ("VMCLEAR", "always"),
    ix.Mnemonic.VMLAUNCH: ("VMLAUNCH", "always"),
    ix.Mnemonic.VMPTRLD: ("VMPTRLD", "always"),
    ix.Mnemonic.VMPTRST: ("VMPTRST", "always"),
    ix.Mnemonic.VMREAD: ("VMREAD", "always"),
    ix.Mnemonic.VMRESUME: ("VMRESUME", "always"),
    ix.Mnemonic.VMWRITE: ("VMWRITE", "always"),
    ix.Mnemonic.VMXOFF: ("VMXOFF", "always"),
    ix.Mnemonic.VMXON: ("VMXON", "always"),
    ix.Mnemonic.INVEPT: ("INVEPT", "always"),
    ix.Mnemonic.INVVPID: ("INVVPID", "always"),
    ix.Mnemonic.VMFUNC: ("VMFUNC", "always"),
    ix.Mnemonic.ENCLS: ("ENCLS", "always"),
    ix.Mnemonic.ENCLV: ("ENCLV", "always"),
    ix.Mnemonic.SEAMCALL: ("SEAMCALL", "always"),
    ix.Mnemonic.VMMCALL: ("VMMCALL", "always"),
    ix.Mnemonic.PCONFIG: ("PCONFIG", "mktme_off"),
}
_UD2: Final = b"\x0f\x0b"
_REP_PREFIX: Final = 0xF3
_LONGEST: Final = 15
_PAGE: Final = 4096


class Instructions:
    """Handlers for the exits that only the table decides; `handlers` maps each exit to one."""

    def __init__(self, vcpu: "Vcpu", ve: "VeState", rules: "RuleSet", config: "TdConfig") -> None:
        self._vcpu = vcpu
        self._ve = ve
        self._rules = rules
        self.handlers: dict[Exit, Callable[[], None]] = {
            exit_: self.handler(*question) for exit_, question in _QUESTIONS.items()
        }
        perfmon = bool(config.attributes & rules.mask("attribute", "PERFMON"))
        rdpmc = {
            on: self.handler("RDPMC", f"perfmon_{'on' if on else 'off'}") for on in (True, False)
        }
        self.handlers[Exit.RDPMC] = rdpmc[perfmon]
        self._wbinvd = self.handler("WBINVD", "cpl_0")
        self._wbnoinvd = self.handler("WBNOINVD", "cpl_0")
        self.handlers[Exit.WBINVD] = self._on_wbinvd
        self._unknown = {
            mnemonic: self.handler(*question) for mnemonic, question in _UNKNOWN.items()
        }
        self.handlers[Exit.UNDEFINED] = self._on_undefined
        self.handlers[Exit.IO] = self._on_io
        rows = {kind: self._row(name, "always") for kind, name in _IO_QUESTIONS.items()}
        self._io = {kind: self._handler(row) for kind, row in rows.items()}
        self._io_reason = rows[True, False].exit_reason or 0
        self._plain_io = all(row.outcome == Outcome.VE for row in rows.values())

    def handler(
        self, mnemonic: str, condition: str, **more: Callable[[], None]
    ) -> Callable[[], None]:
        """Turn the row of a question into what to do; `more` is what it may say besides."""
        return self._handler(self._row(mnemonic, condition), more)

    def _row(self, mnemonic: str, condition: str) -> InstructionRule:
        return self._rules.ask(InstructionRule, mnemonic, condition)

    def _handler(
        self, row: InstructionRule, more: dict[str, Callable[[], None]] | None = None
    ) -> Callable[[], None]:
        can: dict[str, Callable[[], None]] = {
            Outcome.VE: partial(self._inject, row.exit_reason or 0),
            Outcome.GP: self._ve.general_protection,
            Outcome.UD: self._ve.undefined,
            Outcome.NATIVE: self._skip,
            **(more or {}),
        }
        return choose(row, can)

    def _inject(self, reason: int) -> None:
        self._ve.inject(VeInfo(reason, length=self._vcpu.length))

    def _skip(self) -> None:
        self._vcpu.advance(self._vcpu.length)

    def _on_wbinvd(self) -> None:
        vcpu = self._vcpu
        length = vcpu.length
        data = vcpu.read(int(vcpu.regs[Reg.RIP]), length) if length > len(_UD2) else None
        (self._wbnoinvd if data is not None and _REP_PREFIX in data else self._wbinvd)()

    def _on_undefined(self) -> None:
        vcpu = self._vcpu
        rip = int(vcpu.regs[Reg.RIP])
        data = vcpu.read(rip, _LONGEST) or vcpu.read(rip, -rip % _PAGE or 1)
        if data is None or data.startswith(_UD2):
            self._ve.undefined()
            return
        mnemonic = ix.Decoder(64, data, ip=rip).decode().mnemonic
        self._unknown.get(mnemonic, self._ve.undefined)()

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
