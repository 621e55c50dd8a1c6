"""Stubs of the entry code that are copies of each other but for the function of C they call.

The macros of arch/x86/include/asm/idtentry.h make one for each vector. What is true of all paths
through one is true of the others: only numbers that are pushed, places within the stub and the
function that is called, once the state is safe, differ.
"""

from typing import TYPE_CHECKING, Final

from iced_x86 import FlowControl, Mnemonic

from trapline.isa.operands import normalise

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.contexts.patching import PatchedCode

_LONGEST: Final = 64  # instructions of a stub
_BRANCHES: Final = frozenset(
    (FlowControl.CALL, FlowControl.CONDITIONAL_BRANCH, FlowControl.UNCONDITIONAL_BRANCH)
)


def alike(code: "PatchedCode", stubs: "Iterable[int]") -> dict[int, int]:
    """Map each stub to the first that is like it, itself where none is."""
    first: dict[tuple[object, ...], int] = {}
    return {stub: first.setdefault(tuple(_shape(code, stub)), stub) for stub in stubs}


def _shape(code: "PatchedCode", stub: int) -> "Iterator[object]":
    """Give what makes a stub what it is, up to where it leaves for good."""
    address = stub
    for _ in range(_LONGEST):
        instruction = code.decode(address)
        if instruction is None:
            break
        for form in code.forms(address, {}):
            yield form.address == address, tuple(sorted(form.features.items()))
            if form.address != address:
                yield _text(code, form.address)
        flow = instruction.flow_control
        if flow in _BRANCHES:
            yield instruction.code, _target(code, instruction.near_branch_target, stub)
        elif instruction.mnemonic == Mnemonic.PUSH:
            yield instruction.code
        else:
            yield normalise(instruction)
        if flow in {FlowControl.UNCONDITIONAL_BRANCH, FlowControl.RETURN}:
            return
        address = instruction.next_ip
    yield stub  # too long to be compared


def _text(code: "PatchedCode", address: int) -> str:
    instruction = code.decode(address)
    return "" if instruction is None else normalise(instruction)


def _target(code: "PatchedCode", target: int, stub: int) -> object:
    """Name where a branch goes: into the stub, to shared entry code, or to a function of C."""
    if 0 <= target - stub < _LONGEST * 8:
        return "here", target - stub
    return target if code.in_entry(target) else "C"
