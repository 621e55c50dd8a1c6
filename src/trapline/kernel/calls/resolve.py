"""From what an indirect branch goes through to the functions that it may lead to."""

from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np

from trapline.kernel.calls.graph import EdgeKind, Site
from trapline.kernel.calls.optables import Member
from trapline.kernel.calls.origins import ARGUMENTS
from trapline.kernel.calls.survey import FEW
from trapline.kernel.calls.uses import Cell, Variable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trapline.kernel.calls.codemap import CodeMap
    from trapline.kernel.calls.kcfi import Kcfi
    from trapline.kernel.calls.optables import Tables
    from trapline.kernel.calls.origins import Value, Values
    from trapline.kernel.calls.pointers import Pointers
    from trapline.kernel.calls.survey import Survey
    from trapline.kernel.types.layout import Layouts

Found = tuple[EdgeKind, frozenset[int]]

_NOTHING: "Final[frozenset[int]]" = frozenset()
#: The better first: a site of several values is of the kind of its worst.
_ORDER: "Final[tuple[EdgeKind, ...]]" = (
    *("call", "jump table", "paravirt", "variable", "table", "argument"),
    *("kcfi", "prototype", "offset", "unknown"),
)
_CALLERS: Final = 200  # of a function whose argument is called; of more, the prototype tells
_WORD: Final = 8
_MAX_TABLE: Final = 4096


class Resolver:
    """Finds targets; `paravirt` are the bounds of the table of paravirtual calls."""

    def __init__(
        self,
        code: "CodeMap",
        survey: "Survey",
        pointers: "Pointers",
        tables: "Tables | None",
        layouts: "Layouts | None",
        classes: dict[int, int],
        kcfi: "Kcfi",
        paravirt: range,
    ) -> None:
        self._code = code
        self._survey = survey
        self._pointers = pointers
        self._tables = tables
        self._layouts = layouts
        self._classes = classes
        self._kcfi = kcfi
        self._paravirt = paravirt
        self._arguments: dict[tuple[int, int], Found] = {}
        self._sorted: dict[frozenset[int], tuple[int, ...]] = {}
        self._variables: dict[int, Found] = {}
        self._filtered: dict[object, frozenset[int]] = {}
        order = np.argsort(code.branches.targets, kind="stable")
        self._callers = code.branches.sites[order]
        self._called = code.branches.targets[order]

    def site(self, address: int, values: "Values") -> Site:
        """Return what an indirect branch may lead to."""
        kind, targets = self.of_values(values, self._survey.arguments.get(address, ()))
        typed = self._kcfi.targets(address, self._callable)
        if typed is not None:
            precise = kind in {"table", "variable", "argument", "call"} and targets & typed
            kind, targets = (kind, targets & typed) if precise else ("kcfi", typed)
        return Site(kind, self._shared(targets))

    def _shared(self, targets: frozenset[int]) -> tuple[int, ...]:
        """Return targets in order; many sites have the same thousands of them."""
        known = self._sorted.get(targets)
        if known is None:
            known = self._sorted[targets] = tuple(sorted(targets))
        return known

    def of_values(self, values: "Iterable[Value]", arguments: "tuple[Values, ...]") -> Found:
        """Return the worst kind and all targets of some values."""
        kind: EdgeKind = "call"
        targets: frozenset[int] = _NOTHING
        values = sorted(values)
        is_vague = sum(value.source == "member" for value in values) > FEW
        for value in values:
            if value.source == "constant" and not value.what:
                continue
            if is_vague and value.source == "member":
                kind = max(kind, "offset", key=_ORDER.index)
                if not self._can_take(value.kind, arguments):
                    continue
            its_kind, its_targets = self._of_value(value, arguments)
            targets = targets | its_targets if targets else its_targets
            kind = max(kind, its_kind, key=_ORDER.index)
        return kind, targets

    def _of_value(self, value: "Value", arguments: "tuple[Values, ...]") -> Found:
        if value.source == "constant":
            is_function = self._code.is_function(value.what)
            return ("call", frozenset({value.what})) if is_function else ("unknown", _NOTHING)
        if value.source == "member":
            member = Member(value.what, value.at)
            if self._is_copied(member):
                return "prototype", self._of_class(value.kind)
            return "table", self.member(member, value.kind)
        if value.source == "variable":
            return self._variable(value.what)
        if value.source == "table":
            return "jump table", frozenset(self._table(value.what))
        if value.source == "argument":
            return self._argument(value)
        if value.source == "typed":
            return "prototype", self._of_class(value.kind)
        if value.source == "field":
            return "offset", self._field(value.at, arguments)
        return "unknown", self._taken

    def _is_copied(self, member: Member) -> bool:
        """Whether what is in a member can only be copied there from elsewhere.

        No variable has its struct, and no code puts a function into it.
        """
        if self._contents.get(member) or self._tables is None:
            return False
        return member.struct not in self._tables.structs

    def member(self, member: Member, kind: int) -> frozenset[int]:
        """Return what a function pointer in a struct may point to; `kind` is its class."""
        found = self._put(member, kind)
        found |= self._lost.get(kind, _NOTHING)
        if self._tables is not None:
            found |= self._tables.members.get(member, _NOTHING)
            found |= self._tables.loose.get(kind, _NOTHING)
        return frozenset(found)

    def _variable(self, address: int) -> Found:
        known = self._variables.get(address)
        if known is None:
            # What a variable is copied from itself adds nothing.
            self._variables[address] = ("variable", _NOTHING)
            known = self._variables[address] = self._held(address)
        return known

    def _held(self, address: int) -> Found:
        found = set(self._contents.get(Variable(address), ()))
        target = self._pointers.at(address)
        if target is not None:
            found.add(target)
        for leaf in self._survey.facts.leaves(address):
            prototype = None if self._layouts is None else self._layouts.prototype_of(leaf.kind)
            if prototype is not None and self._layouts is not None:
                kind = self._layouts.class_of(prototype)
                found |= self._put(Member(leaf.owner, leaf.at), kind)
        if address in self._paravirt:
            return "paravirt", frozenset(found)
        if self._pointers.variable(address) is None:
            found |= set(self._table(address))
        worst, stored = self.of_values(
            (v for v in self._survey.stores.get(address, ()) if v.source != "field"), ()
        )
        found |= stored
        if not found:
            return "offset", self._by_size(address)
        ranked: EdgeKind = "variable"
        return max(ranked, worst, key=_ORDER.index), frozenset(found)

    def _put(self, member: Member, kind: int) -> set[int]:
        """Return what code puts into a member of a class.

        To a variable of which only the size is known, code writes other structs' members.
        """
        put = self._contents.get(member, _NOTHING)
        return {function for function in put if self._classes.get(function, kind) == kind}

    def _by_size(self, address: int) -> frozenset[int]:
        """Return what a member of any struct of a variable's size points to at that place."""
        variable = self._pointers.variable(address)
        if variable is None or self._layouts is None:
            return _NOTHING
        start, end = variable
        found: set[int] = set()
        for struct in self._layouts.by_size.get(end - start, ()):
            for leaf in self._layouts.around(struct, address - start):
                prototype = self._layouts.prototype_of(leaf.kind)
                if prototype is not None:
                    kind = self._layouts.class_of(prototype)
                    found |= self.member(Member(leaf.owner, leaf.at), kind)
        return frozenset(found)

    def _table(self, address: int) -> list[int]:
        """Return the code that an array at an address points to, up to what is no code.

        One that starts with a place in the middle of a function is of that function only.
        """
        found: list[int] = []
        home: int | None = None
        for number in range(_MAX_TABLE):
            word = self._pointers.word(address + number * _WORD)
            if word is None or (word and not self._code.holds(word)):
                break
            if not word:
                continue
            if not found and not self._code.is_function(word):
                home = self._code.owner(word)
            if home is not None and self._code.owner(word) != home:
                break
            found.append(word)
        return found

    def _argument(self, value: "Value") -> Found:
        key = (value.what, value.at)
        known = self._arguments.get(key)
        if known is not None:
            return known
        # What a function hands to itself adds nothing.
        self._arguments[key] = ("argument", _NOTHING)
        found = self._handed(value)
        self._arguments[key] = found
        return found

    def _handed(self, value: "Value") -> Found:
        function, number = value.what, value.at
        low, high = np.searchsorted(self._called, np.array([function, function + 1], np.uint64))
        callers = self._callers[low:high].tolist()
        if len(callers) > _CALLERS or function in self._taken:
            return "prototype", self._of_class(value.kind)
        found: set[int] = set()
        kind: EdgeKind = "argument"
        for site in callers:
            owner = self._code.owner(site)
            values = self._survey.origins(owner).of_register(site, ARGUMENTS[number])
            if any(v.source in {"unknown", "field", "pointer"} for v in values):
                return "prototype", self._of_class(value.kind)
            its_kind, targets = self.of_values(values, ())
            kind = max(kind, its_kind, key=_ORDER.index)
            found |= targets
        return kind, frozenset(found)

    def _field(self, at: int, arguments: "tuple[Values, ...]") -> frozenset[int]:
        """Return what any struct points to at an offset, of the prototypes that can be meant."""
        if self._layouts is None:
            return self._taken
        key = (at, self._told(arguments))
        known = self._filtered.get(key)
        if known is None:
            found: set[int] = set()
            for member, kind in self._layouts.at_offset.get(at, ()):
                if self._can_take(kind, arguments):
                    found |= self.member(Member(*member), kind)
            known = self._filtered[key] = frozenset(found)
        return known

    def _can_take(self, kind: int, arguments: "tuple[Values, ...]") -> bool:
        """Whether a function of a class may be called with arguments of known types."""
        if self._layouts is None:
            return True
        expected = self._layouts.structs_taken(kind)
        return all(
            wanted is None or given is None or self._layouts.may_be(given, wanted)
            for given, wanted in zip(self._told(arguments), expected, strict=False)
        )

    @staticmethod
    def _told(arguments: "tuple[Values, ...]") -> tuple[int | None, ...]:
        """Return which struct each argument is known to point to the start of."""
        return tuple(
            next(iter(values)).what
            if len(values) == 1
            and next(iter(values)).source == "pointer"
            and not next(iter(values)).at
            else None
            for values in arguments
        )

    def _of_class(self, kind: int) -> frozenset[int]:
        return self._by_class.get(kind, _NOTHING) | self._unclassed

    @cached_property
    def _taken(self) -> frozenset[int]:
        """Functions whose address is in a variable, or used by code."""
        found = {function for functions in self._survey.assigned.values() for function in functions}
        for start, end, pairs in self._pointers.by_variable():
            if end - start > _WORD:
                found.update(target for _, target in pairs)
        return frozenset(found)

    @cached_property
    def _callable(self) -> frozenset[int]:
        """The same with those in tables that only the linker knows, such as that of initcalls."""
        return self._taken | set(self._pointers.targets.tolist()) | self._pointers.relative

    @cached_property
    def _by_class(self) -> dict[int, frozenset[int]]:
        found: dict[int, set[int]] = {}
        for function in self._callable:
            kind = self._classes.get(function)
            if kind is not None:
                found.setdefault(kind, set()).add(function)
        return {kind: frozenset(functions) for kind, functions in found.items()}

    @cached_property
    def _unclassed(self) -> frozenset[int]:
        return frozenset(self._lost_functions - self._classes.keys())

    @cached_property
    def _contents(self) -> dict[Cell, set[int]]:
        """What code puts into each cell, directly or through the arguments of functions."""
        found = {cell: set(functions) for cell, functions in self._survey.assigned.items()}
        pending = [cell for cell in found if cell is not None]
        while pending:
            cell = pending.pop()
            for other in self._survey.flows.get(cell, ()):
                known = found.setdefault(other, set())
                if not found[cell] <= known:
                    known |= found[cell]
                    if other is not None:
                        pending.append(other)
        return found

    @cached_property
    def _lost_functions(self) -> set[int]:
        return self._contents.get(None, set())

    @cached_property
    def _lost(self) -> dict[int, set[int]]:
        """Class -> the functions that code puts where nobody can tell."""
        found: dict[int, set[int]] = {}
        for function in self._lost_functions:
            found.setdefault(self._classes.get(function, -1), set()).add(function)
        return found
