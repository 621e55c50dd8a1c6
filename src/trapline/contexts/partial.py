"""The part of a function that runs before it calls some other one, and the part behind that."""

from typing import TYPE_CHECKING, Final, NamedTuple

from iced_x86 import FlowControl, OpKind

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from iced_x86 import Instruction

_ENDS: Final = frozenset(
    {FlowControl.RETURN, FlowControl.UNCONDITIONAL_BRANCH, FlowControl.INDIRECT_BRANCH}
)
_JUMPS: Final = frozenset({FlowControl.CONDITIONAL_BRANCH, FlowControl.UNCONDITIONAL_BRANCH})


class Halves(NamedTuple):
    """Addresses of instructions: those that may run before the call, and those that may behind.

    `found`: whether there is such a call.
    """

    before: frozenset[int]
    after: frozenset[int]
    found: bool


def halves(body: "Mapping[int, Instruction]", start: int, calls: "Collection[int]") -> Halves:
    """Divide the instructions of a function, by address, at its calls of some functions."""
    ends: set[int] = set()
    before = _from([start], body, calls, ends)
    after = _from(sorted(body[end].next_ip for end in ends), body, (), set())
    return Halves(before, after, bool(ends))


def _from(
    starts: list[int],
    body: "Mapping[int, Instruction]",
    calls: "Collection[int]",
    ends: set[int],
) -> frozenset[int]:
    pending, seen = list(starts), set()
    while pending:
        address = pending.pop()
        instruction = body.get(address)
        if instruction is None or address in seen:
            continue
        flow = instruction.flow_control
        if instruction.op0_kind == OpKind.NEAR_BRANCH64:
            if instruction.near_branch_target in calls:
                ends.add(address)
                continue
            if flow in _JUMPS:
                pending.append(instruction.near_branch_target)
        seen.add(address)
        if flow not in _ENDS:
            pending.append(instruction.next_ip)
    return frozenset(seen)
