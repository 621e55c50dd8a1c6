"""BTF, the compact type information of a kernel: structures, function prototypes, enumerations.

Every kernel with CONFIG_DEBUG_INFO_BTF carries it in section .BTF, the stripped vmlinuz too. It
knows no inlined functions, addresses or lines. A module's .BTF continues that of vmlinux: type
ids and string offsets count on from there, so `Btf.parse` takes it as `base` (since 6.11 a
module may bring a reduced base of its own, in .BTF.base).

Sources: Documentation/bpf/btf.rst, include/uapi/linux/btf.h.
"""

from collections import deque
from functools import cached_property
from typing import Final, NamedTuple

from trapline.base.errors import BadImageError
from trapline.kernel.types.btftable import Kind, Record, TypeTable

_QUALIFIERS: Final = {
    Kind.CONST: "const",
    Kind.VOLATILE: "volatile",
    Kind.RESTRICT: "restrict",
    Kind.TYPE_TAG: "",
}
_TAGS: Final = {
    Kind.STRUCT: "struct",
    Kind.UNION: "union",
    Kind.ENUM: "enum",
    Kind.ENUM64: "enum",
}
_DERIVED: Final = {Kind.PTR, Kind.ARRAY, Kind.FUNC_PROTO, *_QUALIFIERS}
_AGGREGATES: Final = (Kind.STRUCT, Kind.UNION)
_MAX_DEPTH: Final = 64
_MAX_NAME: Final = 4096
_MAX_NAMES: Final = 256 << 20
_MAX_MEMBERS: Final = 100_000


class Member(NamedTuple):
    """A member of a structure: offset in bytes (of a bit field: of its first byte), C type."""

    offset: int
    type_name: str


class Prototype(NamedTuple):
    """A function's type in C notation; `parameters` are pairs of name and type."""

    returns: str
    parameters: tuple[tuple[str, str], ...]

    @property
    def signature(self) -> str:
        """The type without parameter names; equal for functions that one pointer can call."""
        return f"{self.returns} ({', '.join(kind for _, kind in self.parameters) or 'void'})"


class Btf:
    """The types of one kernel or module; make one with `parse`.

    Type 0 is void. Sizes are checked when the data is parsed, references between types when
    they are followed; what is wrong ends in a BadImageError.
    """

    def __init__(self, tables: tuple[TypeTable, ...]) -> None:
        self._tables = tables
        self._type_names: dict[int, str] = {}
        self._names_size = 0
        self._prototypes: dict[int, Prototype] = {}

    @classmethod
    def parse(
        cls, data: bytes | memoryview, *, base: "Btf | None" = None, name: str = "BTF"
    ) -> "Btf":
        """Parse the contents of a .BTF section; `name` is what messages call it."""
        before = () if base is None else base.tables
        return cls((*before, TypeTable.parse(data, name, before[-1] if before else None)))

    @property
    def tables(self) -> tuple[TypeTable, ...]:
        """The sections this is made of: the base's, then its own."""
        return self._tables

    def __len__(self) -> int:
        return self._tables[-1].stop

    def struct(self, name: str) -> dict[str, Member] | None:
        """Return the members of a struct, union, or typedef of one; None where there is none.

        Members of anonymous structs and unions inside count as members of the outer one, as in
        C. Where several structs have the name, the first is taken.
        """
        index = self._find(name, _AGGREGATES)
        if index is None:
            alias = self._find(name, (Kind.TYPEDEF,))
            index = None if alias is None else self.strip(alias)
        if index is None or self.record(index).kind not in _AGGREGATES:
            return None
        return self._flatten(index)

    def id_of_struct(self, name: str) -> int | None:
        """Return the type id of a struct or union, None where there is none."""
        return self._find(name, _AGGREGATES)

    def size(self, name: str) -> int | None:
        """Return the size of a struct or union in bytes, None where there is none."""
        index = self._find(name, _AGGREGATES)
        return None if index is None else self.record(index).target

    def enum(self, name: str) -> dict[str, int] | None:
        """Return the enumerators of an enum with their values, None where there is none."""
        index = self._find(name, (Kind.ENUM, Kind.ENUM64))
        if index is None:
            return None
        record = self.record(index)
        if record.kind is Kind.ENUM:
            items = self.items(index, "<Ii" if record.flag else "<II")
            return {self.string(name_at): value for name_at, value in items}
        items = self.items(index, "<IIi" if record.flag else "<III")
        return {self.string(name_at): high << 32 | low for name_at, low, high in items}

    def functions(self) -> dict[str, Prototype]:
        """Return the prototype of each function by name; of namesakes, the first."""
        found: dict[str, Prototype] = {}
        for table in self._tables:
            for index in table.of_kind(Kind.FUNC):
                record = self.record(index)
                if self.record(record.target).kind is Kind.FUNC_PROTO:
                    found.setdefault(self.string(record.name), self._prototype(record.target))
        return found

    def type_name(self, index: int) -> str:
        """Return a type in C notation, such as "const struct virtio_device *"."""
        return self._type_name(index, 0)

    def _table(self, index: int) -> TypeTable:
        for table in self._tables:
            if index < table.stop:
                return table
        raise BadImageError(f"{self._tables[-1].name}: BTF type {index} does not exist.")

    def record(self, index: int) -> Record:
        """Return the fixed part of a type."""
        return self._table(index).record(index)

    def items(self, index: int, layout: str) -> list[tuple[int, ...]]:
        """Unpack what follows the fixed part of a type: `layout`, for each of its items."""
        return self._table(index).items(index, layout)

    def string(self, offset: int) -> str:
        """Return the string at an offset, such as `Record.name`."""
        for table in self._tables:
            if offset < table.stop_string:
                return table.string(offset)
        raise BadImageError(f"{self._tables[-1].name}: a BTF name is outside of the strings.")

    @cached_property
    def _by_name(self) -> dict[tuple[str, Kind], int]:
        """The first type of each name and kind."""
        found: dict[tuple[str, Kind], int] = {}
        named = (Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.ENUM64, Kind.TYPEDEF)
        for table in self._tables:
            for index in table.of_kind(*named):
                record = table.record(index)
                if record.name:
                    found.setdefault((self.string(record.name), record.kind), index)
        return found

    def _find(self, name: str, kinds: tuple[Kind, ...]) -> int | None:
        matches = (self._by_name.get((name, kind)) for kind in kinds)
        return next((index for index in matches if index is not None), None)

    def strip(self, index: int, *, typedefs: bool = True) -> int:
        """Follow qualifiers, and typedefs if wanted, to the type behind."""
        for _ in range(_MAX_DEPTH):
            record = self.record(index)
            if record.kind not in _QUALIFIERS and not (typedefs and record.kind is Kind.TYPEDEF):
                return index
            index = record.target
        raise self._endless(index)

    def _flatten(self, index: int) -> dict[str, Member]:
        found: dict[str, Member] = {}
        pending = deque([(index, 0)])
        seen = 0
        while pending:
            outer, base = pending.popleft()
            # With the flag, the upper 8 bits of an offset are the size of a bit field.
            mask = 0xFFFFFF if self.record(outer).flag else 0xFFFFFFFF
            for name_at, kind, offset in self.items(outer, "<III"):
                seen += 1
                if seen > _MAX_MEMBERS:
                    raise self._endless(index)
                at = base + ((offset & mask) >> 3)
                if name_at:
                    found.setdefault(self.string(name_at), Member(at, self.type_name(kind)))
                elif self.record(inner := self.strip(kind)).kind in _AGGREGATES:
                    pending.append((inner, at))
        return dict(sorted(found.items(), key=lambda item: item[1].offset))

    def _prototype(self, index: int) -> Prototype:
        if index not in self._prototypes:
            names = [self.string(name_at) for name_at, _ in self.items(index, "<II")]
            kinds = self._parameter_types(index, 0)
            returns = self.type_name(self.record(index).target)
            self._prototypes[index] = Prototype(returns, tuple(zip(names, kinds, strict=True)))
        return self._prototypes[index]

    def _parameter_types(self, index: int, depth: int) -> list[str]:
        # A last parameter without name and type stands for "...".
        return [
            self._type_name(kind, depth) if name_at or kind else "..."
            for name_at, kind in self.items(index, "<II")
        ]

    def _type_name(self, index: int, depth: int) -> str:
        """Compose a C type from the inside out: `depth` counts functions among parameters."""
        if index in self._type_names:
            return self._type_names[index]
        if depth > _MAX_DEPTH:
            raise self._endless(index)
        qualifiers, declarator, at = "", "", index
        for _ in range(_MAX_DEPTH):
            record = self.record(at)
            if record.kind not in _DERIVED:
                name = f"{qualifiers}{self._plain_name(at, record)} {declarator}".rstrip()
                self._names_size += len(name)
                if len(name) > _MAX_NAME or self._names_size > _MAX_NAMES:
                    break
                self._type_names[index] = name
                return name
            if record.kind in _QUALIFIERS:
                qualifiers, declarator = self._qualify(record, qualifiers, declarator)
            else:
                declarator = self._derive(at, record, declarator, depth)
            if len(declarator) > _MAX_NAME:
                break
            at = self.items(at, "<III")[0][0] if record.kind is Kind.ARRAY else record.target
        raise self._endless(index)

    def _derive(self, index: int, record: Record, declarator: str, depth: int) -> str:
        """Wrap a declarator into a pointer, an array or a function."""
        if record.kind is Kind.PTR:
            target = self.record(self.strip(record.target, typedefs=False)).kind
            binds = target in {Kind.ARRAY, Kind.FUNC_PROTO}
            return f"(*{declarator})" if binds else f"*{declarator}"
        if record.kind is Kind.ARRAY:
            return f"{declarator}[{self.items(index, '<III')[0][2]}]"
        return f"{declarator}({', '.join(self._parameter_types(index, depth + 1)) or 'void'})"

    def _qualify(self, record: Record, qualifiers: str, declarator: str) -> tuple[str, str]:
        """Put a qualifier beside the star of a pointer, or before all other types."""
        word = _QUALIFIERS[record.kind]
        target = self.record(self.strip(record.target, typedefs=False)).kind
        if not word:
            return qualifiers, declarator
        if target is Kind.PTR:
            return qualifiers, f"{word} {declarator}".rstrip()
        return f"{qualifiers}{word} ", declarator

    def _plain_name(self, index: int, record: Record) -> str:
        if record.kind is Kind.VOID:
            return "void"
        if record.kind in _TAGS:
            name = self.string(record.name) or f"(anonymous {index})"
            return f"{_TAGS[record.kind]} {name}"
        if record.kind is Kind.FWD:
            return f"{'union' if record.flag else 'struct'} {self.string(record.name)}"
        if record.kind in {Kind.INT, Kind.FLOAT, Kind.TYPEDEF}:
            return self.string(record.name)
        raise BadImageError(
            f"{self._tables[-1].name}: BTF type {index} is not the type of a value."
        )

    def _endless(self, index: int) -> BadImageError:
        return BadImageError(
            f"{self._tables[-1].name}: BTF type {index} refers to itself, or has no end."
        )
