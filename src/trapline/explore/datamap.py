"""Guest memory by name, and which of it no event may change."""

import struct
from collections.abc import Iterator
from functools import cached_property
from typing import Final

import numpy as np

from trapline.cpu.engine import Vcpu
from trapline.guest.target import Target
from trapline.kernel.elf.symtab import STT_OBJECT
from trapline.kernel.live.runtime import KERNEL_MAP
from trapline.linux import names

PAGE: Final = 4096
_ADDRESS: Final = 0xFFFFFFFFFF000
_PERCPU_SECTION: Final = ".data..percpu"
_INIT_SECTIONS: Final = ".init"
_ENTRIES: Final = 512
_MAX_TABLES: Final = 1 << 16
_PRESENT: Final = 1
_WRITABLE: Final = 2
_USER: Final = 4
_LARGE: Final = 0x80
_NO_EXECUTE: Final = 1 << 63
ACCESSED_DIRTY: Final = 0x60
_FIXED_SECTIONS: Final = {"kernel text": ".text", "read-only data": ".rodata"}


class DataMap:
    """Names for the memory of one guest, at the moment the processor is at.

    GPAs are without the shared bit. `table_pages` are the page tables in use.
    """

    def __init__(self, target: Target, vcpu: Vcpu) -> None:
        self._target = target
        self._vcpu = vcpu
        self._percpu_pages = dict(self._find_percpu_pages())
        self.table_pages, self._user_pages = self._walk()
        self._descriptors = tuple(self._find_descriptors())
        self._fixed = fixed_ranges(target)

    def describe(self, gpa: int) -> str:
        """Name the variable at a GPA as well as can be told."""
        return self.name(gpa) or f"memory at GPA {gpa:#x}"

    def name(self, gpa: int) -> str | None:
        """Return the name of the variable at a GPA, None where there is none."""
        page = gpa & -PAGE
        if page in self._percpu_pages:
            offset = self._percpu_pages[page] + gpa % PAGE
            return f"{self._name(offset, percpu=True) or hex(offset)} (per-CPU)"
        return self._name(gpa - self._target.physical_base + KERNEL_MAP, percpu=False)

    def guarded(self, gpa: int) -> str | None:
        """Say what a word belongs to if no event may change it, whatever all of them do.

        What user mode may only read is not guarded: the kernel keeps the time there.
        """
        page = gpa & -PAGE
        if page in self.table_pages:
            return "a page table"
        if page in self._user_pages:
            return "memory of user mode"
        if any(gpa in table for table in self._descriptors):
            return "a descriptor table"
        address = gpa - self._target.physical_base + KERNEL_MAP
        return next((what for what, where in self._fixed.items() if address in where), None)

    def _find_descriptors(self) -> Iterator[range]:
        """Yield the GPAs of the GDT and the IDT."""
        for name in ("gdtr", "idtr"):
            table = self._vcpu.segment(name)
            at, end = table.base, table.base + table.limit + 1
            while at < end:
                size = min(end - at, PAGE - at % PAGE)
                gpa = self._vcpu.translate(at)
                if gpa is not None:
                    gpa &= ~self._vcpu.memory.shared_bit
                    yield range(gpa, gpa + size)
                at += size

    def _walk(self) -> tuple[set[int], set[int]]:
        """Return the GPAs of all page table pages, and of what user mode may write or execute."""
        ram = self._vcpu.memory.ram
        tables: set[int] = set()
        user: set[int] = set()
        rights = _USER | _WRITABLE
        pending = [(self._vcpu.cr(3) & _ADDRESS, 4, rights, True)]
        while pending and len(tables) < _MAX_TABLES:
            page, level, allowed, executes = pending.pop()
            if page in tables or page + PAGE > len(ram):
                continue
            tables.add(page)
            if level == 1 and not allowed & _USER:
                continue
            entries = np.frombuffer(ram[page : page + PAGE], np.uint64)
            for entry in entries[(entries & np.uint64(_PRESENT)) != 0].tolist():
                here = allowed & entry
                may_execute = executes and not entry & _NO_EXECUTE
                if level > 1 and not (level < 4 and entry & _LARGE):
                    pending.append((entry & _ADDRESS, level - 1, here, may_execute))
                elif here & _USER and (here & _WRITABLE or may_execute):
                    size = PAGE * _ENTRIES ** (level - 1)
                    start = entry & _ADDRESS & -size & ~self._vcpu.memory.shared_bit
                    user.update(range(start, min(start + size, len(ram)), PAGE))
        return tables, user

    # Variables.

    @cached_property
    def _percpu_base(self) -> int | None:
        table = self._target.address("__per_cpu_offset")
        data = None if table is None else self._vcpu.read(table, 8)
        return None if data is None else int(struct.unpack("<Q", data)[0])

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


def fixed_ranges(target: Target) -> dict[str, range]:
    """Return what is not written once the kernel runs, by name: GLAs."""
    found = {}
    for what, (first, last) in names.FIXED.items():
        start, end = target.address(first), target.address(last)
        if start is not None and end is not None:
            found[what] = range(start, end)
            continue
        section = target.binary.elf.section(_FIXED_SECTIONS[what])
        if section is not None:
            found[what] = range(section.address, section.address + section.size)
    return found


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
