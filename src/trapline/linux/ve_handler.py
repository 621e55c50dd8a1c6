"""What Linux's #VE handler emulates, instruction form by instruction form.

The handler is `tdx_handle_virt_exception()` in arch/x86/coco/tdx/tdx.c; it first appeared in
v5.19 (commits 03149948832a for port I/O, ae87f609cd52 for MSRs, c141fa2c2bba for CPUID,
bfe6ed0c6727 for HLT, 31d58c4e557d for MMIO). MMIO goes through `insn_decode_mmio()` of
arch/x86/lib/insn-eval.c (commit 70a81f99e45b), then `handle_mmio()`. Read in v6.12 and v7.3;
the accepted forms are the same in both.

What only the running kernel can know is not decided here. Besides the form, the handler wants:
- MMIO: a kernel address (`fault_in_kernel_space()`, commit d4fc4d014715), CPL 0, an access that
  does not cross a page (commit 1e7769653b06), and a shared GPA; a private GPA panics;
- any class but CPUID: CPL 0;
- HLT: interrupts off, from v6.15 on (commit e8f45927ee5d);
- before the IDT is complete: port I/O only (`tdx_early_handle_ve()`).
"""

from typing import TYPE_CHECKING, Final, NamedTuple

from iced_x86 import Code, EncodingKind, OpCodeTableKind, OpKind, Register

from trapline.isa import traps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from iced_x86 import Instruction, OpCodeInfo

_TDX: Final = "arch/x86/coco/tdx/tdx.c"
_DECODER: Final = "arch/x86/lib/insn-eval.c"


class Emulation(NamedTuple):
    """The handler's answer to one instruction.

    `emulable`: the handler accepts the form and execution goes on behind it (also true of what
    the TDX module answers without a #VE). `reason` is one sentence without a full stop; it says
    so where the registers then are not what the processor itself would have left.
    """

    emulable: bool
    reason: str


class MmioForm(NamedTuple):
    """One case of `insn_decode_mmio()`.

    `opcode` is the opcode behind the prefixes, 0x0f00 added for the two-byte map. `kind` is the
    enumerator of `enum insn_mmio_type` without its prefix.
    """

    opcode: int
    name: str
    kind: str
    handled: bool
    source: str


# insn_decode_mmio() of v6.12, and what handle_mmio() does with each kind.
MMIO_FORMS: Final = (
    MmioForm(0x88, "MOV m8,r8", "WRITE", True, _DECODER),
    MmioForm(0x89, "MOV m,r", "WRITE", True, _DECODER),
    MmioForm(0xC6, "MOV m8,imm8", "WRITE_IMM", True, _DECODER),
    MmioForm(0xC7, "MOV m,imm", "WRITE_IMM", True, _DECODER),
    MmioForm(0x8A, "MOV r8,m8", "READ", True, _DECODER),
    MmioForm(0x8B, "MOV r,m", "READ", True, _DECODER),
    # SEV-ES emulates MOVS; handle_mmio() answers -EINVAL.
    MmioForm(0xA4, "MOVSB", "MOVS", False, _TDX),
    MmioForm(0xA5, "MOVS", "MOVS", False, _TDX),
    MmioForm(0x0FB6, "MOVZX r,m8", "READ_ZERO_EXTEND", True, _DECODER),
    MmioForm(0x0FB7, "MOVZX r,m16", "READ_ZERO_EXTEND", True, _DECODER),
    MmioForm(0x0FBE, "MOVSX r,m8", "READ_SIGN_EXTEND", True, _DECODER),
    MmioForm(0x0FBF, "MOVSX r,m16", "READ_SIGN_EXTEND", True, _DECODER),
)
UPSTREAM_KINDS: Final = frozenset(form.kind for form in MMIO_FORMS)
_MMIO_BY_OPCODE: Final = {form.opcode: form for form in MMIO_FORMS}

# handle_mmio() takes its register from insn_get_modrm_reg_ptr(), which numbers registers 0-15
# and has no high bytes: AH is SP there, and so on.
_HIGH_BYTES: Final = {
    Register.AH: ("AH", "SPL"),
    Register.CH: ("CH", "BPL"),
    Register.DH: ("DH", "SIL"),
    Register.BH: ("BH", "DIL"),
}
_LEGACY_PREFIXES: Final = bytes.fromhex("26 2e 36 3e 64 65 66 67 f0 f2 f3")
_REX: Final = range(0x40, 0x50)
_PREFIXES: Final = frozenset(_LEGACY_PREFIXES) | frozenset(_REX)
_GPR32: Final = frozenset(
    getattr(Register, name)
    for name in (
        *("EAX", "ECX", "EDX", "EBX", "ESP", "EBP", "ESI", "EDI"),
        *(f"R{number}D" for number in range(8, 16)),
    )
)


class VeHandler(NamedTuple):
    """What the #VE handler of one kernel can do.

    `present`: the kernel was built with CONFIG_INTEL_TDX_GUEST. `mmio_kinds`: the kinds its
    `insn_decode_mmio()` tells apart, empty when the function is missing. `exact_input`: IN leaves
    in RAX what the processor would (commits 0f63e656b1c6 and 941370fc93cc, v7.3 and stable); None
    where that is not known.
    """

    present: bool
    mmio_kinds: frozenset[str]
    exact_input: bool | None

    @classmethod
    def derive(
        cls,
        has_symbol: "Callable[[str], bool]",
        mmio_enumerators: frozenset[str] | None = None,
        has_inlined: "Callable[[str], bool] | None" = None,
    ) -> "VeHandler":
        """Describe a kernel's handler from the kernel itself.

        `has_symbol` says whether the kernel defines a function; `mmio_enumerators` are the names
        in its `enum insn_mmio_type` (`mmio_type` before v6.3) when its types are known: a kernel
        that adds a kind, or lacks one, is described as it is. `has_inlined` says whether its
        DWARF has a function of a name, inlined or not: the fix of port input brought
        insn_assign_reg() along.
        """
        kinds = UPSTREAM_KINDS
        if mmio_enumerators is not None:
            kinds = frozenset(
                name.removeprefix("INSN_").removeprefix("MMIO_") for name in mmio_enumerators
            )
        return cls(
            present=has_symbol("tdx_handle_virt_exception"),
            mmio_kinds=kinds if has_symbol("insn_decode_mmio") else frozenset(),
            exact_input=None if has_inlined is None else has_inlined("insn_assign_reg"),
        )


UPSTREAM: Final = VeHandler(present=True, mmio_kinds=UPSTREAM_KINDS, exact_input=True)

_ABSENT: Final = Emulation(
    False, "this kernel has no #VE handler: it was built without CONFIG_INTEL_TDX_GUEST"
)


def _accepted(reason: str) -> Emulation:
    return Emulation(True, reason)


def _refused(reason: str) -> Emulation:
    return Emulation(False, reason)


_STRING_IO: Final = _refused("handle_io() refuses string I/O")
_IN: "Final[Mapping[bool | None, Emulation]]" = {
    True: _accepted("handle_io() asks the VMM"),
    False: Emulation(
        True,
        "handle_io() asks the VMM; this kernel lacks commits 0f63e656b1c6 and 941370fc93cc: the bit"
        " above the result is cleared too, and INL keeps bits 63:33 of RAX",
    ),
    None: Emulation(
        True,
        "handle_io() asks the VMM; before commits 0f63e656b1c6 and 941370fc93cc the bit above the"
        " result is cleared too, and INL keeps bits 63:33 of RAX",
    ),
}
_OUT: Final = _accepted("handle_io() asks the VMM")
_NOT_A_CASE: Final = "virt_exception_kernel() has no case for it: a #VE here is an oops"
_UNDEFINED: Final = "the TDX module raises #UD, not #VE"

# Classes whose answer does not depend on operands.
_BY_CLASS: "Final[Mapping[str, Emulation]]" = {
    "cpuid": _accepted(
        "handle_cpuid() asks the VMM for leaves 0x40000000-0x4fffffff, all else reads as zero"
    ),
    "hlt": _accepted("handle_halt() asks the VMM; from v6.15 on only with interrupts off"),
    "mwait": _refused(_NOT_A_CASE),
    "monitor": _refused(_NOT_A_CASE),
    "wbinvd": _refused(_NOT_A_CASE),
    "vmcall": _refused(_NOT_A_CASE),
    "cr": _refused(
        "virt_exception_kernel() has no case for it; only changing a bit that the TDX module owns"
        " is a #VE"
    ),
    "tdcall": _accepted("TDCALL is the call to the TDX module itself, not a #VE"),
    "rdpmc": _refused("#GP(0), not #VE, unless the TD has ATTRIBUTES.PERFMON"),
    "encls": _refused(_UNDEFINED),
    "xsetbv": _accepted("the TDX module answers it, no #VE"),
}

# Forms that differ from the rest of their class.
_BY_CODE: "Final[Mapping[int, Emulation]]" = {
    Code.RDMSR: _accepted("read_msr() asks the VMM"),
    Code.WRMSR: _accepted("write_msr() asks the VMM"),
    Code.WRMSRNS: _accepted("write_msr() asks the VMM; WRMSRNS has WRMSR's exit reason"),
    Code.RDMSRLIST: _refused(_NOT_A_CASE),
    Code.WRMSRLIST: _refused(_NOT_A_CASE),
    Code.SEAMCALL: _refused(_UNDEFINED),
    Code.SEAMRET: _refused(_UNDEFINED),
    Code.SEAMOPS: _refused(_UNDEFINED),
    Code.VMMCALL: _refused("#UD: VMMCALL is AMD's"),
    Code.VMGEXIT: _refused("#UD: VMGEXIT is AMD's"),
    Code.PCONFIG: _refused(_NOT_A_CASE),
}


def emulable(
    instruction: "Instruction", handler: VeHandler = UPSTREAM, code: bytes = b""
) -> Emulation:
    """Say what `handler` makes of `instruction` when it traps.

    An instruction that does not trap by itself is judged as an MMIO access. `code` are its bytes;
    without them, its prefixes are taken to be in their order.
    """
    trap = traps.classify(instruction)
    if trap is None:
        return emulable_mmio(instruction, handler, code)
    if not handler.present and trap.kind not in {"tdcall", "xsetbv"}:
        return _ABSENT
    if trap.kind == "pio":
        if instruction.is_string_instruction:
            return _STRING_IO
        return _IN[handler.exact_input] if trap.access == "read" else _OUT
    answer = _BY_CODE.get(instruction.code) or _BY_CLASS.get(trap.kind)
    return answer or _refused(_UNDEFINED)


def emulable_mmio(
    instruction: "Instruction", handler: VeHandler = UPSTREAM, code: bytes = b""
) -> Emulation:
    """Say what `handler` makes of `instruction` when its memory operand is MMIO.

    `code` as in `emulable`.
    """
    if not handler.present:
        return _ABSENT
    if not handler.mmio_kinds:
        return _refused("this kernel has no insn_decode_mmio()")
    if _has_prefix_behind_rex(code):
        return _refused(
            "insn_get_prefixes() ends at a REX prefix: what is a prefix behind it to the processor"
            " is an opcode to insn_decode_mmio(), which has no case for it"
        )
    info = instruction.op_code()
    form = _MMIO_BY_OPCODE.get(_legacy_opcode(info))
    if form is None or not _has_memory(instruction):
        return _undecoded(info)
    if form.kind not in handler.mmio_kinds:
        return _refused(f"this kernel's insn_decode_mmio() does not know {form.name}")
    if not form.handled:
        return _refused(f"handle_mmio() refuses {form.name}, which insn_decode_mmio() decodes")
    return _flaw(instruction, form) or _accepted(f"handle_mmio() emulates {form.name}")


def _has_prefix_behind_rex(code: bytes) -> bool:
    """Say whether a REX prefix is followed by a prefix, where processors ignore it."""
    behind = code.lstrip(_LEGACY_PREFIXES)
    return len(behind) > 1 and behind[0] in _REX and behind[1] in _PREFIXES


def _flaw(instruction: "Instruction", form: MmioForm) -> Emulation | None:
    """Find what handle_mmio() accepts and gets wrong."""
    register = instruction.op1_register if form.kind == "WRITE" else instruction.op0_register
    if register in _HIGH_BYTES:
        meant, taken = _HIGH_BYTES[register]
        return Emulation(
            True, f"handle_mmio() emulates {form.name} with {taken} in place of {meant}"
        )
    if form.kind in {"READ_ZERO_EXTEND", "READ_SIGN_EXTEND"} and register in _GPR32:
        return Emulation(
            True,
            f"handle_mmio() emulates {form.name}, but keeps bits 63:32 of a 32-bit destination",
        )
    return None


def _undecoded(info: "OpCodeInfo") -> Emulation:
    """Judge what is no case of the decoder, or is one by mistake.

    The decoder looks at the opcode byte alone. For VEX and EVEX that is the byte behind the
    vector prefix, so that VSHUFPS (VEX.0F C6) and VEXPANDPS (EVEX.0F38 88) pass for a MOV.
    """
    form = _MMIO_BY_OPCODE.get(info.op_code)
    if info.encoding != EncodingKind.LEGACY and form is not None and form.handled:
        return Emulation(
            True,
            f"handle_mmio() takes {info.op_code_string} for {form.name} and emulates that",
        )
    return _refused(f"insn_decode_mmio() has no case for {info.op_code_string}")


def _legacy_opcode(info: "OpCodeInfo") -> int:
    """Give the key of `MMIO_FORMS`, or -1 for other maps and encodings."""
    if info.encoding != EncodingKind.LEGACY or info.op_code_len != 1:
        return -1
    if info.table == OpCodeTableKind.NORMAL:
        return int(info.op_code)
    if info.table == OpCodeTableKind.T0F:
        return 0x0F00 | int(info.op_code)
    return -1


def _has_memory(instruction: "Instruction") -> bool:
    return instruction.is_string_instruction or OpKind.MEMORY in {
        instruction.op_kind(number) for number in range(instruction.op_count)
    }
