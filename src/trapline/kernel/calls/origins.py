"""Where a register's value comes from, looked for backwards from one instruction.

All ways that lead to the instruction within its function are followed, and parts that the compiler
split off are entered where they are jumped to. What a register holds is told by types: BTF knows
the parameters of functions, what they return, per-CPU variables, and what lies at each offset of
what those point to. What cannot be told is `UNKNOWN`, and never left out.
"""

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from iced_x86 import FlowControl, Mnemonic, OpKind, Register

from trapline.base.errors import BadImageError
from trapline.isa.flow import full
from trapline.kernel.types.layout import Leaf, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from iced_x86 import Instruction

    from trapline.kernel.calls.body import Body
    from trapline.kernel.types.layout import Layouts

Kind = Literal[
    "constant",
    "pointer",
    "member",
    "field",
    "variable",
    "table",
    "argument",
    "typed",
    "unknown",
]


class Value(NamedTuple):
    """What a register may hold.

    A "constant" is an address (`what`). A "pointer" leads to `at` bytes in a value of BTF type
    `what`. The rest are pointers to functions: from a "member", the one at `at` of struct `what`;
    from a "field" at `at` bytes of nobody knows what; from a "variable" or a "table" of them at
    address `what`; an "argument", number `at` of the function at `what`; one of which only the
    prototype is known, class `kind`, is "typed".
    """

    source: Kind
    what: int = 0
    at: int = 0
    kind: int = -1


UNKNOWN: Final = Value("unknown")
Values = frozenset[Value]
#: A register, or a slot of the frame by its distance from the stack pointer.
Key = tuple[str, int]

ARGUMENTS: Final = tuple(
    getattr(Register, name) for name in ("RDI", "RSI", "RDX", "RCX", "R8", "R9")
)
_CLOBBERED: Final = frozenset((*ARGUMENTS, Register.RAX, Register.R10, Register.R11))
_MOVES: Final = frozenset({Mnemonic.MOV, Mnemonic.MOVSXD, Mnemonic.MOVZX})
_READS_ONLY: Final = frozenset(
    {Mnemonic.CMP, Mnemonic.TEST, Mnemonic.NOP, Mnemonic.BT, Mnemonic.PUSH, Mnemonic.ENDBR64}
)
_CONDITIONAL_MOVES: Final = frozenset(
    value for name, value in vars(Mnemonic).items() if name.startswith("CMOV")
)
_TWO_RESULTS: Final = frozenset(
    {
        *(Mnemonic.MUL, Mnemonic.DIV, Mnemonic.IDIV, Mnemonic.CQO, Mnemonic.CDQ),
        *(Mnemonic.RDMSR, Mnemonic.RDTSC, Mnemonic.CPUID, Mnemonic.RDTSCP, Mnemonic.RDPMC),
    }
)
_ACCUMULATOR: Final = frozenset({Register.RAX, Register.RDX, Register.RCX, Register.RBX})
_CALLS: Final = frozenset({FlowControl.CALL, FlowControl.INDIRECT_CALL})
_STEPS: Final = 4000  # instructions looked at for one register
_NESTED: Final = 12  # loads through pointers that are themselves loaded
_WAYS: Final = 300  # values of one register; more say nothing
_WORD: Final = 8
_MASK: Final = (1 << 64) - 1
_SIGN: Final = 1 << 63


class Facts(NamedTuple):
    """What is known besides the code: types, prototypes by address, calls that change nothing.

    `per_cpu` is the address that offsets in the per-CPU area are counted from. `held` says what
    type of pointer the variable at an address is, `leaves` what lies there.
    """

    layouts: "Layouts | None"
    prototypes: "Mapping[int, int]"
    silent: "frozenset[int]"
    per_cpu: int
    held: "Callable[[int], Value | None]"
    leaves: "Callable[[int], tuple[Leaf, ...]]"


class Origins:
    """Follows values backwards through one function."""

    def __init__(self, body: "Body", facts: Facts) -> None:
        self.body = body
        self.facts = facts
        self._known: dict[tuple[int, Key], Values] = {}

    def of_register(self, address: int, register: int) -> Values:
        """Return what a register may hold before the instruction at an address."""
        return self._values(address, ("register", register), 0)

    def of_operand(self, instruction: "Instruction", number: int = 0) -> Values:
        """Return what an operand of an instruction may be: register, memory, or a constant."""
        return self._operand(instruction, number, 0)

    def place_of(self, instruction: "Instruction") -> Values:
        """Return what the memory operand of an instruction is, as pointers and constants."""
        return self._address(instruction, 0)

    def _values(self, address: int, key: Key, depth: int) -> Values:
        known = self._known.get((address, key))
        if known is not None:
            return known
        if depth > _NESTED:
            return frozenset({UNKNOWN})
        # What comes round to itself adds nothing.
        self._known[address, key] = frozenset()
        found: set[Value] = set()
        seen = {(address, key)}
        pending = [(address, key)]
        while pending:
            if len(seen) > _STEPS or len(found) > _WAYS:
                found = {UNKNOWN}
                break
            here, wanted = pending.pop()
            before = self.body.before(here)
            if self.body.is_entry(here):
                found |= self._argument(here, wanted)
            elif not before:
                found.add(UNKNOWN)
            for instruction in before:
                values, onward = self._step(instruction, wanted, depth)
                found |= values
                if onward is not None and (instruction.ip, onward) not in seen:
                    seen.add((instruction.ip, onward))
                    pending.append((instruction.ip, onward))
        result = self._known[address, key] = frozenset(found)
        return result

    def _step(self, instruction: "Instruction", key: Key, depth: int) -> tuple[Values, Key | None]:
        """Say what an instruction puts into a place, and what to look for before it."""
        kind, number = key
        if kind == "slot":
            return self._step_slot(instruction, number, depth)
        flow = instruction.flow_control
        if flow in _CALLS:
            return self._step_call(instruction, key)
        if flow != FlowControl.NEXT or not instruction.op_count:
            if instruction.mnemonic in _TWO_RESULTS and number in _ACCUMULATOR:
                return frozenset({UNKNOWN}), None
            return frozenset(), key
        mnemonic = instruction.mnemonic
        if mnemonic in _READS_ONLY:
            return frozenset(), key
        if mnemonic in _TWO_RESULTS and number in _ACCUMULATOR:
            return frozenset({UNKNOWN}), None
        if mnemonic in {Mnemonic.XCHG, Mnemonic.XADD, Mnemonic.CMPXCHG} and number in {
            Register.RAX,
            full(instruction.op1_register),
        }:
            return frozenset({UNKNOWN}), None
        if instruction.op0_kind != OpKind.REGISTER or full(instruction.op0_register) != number:
            return frozenset(), key
        return self._assigned(instruction, key, depth)

    def _assigned(
        self, instruction: "Instruction", key: Key, depth: int
    ) -> tuple[Values, Key | None]:
        mnemonic, number = instruction.mnemonic, key[1]
        if mnemonic in _MOVES:
            if instruction.op1_kind == OpKind.REGISTER and mnemonic == Mnemonic.MOV:
                return frozenset(), ("register", full(instruction.op1_register))
            return self._operand(instruction, 1, depth), None
        if mnemonic == Mnemonic.LEA:
            return self._address(instruction, depth), None
        if mnemonic in _CONDITIONAL_MOVES:
            return self._operand(instruction, 1, depth), key
        is_same = (
            instruction.op_count > 1
            and instruction.op1_kind == OpKind.REGISTER
            and full(instruction.op1_register) == number
        )
        if mnemonic in {Mnemonic.XOR, Mnemonic.SUB} and is_same:
            return frozenset({Value("constant")}), None
        if mnemonic in {Mnemonic.ADD, Mnemonic.SUB}:
            return self._sum(instruction, key, depth), None
        if mnemonic == Mnemonic.AND and instruction.op1_kind != OpKind.REGISTER:
            # Alignment, or bits kept in a pointer.
            return frozenset(), key
        return frozenset({UNKNOWN}), None

    def _sum(self, instruction: "Instruction", key: Key, depth: int) -> Values:
        values = self._values(instruction.ip, key, depth + 1)
        if instruction.op1_kind in {OpKind.REGISTER, OpKind.MEMORY}:
            other = self._operand(instruction, 1, depth + 1)
            pointers = frozenset(v for v in (*values, *other) if v.source == "pointer")
            # An index into an array of what the pointer leads to.
            return pointers or frozenset({UNKNOWN})
        distance = _signed(instruction.immediate(1))
        sign = -1 if instruction.mnemonic == Mnemonic.SUB else 1
        return self._moved(values, sign * distance)

    def _step_slot(
        self, instruction: "Instruction", slot: int, depth: int
    ) -> tuple[Values, Key | None]:
        mnemonic = instruction.mnemonic
        here: Key = ("slot", slot)
        if mnemonic == Mnemonic.PUSH:
            if slot == 0:
                return self._operand(instruction, 0, depth), None
            return frozenset(), ("slot", slot - _WORD)
        if mnemonic == Mnemonic.POP:
            return frozenset(), ("slot", slot + _WORD)
        if instruction.op_count < 2:
            return frozenset(), here
        if instruction.op0_kind == OpKind.REGISTER and instruction.op0_register == Register.RSP:
            if mnemonic not in {Mnemonic.ADD, Mnemonic.SUB, Mnemonic.LEA}:
                return frozenset({UNKNOWN}), None
            if mnemonic == Mnemonic.LEA:
                if instruction.memory_base != Register.RSP:
                    return frozenset({UNKNOWN}), None
                return frozenset(), ("slot", slot + _signed(instruction.memory_displacement))
            if instruction.op1_kind == OpKind.REGISTER:
                return frozenset({UNKNOWN}), None
            distance = _signed(instruction.immediate(1))
            sign = 1 if mnemonic == Mnemonic.ADD else -1
            return frozenset(), ("slot", slot + sign * distance)
        is_store = (
            mnemonic == Mnemonic.MOV
            and instruction.op0_kind == OpKind.MEMORY
            and instruction.memory_base == Register.RSP
            and not instruction.memory_index
            and _signed(instruction.memory_displacement) == slot
        )
        return (self._operand(instruction, 1, depth), None) if is_store else (frozenset(), here)

    def _step_call(self, instruction: "Instruction", key: Key) -> tuple[Values, Key | None]:
        target = instruction.near_branch_target
        if key[1] not in _CLOBBERED or target in self.facts.silent:
            return frozenset(), key
        layouts, prototype = self.facts.layouts, self.facts.prototypes.get(target)
        if key[1] != Register.RAX or layouts is None or prototype is None:
            return frozenset({UNKNOWN}), None
        returns, _ = layouts.signature(prototype)
        return frozenset({self._of_type(returns)}), None

    def _operand(self, instruction: "Instruction", number: int, depth: int) -> Values:
        kind = instruction.op_kind(number)
        if kind == OpKind.REGISTER:
            key = ("register", full(instruction.op_register(number)))
            return self._values(instruction.ip, key, depth + 1)
        if kind == OpKind.MEMORY:
            return self._load(instruction, depth)
        return frozenset({Value("constant", _constant(instruction, number))})

    def _load(self, instruction: "Instruction", depth: int) -> Values:
        base = instruction.memory_base
        if instruction.segment_prefix == Register.GS:
            return frozenset({self._per_cpu(instruction)})
        if base == Register.RSP and not instruction.memory_index:
            slot = ("slot", _signed(instruction.memory_displacement))
            return self._values(instruction.ip, slot, depth + 1)
        found: set[Value] = set()
        for value in self._address(instruction, depth):
            if value == UNKNOWN:
                distance = _signed(instruction.memory_displacement)
                found.add(Value("field", at=distance))
                found |= self._of_some_cpu(distance)
            else:
                found |= self._content(value, indexed=bool(instruction.memory_index))
        return frozenset(found or {UNKNOWN})

    def _address(self, instruction: "Instruction", depth: int) -> Values:
        """Return where the memory operand is; an index moves within an array of one type."""
        base, index = full(instruction.memory_base), full(instruction.memory_index)
        distance = _signed(instruction.memory_displacement)
        if instruction.is_ip_rel_memory_operand:
            return frozenset({Value("constant", instruction.ip_rel_memory_address)})
        if not base:
            return frozenset({Value("constant", distance & _MASK)})
        key = ("register", base)
        values = self._values(instruction.ip, key, depth + 1)
        if index and instruction.memory_index_scale == 1 and not _tells(values):
            values = self._values(instruction.ip, ("register", index), depth + 1)
        return self._moved(values, distance)

    def _moved(self, values: Values, distance: int) -> Values:
        found = set()
        for value in values:
            if value.source == "pointer":
                found.add(Value("pointer", value.what, value.at + distance))
            elif value.source == "constant" and value.what:
                found.add(Value("constant", (value.what + distance) & _MASK))
            elif value.source != "constant":
                found.add(UNKNOWN)
        return frozenset(found)

    def _content(self, value: Value, *, indexed: bool) -> set[Value]:
        """Return what is loaded from where a value points to."""
        layouts = self.facts.layouts
        if value.source == "constant":
            held = None if indexed else self.facts.held(value.what)
            return {held or Value("table" if indexed else "variable", value.what)}
        if value.source != "pointer" or layouts is None:
            return {UNKNOWN}
        leaves = layouts.around(value.what, value.at)
        found = set()
        for leaf in leaves:
            prototype = layouts.prototype_of(leaf.kind)
            if prototype is not None:
                found.add(Value("member", leaf.owner, leaf.at, layouts.class_of(prototype)))
            else:
                found.add(self._of_type(leaf.kind))
        if len(found) > 1:
            # In one of several structs, what is no pointer at all cannot be meant.
            found.discard(UNKNOWN)
        return found or {UNKNOWN}

    def _of_type(self, kind: int) -> Value:
        """Return a value of which only the type is known."""
        layouts = self.facts.layouts
        if layouts is None:
            return UNKNOWN
        try:
            prototype = layouts.prototype_of(kind)
            if prototype is not None:
                return Value("typed", kind=layouts.class_of(prototype))
            target = layouts.pointed(kind)
            return UNKNOWN if not target else Value("pointer", target)
        except BadImageError:
            return UNKNOWN

    def _per_cpu(self, instruction: "Instruction") -> Value:
        layouts = self.facts.layouts
        if layouts is None or instruction.memory_index:
            return UNKNOWN
        at = instruction.memory_displacement
        if instruction.memory_base and not instruction.is_ip_rel_memory_operand:
            return UNKNOWN
        if instruction.is_ip_rel_memory_operand:
            at = instruction.ip_rel_memory_address
        offset = (at - self.facts.per_cpu) & _MASK
        kind = layouts.per_cpu.get(offset)
        if kind is None:
            return UNKNOWN
        leaves = layouts.leaves(Place(kind, 0))
        return self._of_type(leaves[0].kind) if leaves else UNKNOWN

    def _of_some_cpu(self, distance: int) -> set[Value]:
        """Return what is loaded where the base is that of some CPU's area."""
        layouts = self.facts.layouts
        place = None if layouts is None else layouts.per_cpu_at(distance - self.facts.per_cpu)
        if place is None:
            return set()
        found = self._content(Value("pointer", place.kind, place.offset), indexed=False)
        return {value for value in found if value.source in {"member", "pointer"}}

    def _argument(self, function: int, key: Key) -> set[Value]:
        kind, number = key
        layouts, prototype = self.facts.layouts, self.facts.prototypes.get(function)
        if kind != "register" or number not in ARGUMENTS:
            return {UNKNOWN}
        index = ARGUMENTS.index(number)
        if layouts is None or prototype is None:
            return {UNKNOWN}
        _, parameters = layouts.signature(prototype)
        if index >= len(parameters):
            return {UNKNOWN}
        value = self._of_type(parameters[index])
        if value.source == "typed":
            return {Value("argument", function, index, value.kind)}
        return {value}


def _tells(values: Values) -> bool:
    return any(value.source in {"pointer", "constant"} for value in values)


def _constant(instruction: "Instruction", number: int) -> int:
    return int(instruction.immediate(number)) & _MASK


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value & _SIGN else value
