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


def twins(code: "PatchedCode", stub: int, other: int) -> dict[int, int]:
    """Map the instructions of a stub, those of its alternatives included, to another's like it."""
    return dict(zip(_addresses(code, stub), _addresses(code, other), strict=True))


def _shape(code: "PatchedCode", stub: int) -> "Iterator[object]":
    """Give what makes a stub what it is, up to where it leaves for good."""
    places = list(_addresses(code, stub))
    for address in places:
        instruction = code.decode(address)
        if instruction is None:
            yield stub  # broken, and so like no other
            return
        yield tuple(
            (form.address == address, form.is_empty, form.direct, tuple(form.features.items()))
            for form in code.forms(address, {})
        )
        if instruction.flow_control in _BRANCHES:
            yield instruction.code, _target(code, instruction.near_branch_target, stub)
        elif instruction.mnemonic == Mnemonic.PUSH:
            yield instruction.code
        else:
            yield normalise(instruction)
    if len(places) > _LONGEST:
        yield stub  # too long to be compared


def _addresses(code: "PatchedCode", stub: int) -> "Iterator[int]":
    """Give where the instructions of a stub are, up to where it leaves for good."""
    address = stub
    for _ in range(_LONGEST + 1):
        yield address
        instruction = code.decode(address)
        if instruction is None:
            return
        for form in code.forms(address, {}):
            replacing = code.binary.alternatives.replacing_at(form.address)
            if replacing is not None and not form.is_empty:
                yield from _straight(code, form.address, form.address + replacing.size)
        if instruction.flow_control in {FlowControl.UNCONDITIONAL_BRANCH, FlowControl.RETURN}:
            return
        address = instruction.next_ip


def _straight(code: "PatchedCode", address: int, end: int) -> "Iterator[int]":
    while address < end and (instruction := code.decode(address)) is not None:
        yield address
        address = instruction.next_ip


def _target(code: "PatchedCode", target: int, stub: int) -> object:
    """Name where a branch goes: into the stub, to shared entry code, or to a function of C."""
    if 0 <= target - stub < _LONGEST * 8:
        return "here", target - stub
    return target if code.in_entry(target) else "C"
