"""The register state in front of an instruction: operands in place, poison everywhere else.

Each case runs from two states, lanes A and B. Both give the instruction the same operands, as
far as the decoder says that it reads them; every other bit of every register differs. So what
the guest hands to its host may not differ between the lanes.
"""

import random
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Final, NamedTuple

import iced_x86 as ix

from trapline.cpu.engine import Reg
from trapline.verify.testpages import (
    KERNEL_BASE,
    OPERAND,
    OPERAND_AT,
    OPERAND_SIZE,
    PAGE,
    USER_BASE,
)
from trapline.verify.world import M64

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import OpKind as KindValue
    from iced_x86._iced_x86_py import Register as RegisterValue

LANES: Final = 3
_M32: Final = (1 << 32) - 1
_CF, _PF, _AF, _ZF, _SF, _IF, _DF, _OF = 1, 4, 16, 64, 128, 1 << 9, 1 << 10, 1 << 11
_ID: Final = 1 << 21
_AC: Final = 1 << 18
_STATUS: Final = _CF | _PF | _AF | _ZF | _SF | _OF
_FLAGS: Final = {
    ix.RflagsBits.OF: _OF,
    ix.RflagsBits.SF: _SF,
    ix.RflagsBits.ZF: _ZF,
    ix.RflagsBits.AF: _AF,
    ix.RflagsBits.CF: _CF,
    ix.RflagsBits.PF: _PF,
    ix.RflagsBits.DF: _DF,
    ix.RflagsBits.IF: _IF,
    ix.RflagsBits.AC: _AC,
}
_READS: Final = frozenset(
    (ix.OpAccess.READ, ix.OpAccess.COND_READ, ix.OpAccess.READ_WRITE, ix.OpAccess.READ_COND_WRITE)
)
_WRITES: Final = frozenset(
    (ix.OpAccess.WRITE, ix.OpAccess.COND_WRITE, ix.OpAccess.READ_WRITE, ix.OpAccess.READ_COND_WRITE)
)
_FIRST: Final = OPERAND - KERNEL_BASE - OPERAND_AT
_SPREAD: Final = 16  # how far it may move to be reached
_HIGH_BYTES: Final = frozenset((ix.Register.AH, ix.Register.CH, ix.Register.DH, ix.Register.BH))
_GPR: Final = {
    getattr(ix.Register, name): index
    for index, name in enumerate(
        ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{n}" for n in range(8, 16)))
    )
}
_STRING_POINTERS: "Final[dict[KindValue, tuple[int, int]]]" = {
    ix.OpKind.MEMORY_SEG_RSI: (Reg.RSI, M64),
    ix.OpKind.MEMORY_SEG_ESI: (Reg.RSI, _M32),
    ix.OpKind.MEMORY_ESRDI: (Reg.RDI, M64),
    ix.OpKind.MEMORY_ESEDI: (Reg.RDI, _M32),
    ix.OpKind.MEMORY_SEG_RDI: (Reg.RDI, M64),
    ix.OpKind.MEMORY_SEG_EDI: (Reg.RDI, _M32),
}
_REPEATS: Final = 2
_info: Final = ix.InstructionInfoFactory()


class Field(NamedTuple):
    """Bits of a general register."""

    number: int
    mask: int


class Target(NamedTuple):
    """What an instruction may write of the general registers, and how wide what it reads is.

    `written` maps a register's number to the bits of the operand in it; `width` is the bits that
    come from memory or a port, where fewer than the destination has.
    """

    written: dict[int, int]
    width: int


class Lanes(NamedTuple):
    """The states: 16 registers and RFLAGS each. `gla` is the address of the operand."""

    regs: tuple[tuple[int, ...], ...]
    rflags: tuple[int, ...]
    gla: int


class Request(NamedTuple):
    """How a case wants its state.

    `user` asks for an address in the user half, `crossing` for an operand on both operand pages.
    `access_rights` sets RFLAGS.AC, without which SMAP stops it; `interrupts` fixes RFLAGS.IF.
    `pinned` are values of register fields. `stack` is the address behind the stack's last byte.
    `base` is where the pages are.
    """

    stack: int
    user: bool = False
    crossing: bool = False
    interrupts: bool | None = None
    access_rights: bool = False
    pinned: tuple[tuple[Field, int], ...] = ()
    base: int = KERNEL_BASE


def field_of(register: "RegisterValue") -> Field | None:
    """Return where a register of any width is; None for other than general ones."""
    number = _GPR.get(ix.RegisterExt.full_register(register))
    if number is None:
        return None
    size = ix.RegisterExt.size(register)
    mask = (1 << 8 * size) - 1
    return Field(number, mask << 8 if register in _HIGH_BYTES else mask)


def decode(code: bytes, end: int, *, strict: bool = True) -> ix.Instruction:
    """Decode 64-bit code that ends at a linear address; invalid if it is not one instruction."""
    options = ix.DecoderOptions.NONE if strict else ix.DecoderOptions.NO_INVALID_CHECK
    return ix.Decoder(64, code, options=options, ip=end - len(code)).decode()


def memory_kinds(instruction: ix.Instruction) -> "list[KindValue]":
    """Return the kinds of the operands that are in memory."""
    kinds = [instruction.op_kind(number) for number in range(instruction.op_count)]
    return [kind for kind in kinds if kind == ix.OpKind.MEMORY or kind in _STRING_POINTERS]


def read_fields(instruction: ix.Instruction) -> list[Field]:
    """Return what the instruction reads of the general registers, addresses included."""
    return _fields(instruction, _READS)


def target_of(instruction: ix.Instruction) -> Target:
    """Return what it writes of them, and the width of what comes from memory or a port.

    A 32-bit destination is 32 bits wide, though the rest of the register becomes zero.
    """
    written: dict[int, int] = {}
    for field in _fields(instruction, _WRITES):
        written[field.number] = written.get(field.number, 0) | field.mask
    for number in range(instruction.op_count):
        if instruction.op_kind(number) == ix.OpKind.REGISTER:
            operand = field_of(instruction.op_register(number))
            if operand is not None and operand.number in written:
                written[operand.number] = operand.mask
    width = 8 * ix.MemorySizeExt.size(instruction.memory_size)
    return Target(written, width or 64)


def _fields(instruction: ix.Instruction, kinds: frozenset[int]) -> list[Field]:
    found = []
    for used in _info.info(instruction).used_registers():
        field = field_of(used.register) if used.access in kinds else None
        if field is not None:
            found.append(field)
    return found


@lru_cache(maxsize=4096)
def poison(seed: int) -> tuple[tuple[int, ...], ...]:
    """Return 16 values for each lane: random ones, those with each bit inverted, zeros."""
    source = random.Random(seed)  # noqa: S311 - repeatable on purpose
    values = tuple(source.getrandbits(64) for _ in range(16))
    return values, tuple(value ^ M64 for value in values), (0,) * 16


def lanes(
    instruction: ix.Instruction, request: Request, segments: dict[str, int], seed: int
) -> Lanes | None:
    """Build the states; None if no state makes this instruction reach the operand."""
    target = _target(instruction, request)
    pinned: dict[int, tuple[int, int]] = {}  # register -> mask, value
    for field, value in request.pinned:
        _pin(pinned, field, value)
    is_string = instruction.is_string_instruction
    stack = request.stack - 0x400 - (seed & 1) * 8
    if not _aim(instruction, target, request, segments, pinned, stack, seed):
        return None
    if is_string and (instruction.has_rep_prefix or instruction.has_repne_prefix):
        _pin(pinned, Field(Reg.RCX, M64), _REPEATS)
    reads = read_fields(instruction)
    states = list(map(list, poison(seed)))
    uses_stack = any(field.number == Reg.RSP for field in reads)
    for lane, state in enumerate(states):
        for number, (mask, value) in pinned.items():
            state[number] = state[number] & ~mask | value & mask
        state[Reg.RSP] = stack - (0 if uses_stack else lane * 0x128)
    for state, (number, mask) in product(states[1:], reads):
        state[number] = state[number] & ~mask | states[0][number] & mask
    flags = _flags(instruction, request, is_string=is_string)
    effective = _effective(instruction, states[0], segments)
    if effective is not None and not _near(effective, target):
        return None
    return Lanes(tuple(map(tuple, states)), flags, target if effective is None else effective)


def _near(address: int, target: int) -> bool:
    return 0 <= (address - target & M64) < _SPREAD


def _target(instruction: ix.Instruction, request: Request) -> int:
    """Choose where the operand is; misaligned, so that no mistake of alignment hides."""
    narrow = instruction.memory_size and address_size(instruction) == 4
    base = USER_BASE if request.user or narrow else request.base
    size = ix.MemorySizeExt.size(instruction.memory_size)
    if request.crossing:
        return base + OPERAND_AT + PAGE - max(size // 2, 1)
    return base + OPERAND_AT + _FIRST


def address_size(instruction: ix.Instruction) -> int:
    """Return 4 where addresses are cut to 32 bits, and so are in the user half; else 8."""
    kinds = memory_kinds(instruction)
    if any(_STRING_POINTERS.get(kind, (0, M64))[1] == _M32 for kind in kinds):
        return 4
    for register in (instruction.memory_base, instruction.memory_index):
        if register == ix.Register.EIP:
            return 4
        if register != ix.Register.NONE and ix.RegisterExt.is_gpr32(register):
            return 4
    if instruction.memory_base == instruction.memory_index == ix.Register.NONE:
        return 4 if instruction.memory_displ_size == 4 and _is_absolute_32(instruction) else 8
    return 8


def _is_absolute_32(instruction: ix.Instruction) -> bool:
    """Tell an absolute address under prefix 67, which is not sign-extended."""
    return instruction.memory_displacement <= _M32 and instruction.memory_base == ix.Register.NONE


def _segment_base(instruction: ix.Instruction, segments: dict[str, int]) -> int:
    segment = instruction.memory_segment
    if segment == ix.Register.FS:
        return segments["fs"]
    return segments["gs"] if segment == ix.Register.GS else 0


def _aim(
    instruction: ix.Instruction,
    target: int,
    request: Request,
    segments: dict[str, int],
    pinned: dict[int, tuple[int, int]],
    stack: int,
    seed: int,
) -> bool:
    """Find registers that make the operand's address `target`, or a few bytes more."""
    del request
    base_of_segment = _segment_base(instruction, segments)
    # The second memory operand of a string instruction is plain memory: the stack.
    free = target
    for kind in memory_kinds(instruction):
        if kind in _STRING_POINTERS:
            number, mask = _STRING_POINTERS[kind]
            offset = base_of_segment if kind != ix.OpKind.MEMORY_ESRDI else 0
            _pin(pinned, Field(number, mask), free - offset)
            free = stack + 0x100
            continue
        if not _aim_explicit(instruction, target - base_of_segment & M64, pinned, stack, seed):
            return False
    return True


def _aim_explicit(
    instruction: ix.Instruction,
    target: int,
    pinned: dict[int, tuple[int, int]],
    stack: int,
    seed: int,
) -> bool:
    base, index = instruction.memory_base, instruction.memory_index
    scale = instruction.memory_index_scale
    if base in {ix.Register.RIP, ix.Register.EIP}:
        return _near(instruction.memory_displacement, target)
    base_field = field_of(base) if base != ix.Register.NONE else None
    index_field = field_of(index) if index != ix.Register.NONE else None
    want = target - instruction.memory_displacement & M64
    if base_field is None and index_field is None:
        return base == ix.Register.NONE and (
            index != ix.Register.NONE or _near(want, 0) or not want
        )
    mask = (base_field or index_field or Field(0, M64)).mask
    if mask == _M32:
        want &= _M32
    if base_field is None:
        assert index_field is not None
        return _divide(want, scale, mask, index_field, pinned)
    if base_field.number == Reg.RSP:
        if index_field is None:
            return _near(stack + instruction.memory_displacement & mask, target & mask)
        return _divide(want - stack & mask, scale, mask, index_field, pinned)
    if index_field is None:
        _pin(pinned, base_field, want)
    elif index_field.number == base_field.number and index_field.mask == mask:
        return _divide(want, scale + 1, mask, base_field, pinned)
    elif index_field.number == base_field.number:  # XLAT would need RBX twice: it has AL
        return False
    else:
        small = seed * 37 & 0x7F
        _pin(pinned, index_field, small)
        _pin(pinned, base_field, want - small * scale)
    return True


def _divide(
    want: int, by: int, mask: int, field: Field, pinned: dict[int, tuple[int, int]]
) -> bool:
    """Pin the least value whose multiple is not below `want`; both as signed numbers."""
    bits = mask.bit_length()
    signed = want - (1 << bits) if want >> bits - 1 & 1 and mask == M64 else want
    _pin(pinned, field, -(-signed // by))
    return True


def _pin(pinned: dict[int, tuple[int, int]], field: Field, value: int) -> None:
    shift = 8 if field.mask == 0xFF00 else 0
    old_mask, old_value = pinned.get(field.number, (0, 0))
    pinned[field.number] = (
        old_mask | field.mask,
        old_value & ~field.mask | value << shift & field.mask,
    )


def _effective(
    instruction: ix.Instruction, regs: list[int], segments: dict[str, int]
) -> int | None:
    """Compute the operand's address; None for a vector of addresses, or no operand."""
    kinds = memory_kinds(instruction)
    if not kinds:
        return None
    if kinds[0] in _STRING_POINTERS:
        number, mask = _STRING_POINTERS[kinds[0]]
        offset = 0 if kinds[0] == ix.OpKind.MEMORY_ESRDI else _segment_base(instruction, segments)
        return (regs[number] & mask) + offset & M64
    address = instruction.memory_displacement
    mask = M64
    if instruction.memory_base not in {ix.Register.NONE, ix.Register.RIP, ix.Register.EIP}:
        base = field_of(instruction.memory_base)
        if base is None:
            return None
        address += regs[base.number] & base.mask
        mask = base.mask
    if instruction.memory_index != ix.Register.NONE:
        index = field_of(instruction.memory_index)
        if index is None:
            return None
        address += (regs[index.number] & index.mask) * instruction.memory_index_scale
        mask = mask if index.mask == 0xFF else index.mask  # XLAT adds AL
    return (address & mask) + _segment_base(instruction, segments) & M64


def _flags(instruction: ix.Instruction, request: Request, *, is_string: bool) -> tuple[int, ...]:
    """Return RFLAGS of the lanes: what is not read differs."""
    free = _STATUS | _ID | (0 if is_string else _DF)
    first = 2 | _CF | _AF | _SF | _DF & free | _IF
    read = sum(bit for flag, bit in _FLAGS.items() if instruction.rflags_read & flag)
    values = [value & ~read | first & read for value in (first, first ^ free ^ _IF, 2 | _IF)]
    if request.interrupts is not None:
        values = [value | _IF if request.interrupts else value & ~_IF for value in values]
    narrow = memory_kinds(instruction) and address_size(instruction) == 4
    access_rights = _AC if request.access_rights or narrow else 0
    return tuple(value | access_rights for value in values)


_PATTERNS: Final = tuple(
    random.Random(seed).randbytes(OPERAND_SIZE)  # noqa: S311 - repeatable on purpose
    for seed in range(16)
)


def pattern(seed: int) -> bytes:
    """Return what is in the operand pages of a case."""
    return _PATTERNS[seed >> 1 & 15]
