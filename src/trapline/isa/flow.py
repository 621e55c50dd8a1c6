"""Where the values in registers come from, within one function.

A forward walk over the instructions of a function that follows a few kinds of values through
registers and stack slots: arguments, what some calls return, constants, addresses on the stack.
Only where a value comes from is kept, not what is added to it, so that a pointer that a loop moves
on stays what it is. Where paths meet, what they disagree on is forgotten, but a null pointer: that
is what code tests for. Jumps back are followed until nothing changes any more.

It is no proof: memory other than the function's own frame and what the caller asks for is not
followed, nor are jumps through tables.
"""

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from iced_x86 import FlowControl, Mnemonic, OpKind, Register, RegisterExt

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from iced_x86 import Instruction

Kind = Literal["argument", "argument member", "constant", "stack", "result", "table"]


class Value(NamedTuple):
    """Where a value comes from.

    `what` is the number of the argument, the constant, the offset from the stack pointer at entry,
    or what the caller chose for a call's result, a variable's content and what is in a table.
    """

    kind: Kind
    what: int


#: By key: a register's number, or ("stack", offset) for a slot.
State = dict[object, Value]

_ARGUMENTS: Final = tuple(
    getattr(Register, name) for name in ("RDI", "RSI", "RDX", "RCX", "R8", "R9")
)
_CLOBBERED: Final = (*_ARGUMENTS, Register.RAX, Register.R10, Register.R11)
_RETURNED: Final = Register.RAX
_ZERO: Final = Value("constant", 0)
_MOVES: Final = frozenset(
    {Mnemonic.MOV, Mnemonic.MOVZX, Mnemonic.MOVSX, Mnemonic.MOVSXD, Mnemonic.MOVBE}
)
# What is added to or masked out of a pointer leaves a pointer into the same thing.
_ADJUSTS: Final = frozenset(
    {Mnemonic.ADD, Mnemonic.SUB, Mnemonic.AND, Mnemonic.OR, Mnemonic.INC, Mnemonic.DEC}
)
_WRITES_NOTHING: Final = frozenset({Mnemonic.CMP, Mnemonic.TEST, Mnemonic.NOP, Mnemonic.BT})
_WRITES_RAX_RDX: Final = frozenset(
    {
        *(Mnemonic.MUL, Mnemonic.IMUL, Mnemonic.DIV, Mnemonic.IDIV, Mnemonic.CPUID),
        *(Mnemonic.RDMSR, Mnemonic.RDTSC, Mnemonic.RDTSCP, Mnemonic.RDPMC, Mnemonic.IN),
        *(Mnemonic.CMPXCHG, Mnemonic.CDQ, Mnemonic.CQO, Mnemonic.CWDE, Mnemonic.CDQE),
    }
)
_CONDITIONAL_MOVES: Final = frozenset(
    value for name, value in vars(Mnemonic).items() if name.startswith("CMOV")
)
_IMMEDIATES: Final = frozenset(
    value for name, value in vars(OpKind).items() if name.startswith("IMMEDIATE")
)
_JUMPS: Final = frozenset({FlowControl.CONDITIONAL_BRANCH, FlowControl.UNCONDITIONAL_BRANCH})
_STRAIGHT: Final = frozenset({FlowControl.NEXT, FlowControl.CALL, FlowControl.INDIRECT_CALL})
_PASSES: Final = 4  # over a function with loops; more than nested loops need
_MASK: Final = (1 << 64) - 1
_SIGN: Final = 1 << 63
_WORD: Final = 8


def entry_state() -> State:
    """Return what registers hold when a function is entered."""
    state: State = {register: Value("argument", n) for n, register in enumerate(_ARGUMENTS)}
    state[Register.RSP] = Value("stack", 0)
    return state


def argument(state: State, number: int) -> Value | None:
    """Return what a call at this point has for its argument of that number, from 0."""
    return state.get(_ARGUMENTS[number])


def moved(instruction: "Instruction", state: State) -> Value | None:
    """Return what a MOV stores."""
    if instruction.op1_kind == OpKind.REGISTER:
        return state.get(full(instruction.op1_register))
    return Value("constant", _signed(instruction.immediate(1)))


def pointed_to(state: State, number: int) -> Value | None:
    """Return what is in the frame where a call's argument points to."""
    pointer = argument(state, number)
    if pointer is None or pointer.kind != "stack":
        return None
    return state.get(("stack", pointer.what))


def full(register: int) -> int:
    """Return the 64-bit register that a register is a part of."""
    number: int = _FULL[register]
    return number


_FULL: Final = {
    register: RegisterExt.full_register(register)  # type: ignore[arg-type]  # enumerations are integers
    for name, register in vars(Register).items()
    if name.isupper() and isinstance(register, int)
}


def address_of(instruction: "Instruction", state: State) -> Value | None:
    """Return where the address of the memory operand comes from."""
    base = state.get(full(instruction.memory_base))
    index = state.get(full(instruction.memory_index))
    if base is not None and base.kind != "constant":
        return base
    return index if instruction.memory_index_scale == 1 else None


class Walk:
    """One function: `returns` says what a call returns, `content` what a variable holds."""

    def __init__(
        self,
        instructions: "Sequence[Instruction]",
        *,
        returns: "Mapping[int, Value]",
        content: "Callable[[int], Value | None] | None" = None,
        members: bool = False,
        silent: "Collection[int]" = (),
    ) -> None:
        """Take the instructions in the order of addresses.

        `returns` is by the address of the call; `content` is asked with the address of a variable
        of the kernel. With `members` what is loaded through an argument is followed, too. A call
        of a function in `silent` (that of ftrace) changes no register.
        """
        self._instructions = instructions
        self._returns = returns
        self._content = content
        self._members = members
        self._silent = silent

    def states(self) -> "Iterator[tuple[Instruction, State]]":
        """Yield each instruction with what holds before it; the state is not to be kept."""
        heads: dict[int, State] = {}
        if any(map(_jumps_back, self._instructions)):
            for _ in range(_PASSES):
                if not self._learn(heads):
                    break
        yield from self._pass(heads, None)

    def _learn(self, heads: dict[int, State]) -> bool:
        """Walk once; note what jumps back bring along. Returns whether that was news."""
        found: dict[int, State] = {}
        for _ in self._pass(heads, found):
            pass
        changed = False
        for target, state in found.items():
            known = heads.get(target)
            joined = state if known is None else _join(known, state)
            changed = changed or joined != known
            heads[target] = joined
        return changed

    def _pass(
        self, heads: dict[int, State], back: dict[int, State] | None
    ) -> "Iterator[tuple[Instruction, State]]":
        ahead: dict[int, State] = {}
        state: State | None = entry_state()
        for instruction in self._instructions:
            place = instruction.ip
            arriving = ahead.pop(place, None)
            if arriving is not None:
                state = arriving if state is None else _join(state, arriving)
            if place in heads and state is not None:
                state = _join(state, heads[place])
            if state is None:
                state = {}
            yield instruction, state
            flow = instruction.flow_control
            if flow in _JUMPS:
                target = instruction.near_branch_target
                where = ahead if target > place else back
                if where is not None:
                    known = where.get(target)
                    where[target] = dict(state) if known is None else _join(known, state)
            if flow in _STRAIGHT:
                self._step(instruction, state, is_call=flow != FlowControl.NEXT)
            elif flow != FlowControl.CONDITIONAL_BRANCH:
                state = None

    def _step(self, instruction: "Instruction", state: State, *, is_call: bool) -> None:
        mnemonic = instruction.mnemonic
        if is_call:
            if instruction.near_branch_target in self._silent:
                return
            for register in _CLOBBERED:
                state.pop(register, None)
            returned = self._returns.get(instruction.ip)
            if returned is not None:
                state[_RETURNED] = returned
        elif mnemonic == Mnemonic.PUSH:
            _move_stack(state, -_WORD)
            _set(state, _slot(state, 0), self._operand(instruction, 0, state))
        elif mnemonic == Mnemonic.POP:
            value = state.get(_slot(state, 0))
            _move_stack(state, _WORD)
            _set(state, full(instruction.op0_register), value)
        elif mnemonic in _WRITES_RAX_RDX:
            state.pop(Register.RAX, None)
            state.pop(Register.RDX, None)
            if instruction.op0_kind == OpKind.REGISTER:
                state.pop(full(instruction.op0_register), None)
        elif mnemonic not in _WRITES_NOTHING:
            self._assign(instruction, state)

    def _assign(self, instruction: "Instruction", state: State) -> None:
        if not instruction.op_count:
            return
        if instruction.op0_kind != OpKind.REGISTER:
            if instruction.op0_kind == OpKind.MEMORY and instruction.mnemonic == Mnemonic.MOV:
                value = self._operand(instruction, 1, state)
                _set(state, _frame_slot(instruction, state), value)
            elif instruction.is_string_instruction:
                state.pop(Register.RCX, None)
            return
        target = full(instruction.op0_register)
        _set(state, target, self._result(instruction, state, target))

    def _result(self, instruction: "Instruction", state: State, target: int) -> Value | None:
        mnemonic = instruction.mnemonic
        if mnemonic in _MOVES:
            return self._operand(instruction, 1, state)
        if mnemonic == Mnemonic.LEA:
            return _with_offset(address_of(instruction, state), instruction.memory_displacement)
        if mnemonic in _ADJUSTS:
            return self._adjusted(instruction, state, target)
        if mnemonic in _CONDITIONAL_MOVES:
            return _common(state.get(target), self._operand(instruction, 1, state))
        if (
            mnemonic == Mnemonic.XOR
            and instruction.op1_kind == OpKind.REGISTER
            and full(instruction.op1_register) == target
        ):
            return _ZERO
        return None

    def _adjusted(self, instruction: "Instruction", state: State, target: int) -> Value | None:
        value = state.get(target)
        other = self._operand(instruction, 1, state) if instruction.op_count > 1 else _ZERO
        if value is not None and value.kind == "stack":
            if other is None or other.kind != "constant" or instruction.mnemonic == Mnemonic.AND:
                return None
            sign = -1 if instruction.mnemonic == Mnemonic.SUB else 1
            return Value("stack", value.what + sign * other.what)
        if value is None or value.kind == "constant":
            is_sum = instruction.mnemonic == Mnemonic.ADD
            return other if is_sum and other is not None and other.kind != "constant" else None
        return value

    def _operand(self, instruction: "Instruction", number: int, state: State) -> Value | None:
        kind = instruction.op_kind(number)
        if kind == OpKind.REGISTER:
            return state.get(full(instruction.op_register(number)))
        if kind in _IMMEDIATES:
            return Value("constant", _signed(instruction.immediate(number)))
        if kind != OpKind.MEMORY:
            return None
        slot = _frame_slot(instruction, state)
        if slot is not None:
            return state.get(slot)
        variable = variable_of(instruction)
        if variable is not None:
            return None if self._content is None else self._content(variable)
        base = address_of(instruction, state)
        if base is not None and base.kind == "table":
            return Value("result", base.what)
        if self._members and base is not None and base.kind in {"argument", "argument member"}:
            return Value("argument member", base.what)
        return None


def _jumps_back(instruction: "Instruction") -> bool:
    return instruction.flow_control in _JUMPS and instruction.near_branch_target <= instruction.ip


def variable_of(instruction: "Instruction") -> int | None:
    """Return the address of the variable that the memory operand is; None where it is none."""
    if instruction.is_ip_rel_memory_operand:
        return instruction.ip_rel_memory_address
    has_register = instruction.memory_base or instruction.memory_index
    if has_register or instruction.segment_prefix in {Register.GS, Register.FS}:
        return None
    return instruction.memory_displacement & _MASK


def _frame_slot(instruction: "Instruction", state: State) -> object:
    """Name the slot of the frame that the memory operand is, or None."""
    if instruction.memory_index:
        return None
    base = state.get(full(instruction.memory_base))
    if base is None or base.kind != "stack":
        return None
    return ("stack", base.what + _signed(instruction.memory_displacement))


def _slot(state: State, offset: int) -> object:
    base = state.get(Register.RSP)
    return None if base is None or base.kind != "stack" else ("stack", base.what + offset)


def _move_stack(state: State, distance: int) -> None:
    base = state.get(Register.RSP)
    if base is not None:
        state[Register.RSP] = Value(base.kind, base.what + distance)


def _with_offset(value: Value | None, distance: int) -> Value | None:
    if value is not None and value.kind == "stack":
        return Value("stack", value.what + _signed(distance))
    return value


def _set(state: State, key: object, value: Value | None) -> None:
    if key is None:
        return
    if value is None:
        state.pop(key, None)
    else:
        state[key] = value


def _join(one: State, other: State) -> State:
    found: State = {}
    for key, value in one.items():
        common = _common(value, other.get(key))
        if common is not None:
            found[key] = common
    return found


def _common(one: Value | None, other: Value | None) -> Value | None:
    if other in {one, _ZERO}:
        return one
    return other if one == _ZERO else None


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value & _SIGN else value
