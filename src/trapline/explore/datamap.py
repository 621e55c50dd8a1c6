"""Guest memory by name: which variable a guest physical address belongs to."""

import re
import struct
from collections.abc import Iterator
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np

from trapline.base.errors import TraplineError
from trapline.cpu.engine import Reg, Vcpu
from trapline.guest.target import Target
from trapline.kernel.elf.symtab import STT_OBJECT
from trapline.kernel.live.runtime import KERNEL_MAP
from trapline.kernel.types.btf import Btf
from trapline.linux.noise import NoiseRule

PAGE: Final = 4096
_ADDRESS: Final = 0xFFFFFFFFFF000
_PERCPU_SECTION: Final = ".data..percpu"
_INIT_SECTIONS: Final = ".init"
_ENTRIES: Final = 512
_MAX_TABLES: Final = 1 << 16


class Piece(NamedTuple):
    """`size` bytes of guest linear memory."""

    gla: int
    size: int


class DataMap:
    """Names for the memory of one guest, at the moment the engine holds.

    GPAs are without the shared bit.
    """

    def __init__(self, target: Target, vcpu: Vcpu) -> None:
        self._target = target
        self._vcpu = vcpu
        self._percpu_pages = dict(self._find_percpu_pages())
        self._stack_pages: set[int] = set()
        self.table_pages, self._user_pages = self._walk()
        self._image = self._span("_text", "_end")
        self._init = self._span("__init_begin", "__init_end")

    def describe(self, gpa: int) -> str:
        """Name the variable at a GPA as well as can be told."""
        page = gpa & -PAGE
        if page in self._percpu_pages:
            offset = self._percpu_pages[page] + gpa % PAGE
            return f"{self._name(offset, percpu=True) or hex(offset)} (per-CPU)"
        name = self._name(gpa - self._target.physical_base + KERNEL_MAP, percpu=False)
        return name or f"memory at GPA {gpa:#x}"

    def pieces(self, rule: NoiseRule) -> tuple[Piece, ...]:
        """Find the memory that a rule is about; empty where the kernel has no such thing."""
        if rule.static is not None:
            return tuple(self._objects[False].named(rule.static))
        piece = self._base(rule)
        if rule.array:
            return self._elements(piece, rule)
        if piece is not None and rule.member is not None and rule.type is not None:
            piece = self._member(piece, rule.type, rule.member)
        if piece is not None and rule.follow is not None:
            pointer = self._pointer(piece.gla)
            piece = None if pointer is None else Piece(pointer, rule.follow)
        if piece is None:
            return ()
        if rule.stack:
            self._stack_pages.update(gpa & -PAGE for gpa, _ in self.gpas(piece))
            rsp = int(self._vcpu.regs[Reg.RSP])
            # RSP at the very top is an empty stack.
            if piece.gla <= rsp < piece.gla + piece.size:
                piece = Piece(piece.gla, rsp - piece.gla)
        return (piece,)

    def gpas(self, piece: Piece) -> Iterator[tuple[int, int]]:
        """Yield (GPA, bytes) of each part of a piece that is mapped."""
        gla, left = piece
        while left > 0:
            size = min(left, PAGE - gla % PAGE)
            gpa = self._vcpu.translate(gla)
            if gpa is not None:
                yield gpa & ~self._vcpu.memory.shared_bit, size
            gla, left = gla + size, left - size

    def is_dynamic(self, gpa: int) -> bool:
        """Whether a GPA is neither a variable nor a stack in use nor mapped by user mode.

        Ask after all rules have been resolved: they say what is a stack.
        """
        page = gpa & -PAGE
        if page in self._percpu_pages or page in self._user_pages or page in self._stack_pages:
            return False
        address = gpa - self._target.physical_base + KERNEL_MAP
        # Memory of the image's init sections is given back and used again.
        return address not in self._image or address in self._init

    def _span(self, first: str, last: str) -> range:
        start, end = self._target.address(first), self._target.address(last)
        return range(0) if start is None or end is None else range(start, end)

    def _walk(self) -> tuple[set[int], set[int]]:
        """Return the GPAs of all page table pages, and of 4 KiB pages that user mode maps."""
        ram = self._vcpu.memory.ram
        tables: set[int] = set()
        user: set[int] = set()
        pending = [(self._vcpu.cr(3) & _ADDRESS, 4, True)]
        while pending and len(tables) < _MAX_TABLES:
            page, level, is_user = pending.pop()
            if page in tables or page + PAGE > len(ram):
                continue
            tables.add(page)
            entries = np.frombuffer(ram[page : page + PAGE], np.uint64)
            entries = entries[(entries & np.uint64(1)) != 0]
            if level in (2, 3):
                entries = entries[(entries & np.uint64(0x80)) == 0]
            for entry in entries.tolist():
                may_use = is_user and bool(entry & 4)
                if level > 1:
                    pending.append((entry & _ADDRESS, level - 1, may_use))
                elif may_use:
                    user.add(entry & _ADDRESS & ~self._vcpu.memory.shared_bit)
        return tables, user

    # Variables.

    def _base(self, rule: NoiseRule) -> Piece | None:
        if rule.symbol is not None:
            return self._variable(rule.symbol, percpu=False)
        if rule.percpu is not None:
            return self._variable(rule.percpu, percpu=True)
        for name in rule.through:
            variable = self._variable(name, percpu=True)
            pointer = None if variable is None else self._pointer(variable.gla)
            if pointer is not None:
                return Piece(pointer, 0)
        return None

    def _variable(self, name: str, *, percpu: bool) -> Piece | None:
        value = self._target.address(name)
        if value is None:
            return None
        if percpu:
            base = self._percpu_base
            if base is None:
                return None
            value = value + base & (1 << 64) - 1
        return Piece(value, self._size(name))

    def _elements(self, piece: Piece | None, rule: NoiseRule) -> tuple[Piece, ...]:
        """Find a member of each structure in an array."""
        assert rule.type is not None
        assert rule.member is not None
        size = self._types.size(rule.type) if self._types is not None else None
        if piece is None or not size:
            return ()
        starts = range(piece.gla, piece.gla + piece.size - size + 1, size)
        found = (self._member(Piece(start, size), rule.type, rule.member) for start in starts)
        return tuple(member for member in found if member is not None)

    def _member(self, piece: Piece, type_name: str, member: str) -> Piece | None:
        types = self._types
        offset, kind = 0, type_name
        for part in member.split("."):
            members = None if types is None else types.struct(kind)
            if members is None or part not in members:
                return None
            offset += members[part].offset
            kind = members[part].type_name.removeprefix("struct ").removeprefix("union ")
        assert types is not None
        size = types.size(kind) or self._gap(types, type_name, member)
        return Piece(piece.gla + offset, size)

    @staticmethod
    def _gap(types: Btf, type_name: str, member: str) -> int:
        """Return the distance to the next member: the size of a member that is no structure."""
        path = member.split(".")
        kind = type_name
        for part in path[:-1]:
            members = types.struct(kind) or {}
            kind = members[part].type_name.removeprefix("struct ").removeprefix("union ")
        members = types.struct(kind) or {}
        start = members[path[-1]].offset
        ends = [m.offset for m in members.values() if m.offset > start]
        return (min(ends) if ends else types.size(kind) or start + 8) - start

    def _pointer(self, gla: int) -> int | None:
        data = self._vcpu.read(gla, 8)
        return None if data is None else int(struct.unpack("<Q", data)[0])

    @cached_property
    def _types(self) -> Btf | None:
        data = self._target.binary.elf.contents(".BTF")
        if not len(data):
            return None
        try:
            return Btf.parse(data)
        except TraplineError:
            return None

    @cached_property
    def _percpu_base(self) -> int | None:
        table = self._target.address("__per_cpu_offset")
        return None if table is None else self._pointer(table)

    # Names.

    @cached_property
    def _objects(self) -> "tuple[_Objects, _Objects]":
        """Variables of the image, and of the per-CPU area."""
        elf = self._target.binary.elf
        table = elf.symbols
        chosen = (table.kinds == STT_OBJECT) & (table.records["size"] > 0)
        percpu = [s.index for s in elf.sections if s.name == _PERCPU_SECTION]
        # Memory of init sections is given back and used for other things.
        init = [s.index for s in elf.sections if s.name.startswith(_INIT_SECTIONS)]
        chosen &= ~np.isin(table.section_indices, init)
        inside = np.isin(table.section_indices, percpu)
        return (
            _Objects(self._target, np.flatnonzero(chosen & ~inside)),
            _Objects(self._target, np.flatnonzero(chosen & inside)),
        )

    def _name(self, address: int, *, percpu: bool) -> str | None:
        return self._objects[percpu].name(address)

    def _size(self, name: str) -> int:
        symbols = self._target.binary.elf.symbols
        indices, _ = symbols.find([name])
        sizes = symbols.records["size"][indices]
        return max(int(sizes.max()) if len(sizes) else 0, 8)

    def _find_percpu_pages(self) -> Iterator[tuple[int, int]]:
        """Yield GPA -> offset in the per-CPU area, for the area of the one CPU."""
        base = self._percpu_base
        section = self._target.binary.elf.section(_PERCPU_SECTION)
        if base is None or section is None:
            return
        start = section.address + base & (1 << 64) - 1
        for offset in range(0, section.size, PAGE):
            gpa = self._vcpu.translate(start + offset)
            if gpa is not None:
                yield gpa & -PAGE & ~self._vcpu.memory.shared_bit, section.address + offset


class _Objects:
    """Variables by address."""

    def __init__(
        self, target: Target, indices: "np.ndarray[tuple[int], np.dtype[np.intp]]"
    ) -> None:
        self._symbols = target.binary.elf.symbols
        records = self._symbols.records
        order = np.argsort(records["value"][indices], kind="stable")
        self._indices = indices[order]
        self._starts = records["value"][self._indices]
        self._sizes = records["size"][self._indices]

    def named(self, name: str) -> Iterator[Piece]:
        """Yield the variables whose name in the source is this."""
        pattern = re.compile(rf"{re.escape(name)}(\.\d+)?")
        for row, index in enumerate(self._indices.tolist()):
            if pattern.fullmatch(self._symbols.name(index)):
                yield Piece(int(self._starts[row]), int(self._sizes[row]))

    def name(self, address: int) -> str | None:
        """Return `name+0xoffset`, or None where no variable is."""
        index = int(np.searchsorted(self._starts, np.uint64(address), "right")) - 1
        if not 0 <= address < 1 << 64 or index < 0:
            return None
        offset = address - int(self._starts[index])
        if offset >= int(self._sizes[index]):
            return None
        name = self._symbols.name(int(self._indices[index]))
        return f"{name}+{offset:#x}" if offset else name
