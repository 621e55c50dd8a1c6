"""Executes one instruction on what is known: registers, flags, memory, GS base, CR3, VE_INFO.

What is not modelled makes unknown what it writes; nothing here decides where a path goes on.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from iced_x86 import (
    ConditionCode,
    InstructionInfoFactory,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
)

from trapline.contexts.processor import (
    GENERAL,
    MASK,
    UNKNOWN_FLAGS,
    Flags,
    Processor,
    Value,
)

if TYPE_CHECKING:
    from iced_x86 import Instruction

M: Final = Mnemonic
_NUMBER: Final = {register: number for number, register in enumerate(GENERAL)}
_HIGH_BYTES: Final = frozenset((Register.AH, Register.CH, Register.DH, Register.BH))
_WRITES: Final = frozenset(
    (OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE)
)
_MSR_GS_BASE: Final = 0xC000_0101
_VEINFO_GET: Final = 3  # leaf of TDCALL
_LONGEST_COPY: Final = 64  # words; a frame of struct pt_regs has 21
_ALLOCA: Final = 0x400  # add_random_kstack_offset() takes at most that (KSTACK_OFFSET_MAX)
_info = InstructionInfoFactory()


def _parts(register: int) -> tuple[int, int, int] | None:
    """Return number, size in bytes and shift of a general register; None for others."""
    full = RegisterExt.full_register(register)  # type: ignore[arg-type]
    number = _NUMBER.get(full)
    if number is None:
        return None
    size = RegisterExt.size(register)  # type: ignore[arg-type]
    return number, size, 8 if register in _HIGH_BYTES else 0


_REGISTERS: Final = {
    register: parts
    for name, register in vars(Register).items()
    if name.isupper() and isinstance(register, int) and (parts := _parts(register)) is not None
}


def get(state: Processor, register: int) -> Value:
    """Return what is in a register or a part of one."""
    parts = _REGISTERS.get(register)
    if parts is None:
        return None
    number, size, shift = parts
    value = state.registers[number]
    return None if value is None else value >> shift & (1 << 8 * size) - 1


def put(state: Processor, register: int, value: Value) -> None:
    """Change a register or a part of one; 32 bits clear the upper half."""
    parts = _REGISTERS.get(register)
    if parts is None:
        return
    number, size, shift = parts
    if size >= 4:
        state.registers[number] = None if value is None else value & (1 << 8 * size) - 1
        return
    old = state.registers[number]
    if old is None or value is None:
        state.registers[number] = None
        return
    mask = (1 << 8 * size) - 1 << shift
    state.registers[number] = old & ~mask | value << shift & mask


def address(instruction: "Instruction", state: Processor) -> Value:
    """Return the linear address of the memory operand, or None."""
    if instruction.is_ip_rel_memory_operand:
        linear = instruction.ip_rel_memory_address
    else:
        linear = instruction.memory_displacement
        for register, scale in (
            (instruction.memory_base, 1),
            (instruction.memory_index, instruction.memory_index_scale),
        ):
            if register == Register.NONE:
                continue
            value = get(state, register)
            if value is None:
                return None
            linear += value * scale
    if instruction.segment_prefix == Register.GS:
        if state.gs is None:
            return None
        linear += state.gs
    elif instruction.segment_prefix == Register.FS:
        return None
    return linear & MASK


def size_of(instruction: "Instruction", number: int) -> int:
    """Return the size of an operand in bytes."""
    kind = instruction.op_kind(number)
    if kind == OpKind.REGISTER:
        return RegisterExt.size(instruction.op_register(number))
    if kind == OpKind.MEMORY:
        return MemorySizeExt.size(instruction.memory_size)
    return 8


def operand(instruction: "Instruction", number: int, state: Processor) -> Value:
    """Return the value of an operand."""
    kind = instruction.op_kind(number)
    if kind == OpKind.REGISTER:
        return get(state, instruction.op_register(number))
    if kind == OpKind.MEMORY:
        linear = address(instruction, state)
        size = size_of(instruction, number)
        return None if linear is None or not size else state.load(linear, size)
    if instruction.op_kind(number) in _IMMEDIATES:
        return instruction.immediate(number) & MASK
    return None


_IMMEDIATES: Final = frozenset(
    value for name, value in vars(OpKind).items() if name.startswith("IMMEDIATE")
)


def assign(instruction: "Instruction", number: int, state: Processor, value: Value) -> None:
    """Write an operand."""
    kind = instruction.op_kind(number)
    if kind == OpKind.REGISTER:
        put(state, instruction.op_register(number), value)
    elif kind == OpKind.MEMORY:
        linear = address(instruction, state)
        size = size_of(instruction, number)
        if linear is not None and size:
            state.store(linear, size, value)


# Flags and conditions.


def _result_flags(value: Value, size: int, carry: bool | None, overflow: bool | None) -> Flags:
    if value is None:
        return UNKNOWN_FLAGS
    value &= (1 << 8 * size) - 1
    even = (value & 0xFF).bit_count() % 2 == 0
    return (value == 0, bool(value >> 8 * size - 1), carry, overflow, even)


def _difference(one: Value, other: Value, size: int) -> tuple[Value, Flags]:
    if one is None or other is None:
        return None, UNKNOWN_FLAGS
    mask, sign = (1 << 8 * size) - 1, 1 << 8 * size - 1
    one, other = one & mask, other & mask
    value = one - other & mask
    overflow = bool((one ^ other) & (one ^ value) & sign)
    return value, _result_flags(value, size, one < other, overflow)


def _sum(one: Value, other: Value, size: int) -> tuple[Value, Flags]:
    if one is None or other is None:
        return None, UNKNOWN_FLAGS
    mask, sign = (1 << 8 * size) - 1, 1 << 8 * size - 1
    one, other = one & mask, other & mask
    value = one + other
    overflow = bool(~(one ^ other) & (one ^ value) & sign)
    return value & mask, _result_flags(value, size, value > mask, overflow)


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


def _or(one: bool | None, other: bool | None) -> bool | None:
    if one or other:
        return True
    return None if one is None or other is None else False


def _differs(one: bool | None, other: bool | None) -> bool | None:
    return None if one is None or other is None else one != other


_TESTS: "Final[dict[int, Callable[[Flags], bool | None]]]" = {
    ConditionCode.E: lambda f: f[0],
    ConditionCode.NE: lambda f: _not(f[0]),
    ConditionCode.S: lambda f: f[1],
    ConditionCode.NS: lambda f: _not(f[1]),
    ConditionCode.B: lambda f: f[2],
    ConditionCode.AE: lambda f: _not(f[2]),
    ConditionCode.O: lambda f: f[3],
    ConditionCode.NO: lambda f: _not(f[3]),
    ConditionCode.P: lambda f: f[4],
    ConditionCode.NP: lambda f: _not(f[4]),
    ConditionCode.BE: lambda f: _or(f[2], f[0]),
    ConditionCode.A: lambda f: _not(_or(f[2], f[0])),
    ConditionCode.L: lambda f: _differs(f[1], f[3]),
    ConditionCode.GE: lambda f: _not(_differs(f[1], f[3])),
    ConditionCode.LE: lambda f: _or(f[0], _differs(f[1], f[3])),
    ConditionCode.G: lambda f: _not(_or(f[0], _differs(f[1], f[3]))),
}


def holds(instruction: "Instruction", state: Processor) -> bool | None:
    """Say whether the condition of a jump, SETcc or CMOVcc holds; None where both may be."""
    test = _TESTS.get(instruction.condition_code)
    return None if test is None else test(state.flags)


# Instructions.


def _mov(instruction: "Instruction", state: Processor) -> None:
    target, source = instruction.op0_register, instruction.op1_register
    if instruction.op0_kind == OpKind.REGISTER and target == Register.CR3:
        state.cr3 = get(state, source)
    elif instruction.op1_kind == OpKind.REGISTER and source == Register.CR3:
        put(state, target, state.cr3)
    else:
        assign(instruction, 0, state, operand(instruction, 1, state))


def _movsx(instruction: "Instruction", state: Processor) -> None:
    value, size = operand(instruction, 1, state), size_of(instruction, 1)
    if value is not None and value >> 8 * size - 1:
        value |= MASK & ~((1 << 8 * size) - 1)
    assign(instruction, 0, state, value)


def _lea(instruction: "Instruction", state: Processor) -> None:
    assign(instruction, 0, state, address(instruction, state))


def _push(instruction: "Instruction", state: Processor) -> None:
    state.push(operand(instruction, 0, state))


def _pop(instruction: "Instruction", state: Processor) -> None:
    value = state.pop()
    assign(instruction, 0, state, value)


def _pushf(_: "Instruction", state: Processor) -> None:
    state.push(None)


def _popf(_: "Instruction", state: Processor) -> None:
    state.pop()
    state.flags = UNKNOWN_FLAGS


def _leave(_: "Instruction", state: Processor) -> None:
    state.rsp = get(state, Register.RBP)
    put(state, Register.RBP, state.pop())


def _add(instruction: "Instruction", state: Processor) -> None:
    value, state.flags = _sum(
        operand(instruction, 0, state), operand(instruction, 1, state), size_of(instruction, 0)
    )
    assign(instruction, 0, state, value)


def _subtract(instruction: "Instruction", state: Processor) -> None:
    if _is_same_register(instruction):
        value, state.flags = _difference(0, 0, size_of(instruction, 0))
    else:
        value, state.flags = _difference(
            operand(instruction, 0, state), operand(instruction, 1, state), size_of(instruction, 0)
        )
    if value is None and instruction.op0_register == Register.RSP and state.rsp is not None:
        # alloca(), as the randomised offset of system calls has it: further down the same stack.
        value = state.rsp - _ALLOCA
    assign(instruction, 0, state, value)


def _compare(instruction: "Instruction", state: Processor) -> None:
    _, state.flags = _difference(
        operand(instruction, 0, state), operand(instruction, 1, state), size_of(instruction, 0)
    )


def _step(instruction: "Instruction", state: Processor, by: int) -> None:
    change = _sum if by > 0 else _difference
    carry = state.flags[2]
    value, flags = change(operand(instruction, 0, state), 1, size_of(instruction, 0))
    state.flags = (flags[0], flags[1], carry, flags[3], flags[4])
    assign(instruction, 0, state, value)


def _both(one: Value, other: Value) -> Value:
    if 0 in {one, other}:
        return 0
    return None if one is None or other is None else one & other


def _and(instruction: "Instruction", state: Processor) -> None:
    value = _both(operand(instruction, 0, state), operand(instruction, 1, state))
    state.flags = _result_flags(value, size_of(instruction, 0), carry=False, overflow=False)
    assign(instruction, 0, state, value)


def _test(instruction: "Instruction", state: Processor) -> None:
    value = _both(operand(instruction, 0, state), operand(instruction, 1, state))
    state.flags = _result_flags(value, size_of(instruction, 0), carry=False, overflow=False)


def _or_bits(instruction: "Instruction", state: Processor) -> None:
    one, other = operand(instruction, 0, state), operand(instruction, 1, state)
    value = None if one is None or other is None else one | other
    state.flags = _result_flags(value, size_of(instruction, 0), carry=False, overflow=False)
    assign(instruction, 0, state, value)


def _xor(instruction: "Instruction", state: Processor) -> None:
    one, other = operand(instruction, 0, state), operand(instruction, 1, state)
    value = None if one is None or other is None else one ^ other
    if _is_same_register(instruction):
        value = 0
    state.flags = _result_flags(value, size_of(instruction, 0), carry=False, overflow=False)
    assign(instruction, 0, state, value)


def _shift(instruction: "Instruction", state: Processor) -> None:
    value, count = operand(instruction, 0, state), operand(instruction, 1, state)
    size = size_of(instruction, 0)
    state.flags = UNKNOWN_FLAGS
    if value is not None and count is not None:
        count &= 8 * max(size, 4) - 1
        value = value << count if instruction.mnemonic == M.SHL else value >> count
        state.flags = _result_flags(value, size, None, None)
    else:
        value = None
    assign(instruction, 0, state, value)


def _bit(instruction: "Instruction", state: Processor) -> None:
    """BT, BTS, BTR and BTC of a register; a bit in memory is not known."""
    number = operand(instruction, 1, state)
    carry: bool | None = None
    if instruction.op0_kind == OpKind.REGISTER:
        value = operand(instruction, 0, state)
        if value is not None and number is not None:
            bit = 1 << number % (8 * size_of(instruction, 0))
            carry = bool(value & bit)
            if instruction.mnemonic == M.BTS:
                value |= bit
            elif instruction.mnemonic == M.BTR:
                value &= ~bit
            elif instruction.mnemonic == M.BTC:
                value ^= bit
        else:
            value = None
        if instruction.mnemonic != M.BT:
            assign(instruction, 0, state, value)
    zero, sign, _, overflow, parity = state.flags
    state.flags = (zero, sign, carry, overflow, parity)


def _exchange(instruction: "Instruction", state: Processor) -> None:
    one, other = operand(instruction, 0, state), operand(instruction, 1, state)
    assign(instruction, 0, state, other)
    assign(instruction, 1, state, one)


def _swapgs(_: "Instruction", state: Processor) -> None:
    state.gs, state.other_gs = state.other_gs, state.gs


def _rdgsbase(instruction: "Instruction", state: Processor) -> None:
    put(state, instruction.op0_register, state.gs)


def _wrgsbase(instruction: "Instruction", state: Processor) -> None:
    state.gs = get(state, instruction.op0_register)


def _rdmsr(_: "Instruction", state: Processor) -> None:
    value = state.gs if get(state, Register.ECX) == _MSR_GS_BASE else None
    put(state, Register.EAX, None if value is None else value)
    put(state, Register.RDX, None if value is None else value >> 32)


def _tdcall(_: "Instruction", state: Processor) -> None:
    if get(state, Register.RAX) == _VEINFO_GET:
        state.ve_busy = False
    for number, register in enumerate(GENERAL):
        if register not in {Register.RSP, Register.RBP}:
            state.registers[number] = None


def _move_string(instruction: "Instruction", state: Processor) -> None:
    """MOVS, with REP: a frame is copied from stack to stack so."""
    size = MemorySizeExt.size(instruction.memory_size)
    count = get(state, Register.RCX) if instruction.has_rep_prefix else 1
    source, target = get(state, Register.RSI), get(state, Register.RDI)
    words = None if count is None else count * size // 8
    if source is None or target is None or words is None or words > _LONGEST_COPY:
        for register in (Register.RSI, Register.RDI, Register.RCX):
            put(state, register, None)
        return
    total = (count or 0) * size
    for offset in range(0, total - total % 8, 8):
        state.store(target + offset & MASK, 8, state.load(source + offset & MASK, 8))
    put(state, Register.RSI, source + total & MASK)
    put(state, Register.RDI, target + total & MASK)
    if instruction.has_rep_prefix:
        put(state, Register.RCX, 0)


def _conditional_move(instruction: "Instruction", state: Processor) -> None:
    moved = holds(instruction, state)
    old, new = operand(instruction, 0, state), operand(instruction, 1, state)
    value = new if moved else old
    if moved is None and old != new:
        value = None
    assign(instruction, 0, state, value)


def _set_byte(instruction: "Instruction", state: Processor) -> None:
    value = holds(instruction, state)
    assign(instruction, 0, state, None if value is None else int(value))


def _nothing(_: "Instruction", state: Processor) -> None:
    del state


def _is_same_register(instruction: "Instruction") -> bool:
    return (
        instruction.op0_kind == instruction.op1_kind == OpKind.REGISTER
        and instruction.op0_register == instruction.op1_register
    )


def _other(instruction: "Instruction", state: Processor) -> None:
    """Forget what an instruction that is not modelled writes."""
    info = _info.info(instruction)
    for used in info.used_registers():
        if used.access in _WRITES:
            put(state, used.register, None)
    for used_memory in info.used_memory():
        if used_memory.access in _WRITES and instruction.memory_base != Register.NONE:
            linear = address(instruction, state)
            if linear is not None:
                state.store(linear, max(1, MemorySizeExt.size(used_memory.memory_size)), None)
    if instruction.rflags_modified:
        state.flags = UNKNOWN_FLAGS


Effect = Callable[["Instruction", Processor], None]


def _named(prefix: str, effect: Effect) -> "dict[int, Effect]":
    return {
        value: effect
        for name, value in vars(Mnemonic).items()
        if name.startswith(prefix) and isinstance(value, int)
    }


_EFFECTS: "Final[dict[int, Effect]]" = {
    **_named("CMOV", _conditional_move),
    **_named("SET", _set_byte),
    M.MOV: _mov,
    M.MOVZX: _mov,
    M.MOVSX: _movsx,
    M.MOVSXD: _movsx,
    M.LEA: _lea,
    M.PUSH: _push,
    M.POP: _pop,
    M.PUSHFQ: _pushf,
    M.POPFQ: _popf,
    M.LEAVE: _leave,
    M.ADD: _add,
    M.SUB: _subtract,
    M.CMP: _compare,
    M.INC: lambda i, s: _step(i, s, 1),
    M.DEC: lambda i, s: _step(i, s, -1),
    M.AND: _and,
    M.TEST: _test,
    M.OR: _or_bits,
    M.XOR: _xor,
    M.SHL: _shift,
    M.SHR: _shift,
    M.BT: _bit,
    M.BTS: _bit,
    M.BTR: _bit,
    M.BTC: _bit,
    M.XCHG: _exchange,
    M.SWAPGS: _swapgs,
    M.RDGSBASE: _rdgsbase,
    M.WRGSBASE: _wrgsbase,
    M.RDMSR: _rdmsr,
    M.TDCALL: _tdcall,
    M.MOVSB: _move_string,
    M.MOVSQ: _move_string,
    M.NOP: _nothing,
    M.ENDBR64: _nothing,
}


def effect_of(instruction: "Instruction") -> Effect:
    """Return what changes a state as the instruction does, but for where it goes on."""
    return _EFFECTS.get(instruction.mnemonic, _other)


def execute(instruction: "Instruction", state: Processor) -> None:
    """Change the state as the instruction does, but for where it goes on."""
    effect_of(instruction)(instruction, state)
