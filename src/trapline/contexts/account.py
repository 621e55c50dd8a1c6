"""What a walk found, as the document has it: places, sites, accesses and edges of one gap."""

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final

from trapline.contexts.mayexit import Exits, Traps, accesses, may_exit, touches_memory
from trapline.isa.operands import format_instruction, normalise
from trapline.linux.accessors import HEADERS
from trapline.results.contexts import (
    FORBIDDEN_ACCESSES,
    Gap,
    GapEdge,
    GapEntry,
    GapInstruction,
    GapSite,
    Place,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from iced_x86 import Instruction

    from trapline.contexts.hardware import Group
    from trapline.contexts.patching import PatchedCode
    from trapline.contexts.paths import Edge, Seen, Walked
    from trapline.contexts.processor import Processor
    from trapline.kernel.binary import Binary
    from trapline.results.contexts import AccessKind, Direction, EdgeKind, TrapAnswer
    from trapline.results.trapclass import TrapClass
    from trapline.rules.ruleset import RuleSet

_REASONS: "Final[dict[EdgeKind, str]]" = {
    "indirect call": "what is called is not known here",
    "indirect jump": "where it goes is not known here",
    "return": "where it returns to is not known here",
    "paravirt call": "the member of pv_ops is not known",
    "static call": "it is patched; followed to what the image has",
    "report": "prints or gives up; what that reaches is not walked",
    "exception": "an exception of its own (BUG, WARN), whose handler is not walked",
    "no code": "there is no code",
    "too many paths": "the walk was cut off",
    "no origin": "no state is known in which a fault comes from there",
}
_ANSWERS: "Final[dict[TrapAnswer, str]]" = {
    "ve": "the rules say that it traps",
    "may": "what decides whether it traps is not known here",
    "no": "the TDX module or the processor answers without a #VE",
}
_ACCESS_REASONS: "Final[dict[AccessKind, str]]" = {
    "user stack": "touches the stack while RSP is not the kernel's",
    "user GS": "reads or writes through the GS base of user mode",
    "user memory": "touches an address that user mode chose",
    "device": "touches device memory",
}


class Looked:
    """What was seen of the instructions of one gap: how they exit, what they touch."""

    def __init__(self, binary: "Binary", rules: "RuleSet") -> None:
        self._binary = binary
        self._traps = Traps(rules)
        self._kinds: dict[int, tuple[bool, bool]] = {}
        self.exits: dict[int, set[Exits]] = defaultdict(set)
        self.accesses: dict[int, set[AccessKind]] = defaultdict(set)

    def clear(self) -> None:
        """Begin with another gap."""
        self.exits.clear()
        self.accesses.clear()

    def copy(self, place: int, twin: int) -> None:
        """Say of one instruction what is true of another."""
        self.exits[twin] |= self.exits[place]
        self.accesses[twin] |= self.accesses[place]

    def look(self, instruction: "Instruction", state: "Processor") -> None:
        """See one instruction in one state."""
        address = instruction.ip
        kind = self._kinds.get(address)
        if kind is None:
            kind = self._kinds[address] = (may_exit(instruction), touches_memory(instruction))
        if kind[0] and (found := self._traps.of(instruction, state)) is not None:
            self.exits[address].add(found)
        if kind[1]:
            self.accesses[address] |= accesses(instruction, state, self._binary)


class Account:
    """One gap told: `found` is what its walk found, `looked` what was seen of its instructions."""

    def __init__(self, code: "PatchedCode", looked: Looked, found: "Walked") -> None:
        self._code = code
        self._binary = code.binary
        self._looked = looked
        self._found = found

    def gap(self, group: "Group", like: "dict[int, int]") -> Gap:
        """Tell it; `like` maps each entry's stub to the one that was walked for it."""
        gap = self._found.gap
        conditions = Counter(each for states in gap.values() for each in _conditions(states))
        kinds = Counter(kind for address in gap for kind in self._looked.accesses[address])
        return Gap(
            id=group.id,
            title=group.title,
            entries=tuple(self._entries(group, like)),
            instructions=tuple(self._instruction(address) for address in sorted(gap)),
            in_=sum("in" in _directions(states) for states in gap.values()),
            out=sum("out" in _directions(states) for states in gap.values()),
            paths=self._found.paths,
            leaves=tuple(sorted(self._found.ends)),
            by_condition=dict(sorted(conditions.items())),
            accesses=dict(sorted(kinds.items())),
            sites=tuple(self._sites(group.id)),
            edges=tuple(self._edges(group.id)),
        )

    def _entries(self, group: "Group", like: "dict[int, int]") -> "Iterator[GapEntry]":
        for entry in group.entries:
            other = like[entry.address]
            yield GapEntry(
                function=self._function(entry.address),
                vector=entry.vector,
                found=entry.found,
                like=None if other == entry.address else self._function(other),
            )

    def _function(self, address: int) -> str:
        symbol = self._binary.symbol_at(address)
        return f"{address:#x}" if symbol is None else symbol.name

    def _place(self, address: int) -> Place:
        at = self._code.place(address)
        symbol = self._binary.symbol_at(at)
        line = self._binary.line_at(at)
        return Place(
            function=f"{at:#x}" if symbol is None else symbol.name,
            offset=0 if symbol is None else at - symbol.address,
            alternative=at != address,
            address=f"{address:#x}",
            file=None if line is None else line[0],
            line=None if line is None else line[1] or None,
        )

    def _text(self, address: int) -> str:
        instruction = self._code.decode(address)
        return "" if instruction is None else format_instruction(instruction)

    def _instruction(self, address: int) -> GapInstruction:
        states = self._found.gap[address]
        return GapInstruction(
            place=self._place(address),
            instruction=self._text(address),
            directions=_directions(states),
            conditions=_conditions(states),
        )

    # Sites.

    def _sites(self, gap: str) -> "Iterator[GapSite]":
        seen: Counter[str] = Counter()
        for address in sorted(self._found.gap):
            for trap, answer, rule, subject, reason in self._may_trap(address):
                place = self._place(address)
                instruction = self._code.decode(address)
                assert instruction is not None, "it was executed"
                name = f"{gap}:{place.function}:{normalise(instruction)}"
                seen[name] += 1
                states = self._found.gap[address]
                yield GapSite(
                    id=name if seen[name] == 1 else f"{name}#{seen[name]}",
                    trap=trap,
                    answer=answer,
                    rule=rule,
                    subject=subject,
                    place=place,
                    instruction=format_instruction(instruction),
                    directions=_directions(states),
                    conditions=_conditions(states),
                    reason=reason,
                )

    def _may_trap(self, address: int) -> "Iterator[tuple[TrapClass, TrapAnswer, str, str, str]]":
        for exits in sorted(self._looked.exits[address]):
            yield (*exits, _ANSWERS[exits.answer])
        for kind in sorted(self._looked.accesses[address] & FORBIDDEN_ACCESSES):
            yield "mmio", "may", "", "", _ACCESS_REASONS[kind]
        if "pointer" in self._looked.accesses[address]:
            line = self._binary.line_at(address)
            if line is not None and line[0] in HEADERS:
                where = f"{line[0]}:{line[1]}"
                yield "mmio", "ve", "shared-mmio", "", f"accesses a device, says {where}"

    # Edges.

    def _edges(self, gap: str) -> "Iterator[GapEdge]":
        seen: Counter[str] = Counter()
        for edge in sorted(self._found.edges, key=_order):
            place = self._place(edge.address)
            target = None if edge.target is None else self._function(edge.target)
            name = f"{gap}:{edge.kind}:{place.function}:{target or ''}"
            seen[name] += 1
            yield GapEdge(
                id=name if seen[name] == 1 else f"{name}#{seen[name]}",
                kind=edge.kind,
                place=place,
                target=target,
                reason=_REASONS[edge.kind],
            )


def _order(edge: "Edge") -> tuple[int, str, int]:
    return edge.address, edge.kind, edge.target or 0


def _directions(states: "Iterable[Seen]") -> "tuple[Direction, ...]":
    ways = {state.leaving for state in states}
    both: tuple[tuple[bool, Direction], ...] = ((False, "in"), (True, "out"))
    return tuple(name for leaving, name in both if leaving in ways)


def _conditions(states: "Iterable[Seen]") -> tuple[str, ...]:
    return tuple(sorted({each for state in states for each in state.conditions}))
