"""Where the address of a function goes that an instruction loads: stored, handed on, or lost."""

from typing import TYPE_CHECKING, Final, NamedTuple

from iced_x86 import FlowControl, Mnemonic, OpKind, Register

from trapline.isa.flow import full
from trapline.kernel.calls.optables import Member
from trapline.kernel.calls.origins import ARGUMENTS, Value

if TYPE_CHECKING:
    from iced_x86 import Instruction

    from trapline.kernel.calls.body import Body
    from trapline.kernel.calls.origins import Origins
    from trapline.kernel.types.layout import Layouts

_AHEAD: Final = 60  # instructions between a load and the use of what was loaded
_HARMLESS: Final = frozenset({Mnemonic.CMP, Mnemonic.TEST, Mnemonic.NOP})
_CLOBBERED: Final = frozenset((*ARGUMENTS, Register.RAX, Register.R10, Register.R11))
_CALLS: Final = frozenset({FlowControl.CALL, FlowControl.UNCONDITIONAL_BRANCH})


class Variable(NamedTuple):
    """The function pointer at an address."""

    address: int


class Argument(NamedTuple):
    """What a function is called with; `number` counts from 0."""

    function: int
    number: int


#: None: where it goes is not known.
Cell = Member | Variable | Argument | None


def stored_at(
    instruction: "Instruction", origins: "Origins", layouts: "Layouts | None"
) -> list[Cell]:
    """Return what a MOV to memory writes to."""
    if instruction.memory_base == Register.RSP:
        return [None]
    found: list[Cell] = []
    for value in origins.place_of(instruction):
        if value.source == "constant" and value.what:
            found.append(Variable(value.what))
            found += [Member(leaf.owner, leaf.at) for leaf in origins.facts.leaves(value.what)]
        else:
            found += cells_of(value, layouts)
    return found or [None]


def cells_of(value: Value, layouts: "Layouts | None") -> list[Cell]:
    """Return the cells at the place that a pointer leads to."""
    if value.source != "pointer" or layouts is None:
        return [None]
    found: list[Cell] = []
    for leaf in layouts.around(value.what, value.at):
        is_pointer = layouts.prototype_of(leaf.kind) is not None
        found.append(Member(leaf.owner, leaf.at) if is_pointer else None)
    return found or [None]


class Uses:
    """Follows what an instruction loads forward through one function."""

    def __init__(self, body: "Body", origins: "Origins", layouts: "Layouts | None") -> None:
        self._body = body
        self._origins = origins
        self._layouts = layouts

    def of_load(self, address: int) -> list[Cell]:
        """Return where the constant in the instruction at an address goes."""
        instruction = self._body.instructions.get(address)
        if instruction is None:
            return [None]
        if instruction.op0_kind == OpKind.MEMORY and instruction.mnemonic == Mnemonic.MOV:
            return stored_at(instruction, self._origins, self._layouts)
        if instruction.mnemonic in _HARMLESS:
            return []
        if instruction.op0_kind != OpKind.REGISTER:
            return [None]
        return self._ahead(instruction.next_ip, {full(instruction.op0_register)})

    def _ahead(self, address: int, held: set[int]) -> list[Cell]:
        found: list[Cell] = []
        for _ in range(_AHEAD):
            instruction = self._body.instructions.get(address)
            if instruction is None or not held:
                break
            flow = instruction.flow_control
            if flow in _CALLS and instruction.near_branch_target not in self._body.instructions:
                found += self._handed(instruction, held)
                if flow == FlowControl.UNCONDITIONAL_BRANCH:
                    return found or [None]
                held -= _CLOBBERED
            elif flow == FlowControl.UNCONDITIONAL_BRANCH:
                address = instruction.near_branch_target
                continue
            elif flow in {FlowControl.RETURN, FlowControl.INDIRECT_CALL}:
                return [*found, None]
            elif flow == FlowControl.NEXT:
                found += self._plain(instruction, held)
            address = instruction.next_ip
        return found or [None]

    def _handed(self, instruction: "Instruction", held: set[int]) -> list[Cell]:
        target = instruction.near_branch_target
        if target in self._origins.facts.silent:
            return []
        return [
            Argument(target, number)
            for number, register in enumerate(ARGUMENTS)
            if register in held
        ]

    def _plain(self, instruction: "Instruction", held: set[int]) -> list[Cell]:
        if not instruction.op_count or instruction.mnemonic in _HARMLESS:
            return []
        source = (
            full(instruction.op1_register)
            if instruction.op_count > 1 and instruction.op1_kind == OpKind.REGISTER
            else None
        )
        is_move = instruction.mnemonic == Mnemonic.MOV
        if instruction.op0_kind == OpKind.MEMORY:
            if source not in held:
                return []
            return stored_at(instruction, self._origins, self._layouts) if is_move else [None]
        if instruction.op0_kind != OpKind.REGISTER:
            return []
        target = full(instruction.op0_register)
        if instruction.mnemonic == Mnemonic.PUSH:
            return [None] if target in held else []
        if source in held and is_move:
            held.add(target)
            return []
        if target in held or source in held:
            held.discard(target)
            return [] if is_move or instruction.mnemonic == Mnemonic.LEA else [None]
        return []
