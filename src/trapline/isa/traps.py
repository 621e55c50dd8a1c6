"""Which instructions trap in a TD: class, direction and width of each.

"Trap" means that the instruction leaves the guest in VMX non-root mode under the controls the
TDX module sets, whatever the module then does (#VE, #GP, #UD, or an answer of its own): Intel SDM
vol. 3C, 26.1, and the exit dispatcher of the TDX module 1.5.01 (`tdx_td_dispatcher.c`). MMIO is
not decided here: any memory operand may be one, and only its address knows.

The table is indexed by iced's `Code`, which names the form (operand sizes included), so that a
scan of every instruction of a kernel costs one dictionary look-up each:

    for instruction in decoder:
        if instruction.code in BY_CODE:
            trap = classify(instruction)
"""

from typing import TYPE_CHECKING, Final, NamedTuple, cast

from iced_x86 import Code, Instruction, Mnemonic, Register

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    # At run time iced's enumerations are modules of integers; the types are only in its stubs.
    from iced_x86._iced_x86_py import Code as CodeValue

    from trapline.results.scan import Access
    from trapline.results.trapclass import TrapClass


class Trap(NamedTuple):
    """What one instruction form does.

    `width` is the size in bytes of what is transferred, per element for string forms; 0 where
    nothing is transferred or the size is not fixed.
    """

    kind: "TrapClass"
    access: "Access"
    width: int


# Mnemonics all of whose forms trap the same way.
_BY_MNEMONIC: Final[dict[str, Trap]] = {
    "INSB": Trap("pio", "read", 1),
    "INSW": Trap("pio", "read", 2),
    "INSD": Trap("pio", "read", 4),
    "OUTSB": Trap("pio", "write", 1),
    "OUTSW": Trap("pio", "write", 2),
    "OUTSD": Trap("pio", "write", 4),
    "RDMSR": Trap("msr", "read", 8),
    "WRMSR": Trap("msr", "write", 8),
    "WRMSRNS": Trap("msr", "write", 8),
    "RDMSRLIST": Trap("msr", "read", 0),  # up to 64 MSRs, chosen by RCX
    "WRMSRLIST": Trap("msr", "write", 0),
    "CPUID": Trap("cpuid", "read", 16),  # EAX, EBX, ECX, EDX
    "HLT": Trap("hlt", "execute", 0),
    # UMWAIT, TPAUSE and UMONITOR do not exit under the module's controls.
    "MWAIT": Trap("mwait", "execute", 0),
    "MWAITX": Trap("mwait", "execute", 0),
    "MONITOR": Trap("monitor", "execute", 0),
    "MONITORX": Trap("monitor", "execute", 0),
    "WBINVD": Trap("wbinvd", "execute", 0),
    "WBNOINVD": Trap("wbinvd", "execute", 0),  # exit reason 54, as WBINVD
    "INVD": Trap("wbinvd", "execute", 0),
    "LMSW": Trap("cr", "write", 2),
    "CLTS": Trap("cr", "write", 0),
    "TDCALL": Trap("tdcall", "execute", 0),
    "SEAMCALL": Trap("tdcall", "execute", 0),
    "SEAMRET": Trap("tdcall", "execute", 0),
    "SEAMOPS": Trap("tdcall", "execute", 0),
    "VMCALL": Trap("vmcall", "execute", 0),
    "VMMCALL": Trap("vmcall", "execute", 0),
    "VMGEXIT": Trap("vmcall", "execute", 0),  # AMD's F3-prefixed VMMCALL
    "RDPMC": Trap("rdpmc", "read", 8),
    "ENCLS": Trap("encls", "execute", 0),
    "ENCLV": Trap("encls", "execute", 0),
    "XSETBV": Trap("xsetbv", "write", 8),
    # The rest of the unconditional exits, and what the module turns into #UD.
    "GETSEC": Trap("other", "execute", 0),
    "GETSECQ": Trap("other", "execute", 0),
    "INVEPT": Trap("other", "execute", 0),
    "INVVPID": Trap("other", "execute", 0),
    "PCONFIG": Trap("other", "execute", 0),
    "RSM": Trap("other", "execute", 0),
    "VMCLEAR": Trap("other", "execute", 0),
    "VMFUNC": Trap("other", "execute", 0),
    "VMLAUNCH": Trap("other", "execute", 0),
    "VMPTRLD": Trap("other", "execute", 0),
    "VMPTRST": Trap("other", "execute", 0),
    "VMREAD": Trap("other", "execute", 0),
    "VMRESUME": Trap("other", "execute", 0),
    "VMWRITE": Trap("other", "execute", 0),
    "VMXOFF": Trap("other", "execute", 0),
    "VMXON": Trap("other", "execute", 0),
}

# Mnemonics of which only some forms trap, or whose width is in the form.
_BY_FORM: Final[dict[str, Trap]] = {
    "IN_AL_DX": Trap("pio", "read", 1),
    "IN_AL_IMM8": Trap("pio", "read", 1),
    "IN_AX_DX": Trap("pio", "read", 2),
    "IN_AX_IMM8": Trap("pio", "read", 2),
    "IN_EAX_DX": Trap("pio", "read", 4),
    "IN_EAX_IMM8": Trap("pio", "read", 4),
    "OUT_DX_AL": Trap("pio", "write", 1),
    "OUT_IMM8_AL": Trap("pio", "write", 1),
    "OUT_DX_AX": Trap("pio", "write", 2),
    "OUT_IMM8_AX": Trap("pio", "write", 2),
    "OUT_DX_EAX": Trap("pio", "write", 4),
    "OUT_IMM8_EAX": Trap("pio", "write", 4),
    "MOV_CR_R32": Trap("cr", "write", 4),  # code that runs in 32-bit mode
    "MOV_CR_R64": Trap("cr", "write", 8),
}

# CR2 is never intercepted, the module leaves CR3 and CR8 (the virtual TPR) to the guest.
_TRAPPING_CRS: Final = frozenset({Register.CR0, Register.CR4})
_MOV_TO_CR: Final = frozenset({Code.MOV_CR_R32, Code.MOV_CR_R64})


def _table() -> "dict[int, Trap]":
    by_mnemonic = {getattr(Mnemonic, name): trap for name, trap in _BY_MNEMONIC.items()}
    table: dict[int, Trap] = {getattr(Code, name): trap for name, trap in _BY_FORM.items()}
    probe = Instruction()
    for code in _codes():
        probe.code = code
        if trap := by_mnemonic.get(probe.mnemonic):
            table[code] = trap
    return table


def _codes() -> "Iterator[CodeValue]":
    """Give all instruction forms: iced's `Code` is a module of integers when it runs."""
    for name, value in vars(Code).items():
        if name.isupper() and isinstance(value, int):
            yield cast("CodeValue", value)


BY_CODE: "Final[Mapping[int, Trap]]" = _table()


def classify(instruction: Instruction) -> Trap | None:
    """Say how `instruction` traps, or None when it does not trap by itself.

    The table decides alone except for MOV to a control register, where the register does.
    """
    trap = BY_CODE.get(instruction.code)
    if trap is None:
        return None
    if instruction.code in _MOV_TO_CR and instruction.op0_register not in _TRAPPING_CRS:
        return None
    return trap
