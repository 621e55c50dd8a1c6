"""Proves the gaps of one kernel: what runs while a trap may not land.

That is between the hardware's entry and a state that is safe, and from there out to IRET, SYSRET,
SYSEXIT and ERETU.
"""

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from trapline.contexts import hardware
from trapline.contexts.account import Account, Looked
from trapline.contexts.patching import PatchedCode
from trapline.contexts.paths import Edge, Paths, Walked
from trapline.contexts.processor import CS_KERNEL
from trapline.contexts.stubs import alike, twins
from trapline.linux import names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.contexts.hardware import Entry, Group, Hardware
    from trapline.contexts.processor import Processor
    from trapline.kernel.binary import Binary
    from trapline.results.contexts import Gap
    from trapline.rules.ruleset import RuleSet

#: What a proof takes for granted.
ASSUMPTIONS: Final = (
    (
        "The kernel's image, its per-CPU areas and its own stacks are private memory that it has "
        "accepted; accesses to them, and through pointers that it loads from there, are counted."
    ),
    (
        "The kernel is no Xen PV guest (X86_FEATURE_XENPV), so those alternatives are dead; all "
        "others are walked in both forms, static keys both ways."
    ),
    (
        "A function of C that is called where a trap may land keeps to the ABI, and leaves the CS "
        "of the frame in its mode; what it reaches is no part of a gap."
    ),
    "Without FSGSBASE the user's GS base is in the lower half of the address space.",
    (
        "IRET faults only on its way to user mode; other places at which a fault finds the user's "
        "GS base are those that the kernel compares the interrupted RIP with."
    ),
    "#VC (vector 29) is AMD's and does not come.",
)
_LABEL_VECTORS: Final = frozenset((10, 11, 12, 13, 14, 17))  # #TS to #PF, #AC: what IRET can raise


class Gaps:
    """The gaps of one kernel, in the order of the hardware's groups."""

    def __init__(self, binary: "Binary", rules: "RuleSet") -> None:
        self._binary = binary
        self._code = PatchedCode(binary)
        self._looked = Looked(binary, rules)
        bases = (binary.address_of(name) for name in names.PERCPU_BASES)
        self._paths = Paths(
            self._code, {base for base in bases if base is not None}, self._looked.look
        )
        self._starts = hardware.Starts(self._paths.tops, self._code.page_table_features)
        self.hardware: Hardware = hardware.Hardware.of(self._code)

    def all(self) -> "Iterator[Gap]":
        """Walk one gap after the other."""
        for group in self.hardware.groups:
            yield self._gap(group)

    def _gap(self, group: "Group") -> "Gap":
        self._looked.clear()
        like = alike(self._code, [entry.address for entry in group.entries])
        walked = [entry for entry in group.entries if like[entry.address] == entry.address]
        starts = [state for entry in walked for state in self._starts.of(entry)]
        found = self._paths.walk(starts)
        for label in sorted(found.labels):
            self._from_label(label, walked, found)
        for stub, other in like.items():
            if stub != other:
                self._copy(twins(self._code, other, stub), found)
        return Account(self._code, self._looked, found).gap(group, like)

    def _copy(self, places: dict[int, int], found: Walked) -> None:
        """Say of the copy of a stub what is true of the stub."""
        for place, twin in places.items():
            if place in found.gap:
                found.gap[twin] |= found.gap[place]
                self._looked.copy(place, twin)

    def _from_label(self, label: int, entries: "list[Entry]", found: Walked) -> None:
        """Walk what happens to faults that come from a place the kernel knows by its address."""
        faults = [entry for entry in entries if entry.vector in _LABEL_VECTORS]
        if not faults:
            return
        origins = self._origins(label)
        if not origins:
            found.edges.add(Edge(label, "no origin", None))
        starts = []
        for origin in origins:
            for entry in faults:
                state = origin.copy(entry.address)
                hardware.deliver(state, entry, CS_KERNEL, label, origin.rsp)
                state.was_safe = False
                starts.append(state)
        found.add(self._paths.walk(starts))

    def _origins(self, label: int) -> "list[Processor]":
        """Give the states in which the kernel comes to a place, GS base and frame included."""
        instruction = self._code.decode(label)
        is_return = instruction is not None and instruction.mnemonic == Mnemonic.IRETQ
        if is_return:
            task = next((g for g in self.hardware.groups if g.id in {"syscall", "task"}), None)
            entries = [] if task is None else task.entries
            starts = [state for entry in entries for state in self._starts.of(entry)]
        else:
            starts = self._function_starts(label)
        kept = self._paths.states_at(label, starts)
        return [state for state in kept if not is_return or state.interrupted_user()]

    def _function_starts(self, label: int) -> "list[Processor]":
        symbol = self._binary.symbol_at(label)
        if symbol is None:
            return []
        return self._starts.of_function(symbol.address)
