"""Memory operands and the text of instructions, as binutils prints it.

Text is in AT&T syntax as `objdump -d` of GNU binutils prints it, with single spaces. A second,
normalised text leaves out what a rebuild moves (addresses, RIP-relative displacements, branch
targets): finding ids are made from it.
"""

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from iced_x86 import (
    Formatter,
    FormatterSyntax,
    InstructionInfoFactory,
    MemorySizeExt,
    OpAccess,
    OpKind,
    Register,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from iced_x86 import Instruction
    from iced_x86._iced_x86_py import Register as RegisterValue

    from trapline.results.scan import Access

_ACCESS: "Final[dict[int, Access]]" = {
    OpAccess.READ: "read",
    OpAccess.COND_READ: "read",
    OpAccess.WRITE: "write",
    OpAccess.COND_WRITE: "write",
    OpAccess.READ_WRITE: "read-write",
    OpAccess.READ_COND_WRITE: "read-write",
}

# The implied operands of string instructions: register and default segment.
_STRING_BASES: "Final[Mapping[int, RegisterValue]]" = {
    OpKind.MEMORY_SEG_SI: Register.SI,
    OpKind.MEMORY_SEG_ESI: Register.ESI,
    OpKind.MEMORY_SEG_RSI: Register.RSI,
    OpKind.MEMORY_SEG_DI: Register.DI,
    OpKind.MEMORY_SEG_EDI: Register.EDI,
    OpKind.MEMORY_SEG_RDI: Register.RDI,
    OpKind.MEMORY_ESDI: Register.DI,
    OpKind.MEMORY_ESEDI: Register.EDI,
    OpKind.MEMORY_ESRDI: Register.RDI,
}
_ES_KINDS: Final = frozenset({OpKind.MEMORY_ESDI, OpKind.MEMORY_ESEDI, OpKind.MEMORY_ESRDI})
_MEMORY_KINDS: Final = frozenset({OpKind.MEMORY, *_STRING_BASES})

_IMMEDIATE_KINDS: Final = frozenset(
    {OpKind.IMMEDIATE32, OpKind.IMMEDIATE64, OpKind.IMMEDIATE32TO64}
)
_BRANCH_KINDS: Final = frozenset({OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH64})

# Kernel text, data, modules and fixmap: Documentation/arch/x86/x86_64/mm.rst. Constants in this
# range are taken for addresses when text is normalised; the small negative numbers above it are
# not.
_KERNEL_LOW: Final = 0xFFFF_FFFF_8000_0000
_KERNEL_HIGH: Final = 0xFFFF_FFFF_FF60_0000
_MASK64: Final = (1 << 64) - 1


# A displacement as the formatter writes it.
_MOVING_DISPLACEMENT: Final = re.compile(r"-?0x[0-9a-f]+")
_INDEX_WITHOUT_SCALE: Final = re.compile(r"(\([^(),]*,%[a-z0-9]+)\)")


class MemoryOperand(NamedTuple):
    """One explicit or string memory operand.

    `base` and `index_register` are lower-case register names without "%", or None;
    `displacement` is signed, and for a RIP-relative operand the absolute target address.
    `segment` is the segment register in effect. `width` is in bytes.
    """

    base: str | None
    index_register: str | None
    scale: int
    displacement: int
    segment: str
    width: int
    access: "Access"

    @property
    def is_rip_relative(self) -> bool:
        """Whether `displacement` is the target of a RIP-relative operand."""
        return self.base in {"rip", "eip"}

    @property
    def is_stack(self) -> bool:
        """Whether the operand is based on the stack pointer, so never device memory."""
        return self.base in {"rsp", "esp"}


_info = InstructionInfoFactory()
_register_names: Final = Formatter(FormatterSyntax.INTEL)


def register_name(register: "RegisterValue") -> str | None:
    """Name a `Register` in lower case without "%"; None for `Register.NONE`."""
    if register == Register.NONE:
        return None
    name: str = _register_names.format_register(register)
    return name


def memory_operands(instruction: "Instruction") -> tuple[MemoryOperand, ...]:
    """List the operands of `instruction` that access memory, in Intel operand order.

    LEA, NOP and prefetches have a memory operand that accesses nothing: not listed. Nor are
    the implied stack accesses of PUSH, CALL and the like. MOVS and CMPS have two.
    """
    kinds = [instruction.op_kind(number) for number in range(instruction.op_count)]
    if _MEMORY_KINDS.isdisjoint(kinds):
        return ()
    info = _info.info(instruction)
    return tuple(
        _operand(instruction, kind, access)
        for number, kind in enumerate(kinds)
        if kind in _MEMORY_KINDS and (access := _ACCESS.get(info.op_access(number))) is not None
    )


def memory_operand(instruction: "Instruction") -> MemoryOperand | None:
    """Return the one memory operand of `instruction`; None when it has none or two."""
    operands = memory_operands(instruction)
    return operands[0] if len(operands) == 1 else None


def _operand(instruction: "Instruction", kind: int, access: "Access") -> MemoryOperand:
    width = MemorySizeExt.size(instruction.memory_size)
    if kind == OpKind.MEMORY:
        displacement = instruction.memory_displacement
        if displacement > _MASK64 >> 1:
            displacement -= 1 << 64
        return MemoryOperand(
            base=register_name(instruction.memory_base),
            index_register=register_name(instruction.memory_index),
            scale=instruction.memory_index_scale,
            displacement=displacement,
            segment=register_name(instruction.memory_segment) or "ds",
            width=width,
            access=access,
        )
    segment = "es" if kind in _ES_KINDS else register_name(instruction.memory_segment) or "ds"
    return MemoryOperand(register_name(_STRING_BASES[kind]), None, 1, 0, segment, width, access)


def _gas() -> Formatter:
    formatter = Formatter(FormatterSyntax.GAS)
    formatter.uppercase_hex = False
    formatter.small_hex_numbers_in_decimal = False
    formatter.rip_relative_addresses = True
    formatter.branch_leading_zeros = False
    formatter.displacement_leading_zeros = False
    formatter.show_zero_displacements = True
    return formatter


_formatter: Final = _gas()


def format_instruction(instruction: "Instruction") -> str:
    """Write `instruction` as `objdump -d` does, with single spaces and no symbols."""
    return _with_scale(_formatter.format(instruction))


def normalise(instruction: "Instruction") -> str:
    """Write `instruction` without what moves from build to build.

    Branch targets, RIP-relative and absolute displacements, and constants in the range of
    kernel addresses become "@"; offsets into structures stay.
    """
    parts = [_formatter.format_mnemonic(instruction)]
    count = _formatter.operand_count(instruction)
    if count:
        parts.append(",".join(_normalised_operand(instruction, number) for number in range(count)))
    return " ".join(parts)


def _normalised_operand(instruction: "Instruction", number: int) -> str:
    position = _formatter.get_instruction_operand(instruction, number)
    if position is None:
        return str(_formatter.format_operand(instruction, number))
    kind = instruction.op_kind(position)
    if kind in _BRANCH_KINDS:
        return "@"
    if kind in _IMMEDIATE_KINDS and _is_kernel_address(instruction.immediate(position)):
        return "$@"
    if kind == OpKind.MEMORY and _displacement_moves(instruction):
        text = _with_scale(_formatter.format_operand(instruction, number))
        return _MOVING_DISPLACEMENT.sub("@", text, count=1)
    return _with_scale(_formatter.format_operand(instruction, number))


def _with_scale(text: str) -> str:
    """Write out a scale of 1, as binutils does: "(%rdi,%rcx)" becomes "(%rdi,%rcx,1)"."""
    return _INDEX_WITHOUT_SCALE.sub(r"\1,1)", text)


def _displacement_moves(instruction: "Instruction") -> bool:
    if instruction.is_ip_rel_memory_operand:
        return True
    if instruction.memory_base == Register.NONE and instruction.memory_index == Register.NONE:
        return True
    return _is_kernel_address(instruction.memory_displacement)


def _is_kernel_address(value: int) -> bool:
    return _KERNEL_LOW <= value & _MASK64 < _KERNEL_HIGH
