"""The instructions of a function with what may run before each."""

from typing import TYPE_CHECKING, Final

from iced_x86 import FlowControl, OpKind

if TYPE_CHECKING:
    from iced_x86 import Instruction

    from trapline.kernel.calls.codemap import CodeMap

_JUMPS: Final = frozenset({FlowControl.CONDITIONAL_BRANCH, FlowControl.UNCONDITIONAL_BRANCH})
_THROUGH: Final = frozenset(
    {
        FlowControl.NEXT,
        FlowControl.CALL,
        FlowControl.INDIRECT_CALL,
        FlowControl.CONDITIONAL_BRANCH,
        FlowControl.EXCEPTION,
    }
)


class Body:
    """One function, and those that jump into its middle, or it into theirs: its split-off parts."""

    def __init__(self, code: "CodeMap", function: int) -> None:
        self.instructions: dict[int, Instruction] = {}
        self._before: dict[int, list[Instruction]] = {}
        self._never = code.thunks.keys() | code.returns
        self._entries = {code.start(function)}
        parts = code.joined.get(function, ())
        for each in (function, *parts):
            self._add(code.body(each))
        starts = {code.start(each) for each in parts}
        self._entries |= {start for start in starts if start not in self._before}

    def before(self, address: int) -> "list[Instruction]":
        """Return the instructions behind which control comes to an address."""
        return self._before.get(address, [])

    def is_entry(self, address: int) -> bool:
        """Whether the function is called at an address."""
        return address in self._entries

    def _add(self, instructions: "list[Instruction]") -> None:
        for instruction in instructions:
            self.instructions[instruction.ip] = instruction
            flow = instruction.flow_control
            if flow in _JUMPS and instruction.op0_kind == OpKind.NEAR_BRANCH64:
                if instruction.near_branch_target in self._never:
                    continue
                self._before.setdefault(instruction.near_branch_target, []).append(instruction)
            if flow in _THROUGH:
                self._before.setdefault(instruction.next_ip, []).append(instruction)
