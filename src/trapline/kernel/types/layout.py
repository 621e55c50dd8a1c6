"""What lies at an offset of a type: members by place, not by name, and when two prototypes agree.

Code knows offsets only; BTF says what they mean. Two function pointers can call the same functions
where their prototypes agree in what the calling convention sees: pointers by what they point to,
numbers by size. Typedefs, qualifiers and the names of parameters are nothing to it.
"""

from bisect import bisect_right
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

from trapline.base.errors import BadImageError
from trapline.kernel.types.btftable import Kind

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from trapline.kernel.types.btf import Btf

AGGREGATES: Final = (Kind.STRUCT, Kind.UNION)
_NUMBERS: Final = (Kind.INT, Kind.ENUM, Kind.ENUM64, Kind.FLOAT)
_POINTER: Final = 8
_DEPTH: Final = 12
_MAX_LEAVES: Final = 20_000
_OUTER: Final = 48  # structs that one may be a part of; of more, only function pointers tell
_MAX_REPEATS: Final = 512  # elements of an array that are looked at one by one


class Leaf(NamedTuple):
    """A member that has no members: `owner` is the innermost struct with a name around it.

    `at` is the offset in the owner, `kind` the type's id without qualifiers and typedefs.
    """

    owner: int
    at: int
    kind: int


class Place(NamedTuple):
    """Somewhere in a value: the id of its type, and an offset in bytes."""

    kind: int
    offset: int


class Layouts:
    """The types of one kernel by place."""

    def __init__(self, btf: "Btf") -> None:
        self._btf = btf
        self._pointers: dict[int, dict[int, int | None]] = {}
        self._classes: dict[tuple[Hashable, ...], int] = {}
        self._class_of: dict[int, int] = {}
        self._example: dict[int, int] = {}  # a prototype of each class
        self._taken: dict[int, tuple[int | None, ...]] = {}
        self._named: dict[tuple[str, int], int] = {}
        self._leaves: dict[Place, tuple[Leaf, ...]] = {}

    @cached_property
    def functions(self) -> dict[str, int]:
        """Name -> id of the prototype of each function."""
        btf = self._btf
        found: dict[str, int] = {}
        for table in btf.tables:
            for index in table.of_kind(Kind.FUNC):
                record = btf.record(index)
                found.setdefault(btf.string(record.name), record.target)
        return found

    @cached_property
    def per_cpu(self) -> dict[int, int]:
        """Offset -> id of the type of each variable in the per-CPU area."""
        btf = self._btf
        found: dict[int, int] = {}
        for table in btf.tables:
            for index in table.of_kind(Kind.DATASEC):
                if btf.string(btf.record(index).name) == ".data..percpu":
                    for variable, offset, _ in btf.items(index, "<III"):
                        found[offset] = btf.record(variable).target
        return found

    def per_cpu_at(self, offset: int) -> Place | None:
        """Return the per-CPU variable that holds an offset in the per-CPU area, and where in it."""
        number = bisect_right(self._per_cpu_starts, offset) - 1
        if number < 0:
            return None
        start = self._per_cpu_starts[number]
        kind = self.strip(self.per_cpu[start])
        return Place(kind, offset - start) if offset - start < self.size(kind) else None

    @cached_property
    def _per_cpu_starts(self) -> list[int]:
        return sorted(self.per_cpu)

    def strip(self, index: int) -> int:
        """Return the type behind qualifiers and typedefs; of namesakes of one size, the first."""
        index = self._btf.strip(index)
        record = self._btf.record(index)
        if record.kind in AGGREGATES and record.name:
            key = (self._btf.string(record.name), record.target)
            return self._named.setdefault(key, index)
        return index

    def name(self, index: int) -> str:
        """Return the name of a struct, empty for one without."""
        return self._btf.string(self._btf.record(index).name)

    def size(self, index: int) -> int:
        """Return the size of a type in bytes, 0 where it has none."""
        index = self._btf.strip(index)
        record = self._btf.record(index)
        if record.kind is Kind.PTR:
            return _POINTER
        if record.kind is Kind.ARRAY:
            element, _, count = self._btf.items(index, "<III")[0]
            return self.size(element) * count
        return record.target if record.kind in (*AGGREGATES, *_NUMBERS) else 0

    def pointed(self, index: int) -> int | None:
        """Return what a pointer type points to, None for another type."""
        record = self._btf.record(self._btf.strip(index))
        return self.strip(record.target) if record.kind is Kind.PTR else None

    def signature(self, prototype: int) -> tuple[int, tuple[int, ...]]:
        """Return the types of what a function returns and of its parameters."""
        parameters = tuple(kind for _, kind in self._btf.items(prototype, "<II"))
        return self._btf.record(prototype).target, parameters

    def prototype_of(self, index: int) -> int | None:
        """Return the prototype that a function pointer type points to, None for another type."""
        target = self.pointed(index)
        if target is not None and self._btf.record(target).kind is Kind.FUNC_PROTO:
            return target
        return None

    def class_of(self, prototype: int) -> int:
        """Return a number that prototypes share which one pointer can call."""
        known = self._class_of.get(prototype)
        if known is None:
            returns, parameters = self.signature(prototype)
            key = tuple(map(self._key, (returns, *parameters)))
            known = self._class_of[prototype] = self._classes.setdefault(key, len(self._classes))
            self._example.setdefault(known, prototype)
        return known

    def leaves(self, place: Place) -> tuple[Leaf, ...]:
        """Return what lies at a place: more than one in a union, none outside of the type."""
        known = self._leaves.get(place)
        if known is None:
            kind = self.strip(place.kind)
            found = self._at(kind, place.offset, kind, place.offset, 0)
            known = self._leaves[place] = tuple(dict.fromkeys(found))
        return known

    def member(self, struct: str, name: str) -> tuple[Leaf, int] | None:
        """Return the function pointer of that name in a struct, and its class."""
        members = self._btf.struct(struct)
        index = self._btf.id_of_struct(struct)
        if members is None or index is None or name not in members:
            return None
        for leaf in self.leaves(Place(self.strip(index), members[name].offset)):
            prototype = self.prototype_of(leaf.kind)
            if prototype is not None:
                return leaf, self.class_of(prototype)
        return None

    def around(self, struct: int, offset: int) -> tuple[Leaf, ...]:
        """Return what lies at an offset of a struct; outside of it, in those it is a part of.

        A list's head is a part of thousands: of those, only function pointers are returned.
        """
        if 0 <= offset < max(self.size(struct), 1):
            return self.leaves(Place(struct, offset))
        outer = self.embedded.get(struct, [])
        return tuple(
            leaf
            for kind, start in outer
            if 0 <= start + offset < self.size(kind)
            for leaf in self.leaves(Place(kind, start + offset))
            if len(outer) <= _OUTER or self.prototype_of(leaf.kind) is not None
        )

    def pointers(self, struct: int) -> dict[int, int | None]:
        """Return offset -> class of the function pointers in a struct and what is in it.

        None stands for what may be one or something else: void *, an integer of that size, a
        union.
        """
        known = self._pointers.get(struct)
        if known is None:
            known = self._pointers[struct] = {}
            for offset, kind, in_union in self._members(struct, 0, 0, False):
                prototype = self.prototype_of(kind)
                if prototype is not None and not in_union and offset not in known:
                    known[offset] = self.class_of(prototype)
                elif prototype is not None or self._may_hold(kind):
                    known[offset] = None
                if len(known) > _MAX_LEAVES:
                    raise BadImageError("a struct of the BTF has more members than any kernel's.")
        return known

    @cached_property
    def by_size(self) -> dict[int, list[int]]:
        """Size in bytes -> the structs of that size with function pointers in them."""
        found: dict[int, list[int]] = {}
        for table in self._btf.tables:
            for index in table.of_kind(Kind.STRUCT):
                if self.strip(index) == index and any(
                    kind is not None for kind in self.pointers(index).values()
                ):
                    found.setdefault(self.size(index), []).append(index)
        return found

    @cached_property
    def at_offset(self) -> "dict[int, list[tuple[tuple[int, int], int]]]":
        """Offset -> the function pointers there in any struct: owner and place in it, and class."""
        found: dict[int, set[tuple[tuple[int, int], int]]] = {}
        for structs in self.by_size.values():
            for struct in structs:
                for offset, kind in self.pointers(struct).items():
                    if kind is not None:
                        for leaf in self.leaves(Place(struct, offset)):
                            found.setdefault(offset, set()).add(((leaf.owner, leaf.at), kind))
        return {offset: sorted(members) for offset, members in found.items()}

    def structs_taken(self, kind: int) -> tuple[int | None, ...]:
        """Return which struct each parameter of a class of prototypes points to."""
        known = self._taken.get(kind)
        if known is None:
            _, parameters = self.signature(self._example[kind])
            known = self._taken[kind] = tuple(map(self._struct_at, parameters))
        return known

    def may_be(self, given: int, wanted: int) -> bool:
        """Whether a pointer to one struct may be meant as a pointer to another.

        So it is where one is the other's first member.
        """
        for _ in range(_DEPTH):
            if given == wanted or self.name(given) == self.name(wanted):
                return True
            if self._btf.record(given).kind not in AGGREGATES:
                return True
            first = next((kind for at, kind in self._direct(given) if at == 0), None)
            if first is None:
                return False
            given = self.strip(first)
            if self._btf.record(given).kind not in AGGREGATES:
                return False
        return True

    def _struct_at(self, kind: int) -> int | None:
        target = self.pointed(kind)
        if target is None or self._btf.record(target).kind not in AGGREGATES:
            return None
        return target if self.name(target) else None

    @cached_property
    def embedded(self) -> dict[int, list[Place]]:
        """Struct -> where it is a member of others: the other, and its offset there."""
        found: dict[int, list[Place]] = {}
        btf = self._btf
        for table in btf.tables:
            for index in table.of_kind(Kind.STRUCT):
                if not btf.record(index).name or self.strip(index) != index:
                    continue
                for offset, kind in self._direct(index):
                    inner = self.strip(kind)
                    if btf.record(inner).kind in AGGREGATES:
                        found.setdefault(inner, []).append(Place(index, offset))
        return found

    def _at(self, kind: int, offset: int, owner: int, at: int, depth: int) -> "Iterator[Leaf]":
        record = self._btf.record(kind)
        if depth > _DEPTH:
            return
        if record.kind is Kind.ARRAY:
            element = self.strip(self._btf.items(kind, "<III")[0][0])
            size = self.size(element)
            if size and 0 <= offset < self.size(kind):
                inner = offset % size
                is_struct = self._btf.record(element).kind in AGGREGATES
                yield from self._at(
                    element, inner, *((element, inner) if is_struct else (owner, at)), depth + 1
                )
        elif record.kind in AGGREGATES:
            if record.name:
                owner, at = kind, offset
            for start, member in self._direct(kind):
                inner = self.strip(member)
                if start <= offset < start + max(self.size(inner), 1):
                    yield from self._at(inner, offset - start, owner, at, depth + 1)
        elif offset == 0:
            yield Leaf(owner, at, kind)

    def _direct(self, struct: int) -> "Iterator[tuple[int, int]]":
        record = self._btf.record(struct)
        mask = 0xFFFFFF if record.flag else 0xFFFFFFFF
        for _, kind, offset in self._btf.items(struct, "<III"):
            yield (offset & mask) >> 3, kind

    def _members(
        self, kind: int, base: int, depth: int, in_union: bool
    ) -> "Iterator[tuple[int, int, bool]]":
        """Yield offset, type and whether it is within a union, of all that has no members."""
        record = self._btf.record(kind)
        if depth > _DEPTH:
            return
        if record.kind is Kind.ARRAY:
            element, _, count = self._btf.items(kind, "<III")[0]
            inner, size = self.strip(element), self.size(element)
            for number in range(min(count, _MAX_REPEATS) if size >= _POINTER else 0):
                yield from self._members(inner, base + number * size, depth + 1, in_union)
        elif record.kind in AGGREGATES:
            in_union = in_union or record.kind is Kind.UNION
            for offset, member in self._direct(kind):
                yield from self._members(self.strip(member), base + offset, depth + 1, in_union)
        else:
            yield base, kind, in_union

    def _may_hold(self, kind: int) -> bool:
        """Whether a function's address may be in a member that is no function pointer."""
        record = self._btf.record(kind)
        if record.kind is Kind.PTR:
            return self._btf.record(self._btf.strip(record.target)).kind is Kind.VOID
        return record.kind is Kind.INT and record.target == _POINTER

    def _key(self, kind: int) -> "Hashable":
        stars = 0
        for _ in range(_DEPTH):
            kind = self._btf.strip(kind)
            record = self._btf.record(kind)
            if record.kind is not Kind.PTR:
                break
            stars, kind = stars + 1, record.target
        record = self._btf.record(kind)
        if record.kind in (*AGGREGATES, Kind.FWD):
            return (stars, self._btf.string(record.name) or kind)
        if record.kind in _NUMBERS:
            return (stars, record.target)
        return (stars, int(record.kind))
