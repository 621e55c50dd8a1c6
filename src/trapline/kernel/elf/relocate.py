"""Links a module: gives its sections addresses and applies its relocations.

A module is an ET_REL file. Its code calls address 0 and its DWARF says that every function is at
address 0, until somebody does what the kernel does when it loads the module: place sections,
resolve symbols, apply relocations. Symbols of the kernel and of other modules get addresses of
their own, so that a call of one can be named.

Sources: x86-64 psABI, 4.4.1 (relocation types); apply_relocate_add() in
arch/x86/kernel/module.c, which knows the same types; layout_sections() in kernel/module/main.c.
"""

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np

from trapline.base.errors import BadImageError
from trapline.kernel.elf.file import SHT_NOBITS, SHT_RELA, ElfFile, Section
from trapline.kernel.elf.symtab import SHN_UNDEF, STT_FUNC, SYMBOL

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

#: Where modules go: MODULES_VADDR of arch/x86/include/asm/pgtable_64_types.h.
MODULE_BASE: Final = 0xFFFF_FFFF_C000_0000
# So that a member of an external structure (pv_ops) has an address that no other symbol has.
EXTERNAL_SPACING: Final = 0x1000
_MAX_EXTERNALS: Final = 100_000  # the largest Debian module has 2,100
_MAX_SIZE: Final = 256 << 20  # of all allocated sections; the largest Debian module has 14 MiB
_MAX_ALIGNMENT: Final = 2 << 20
# What symbolic reads of DWARF 2 to 5.
_DWARF: Final = (
    ".debug_abbrev",
    ".debug_addr",
    ".debug_info",
    ".debug_line",
    ".debug_line_str",
    ".debug_ranges",
    ".debug_rnglists",
    ".debug_str",
    ".debug_str_offsets",
)
_RELA: Final = np.dtype([("offset", "<u8"), ("type", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])
_CHUNK: Final = 1 << 18  # relocations applied at once: bounds the temporary arrays


@dataclass(frozen=True, slots=True)
class _Kind:
    """What one relocation type writes: `width` bytes of S + A, less P where it is relative."""

    width: int
    relative: bool


_KINDS: Final = {
    1: _Kind(8, relative=False),  # R_X86_64_64
    2: _Kind(4, relative=True),  # R_X86_64_PC32
    4: _Kind(4, relative=True),  # R_X86_64_PLT32
    10: _Kind(4, relative=False),  # R_X86_64_32
    11: _Kind(4, relative=False),  # R_X86_64_32S
    24: _Kind(8, relative=True),  # R_X86_64_PC64
}


class LinkedModule:
    """A module whose allocated sections have addresses.

    `code` is the file that is loaded, `debug` the one with DWARF, which may be the same.
    `addresses` maps a section index of `code` to its address.
    """

    def __init__(self, code: ElfFile, debug: ElfFile | None = None) -> None:
        if not code.is_relocatable:
            raise BadImageError(f"{code.name}: is not a module: it is linked already.")
        self.code = code
        self.debug = code if debug is None else debug
        self.addresses, end = _place(code)
        table = code.symbols
        self._undefined: NDArray[np.intp] = np.flatnonzero(
            (table.section_indices == SHN_UNDEF) & (table.records["name"] != 0)
        )
        if len(self._undefined) > _MAX_EXTERNALS:
            raise BadImageError(
                f"{code.name}: {len(self._undefined)} undefined symbols are too many."
            )
        first = (end + EXTERNAL_SPACING - 1) // EXTERNAL_SPACING * EXTERNAL_SPACING
        self._spots = np.uint64(first) + np.uint64(EXTERNAL_SPACING) * np.arange(
            len(self._undefined), dtype=np.uint64
        )
        self._code = _Relocator(code, self.addresses)
        self._code.values[self._undefined] = self._spots

    @cached_property
    def externals(self) -> dict[int, str]:
        """Address -> name of each symbol that is defined elsewhere."""
        names = map(self.code.symbols.name, self._undefined.tolist())
        return dict(zip(self._spots.tolist(), names, strict=True))

    def external_addresses(self, names: "Iterable[str]") -> dict[int, str]:
        """Return address -> name of those symbols of these names that are defined elsewhere."""
        indices, found = self.code.symbols.find(names)
        places = np.searchsorted(self._undefined, indices)
        return {
            int(self._spots[place]): name
            for place, index, name in zip(places.tolist(), indices.tolist(), found, strict=True)
            if place < len(self._undefined) and self._undefined[place] == index
        }

    @property
    def symbol_values(self) -> "NDArray[np.uint64]":
        """The address of each symbol of `code`, shape (n,)."""
        return self._code.values

    def contents(self, section: Section) -> memoryview:
        """Return the bytes of a section of `code` as they are in a loaded module."""
        return self._code.contents(section)

    @cached_property
    def debug_image(self) -> bytearray:
        """An ELF file with the relocated DWARF, and a PT_LOAD segment at MODULE_BASE.

        It has the sections that symbolic needs and no other.
        """
        relocator = self._code
        if self.debug is not self.code:
            # Its DWARF refers to what is defined elsewhere in no way that matters here.
            relocator = _Relocator(self.debug, _match(self.code, self.debug, self.addresses))
        with self.debug.read_once():
            return _write_image(self.debug, relocator)


class _Relocator:
    """Applies the relocations of one file, section by section."""

    def __init__(self, elf: ElfFile, addresses: dict[int, int]) -> None:
        self.elf = elf
        self.addresses = addresses
        self.values = self._symbol_values()
        self._relocations: dict[int, list[Section]] = {}
        for section in elf.sections:
            if section.type == SHT_RELA and section.file_size:
                self._relocations.setdefault(section.info, []).append(section)
        self._done: dict[int, memoryview] = {}

    def contents(self, section: Section) -> memoryview:
        """Return the relocated bytes of a section."""
        if section.index not in self._relocations:
            return self.elf.contents(section)
        if section.index not in self._done:
            data = bytearray(self.elf.contents(section))
            self.apply(section, memoryview(data))
            self._done[section.index] = memoryview(data)
        return self._done[section.index]

    def apply(self, section: Section, data: memoryview) -> None:
        """Relocate `data`, a writable copy of the bytes of `section`."""
        target = np.frombuffer(data, np.uint8)
        place = self.addresses.get(section.index, 0)
        for table in self._relocations.get(section.index, ()):
            raw = self.elf.contents(table)
            records = np.frombuffer(raw, _RELA, len(raw) // _RELA.itemsize)
            for start in range(0, len(records), _CHUNK):
                self._apply(section, target, place, records[start : start + _CHUNK])

    def _apply(
        self, section: Section, target: "NDArray[np.uint8]", place: int, records: "NDArray[np.void]"
    ) -> None:
        records = records[records["type"] != 0]
        if not len(records):
            return
        if int(records["symbol"].max()) >= len(self.values):
            raise self._bad(section, "names a symbol that is not there")
        # Unsigned arithmetic wraps as the processor's does.
        values = self.values[records["symbol"]] + records["addend"].astype(np.uint64)
        places = np.uint64(place) + records["offset"]
        for number in np.unique(records["type"]).tolist():
            kind = _KINDS.get(number)
            if kind is None:
                raise self._bad(section, f"has type {number}, which modules do not use")
            chosen = records["type"] == number
            offsets = records["offset"][chosen]
            if int(offsets.max()) + kind.width > len(target):
                raise self._bad(section, "is outside of it")
            written = values[chosen] - places[chosen] if kind.relative else values[chosen]
            _store(target, offsets.astype(np.int64), written, kind.width)

    def _symbol_values(self) -> "NDArray[np.uint64]":
        """Return the address of each symbol, 0 for undefined ones."""
        table = self.elf.symbols
        sections = table.section_indices.astype(np.int64)
        count = len(self.elf.sections)
        bases = np.zeros(count + 1, np.uint64)  # the last is for symbols of no section
        for index, address in self.addresses.items():
            bases[index] = address
        sections[sections >= count] = count
        values: NDArray[np.uint64] = table.records["value"] + bases[sections]
        values[sections == SHN_UNDEF] = 0
        return values

    def _bad(self, section: Section, what: str) -> BadImageError:
        return BadImageError(f"{self.elf.name}: a relocation of {section.name} {what}.")


def _store(
    target: "NDArray[np.uint8]",
    offsets: "NDArray[np.int64]",
    values: "NDArray[np.uint64]",
    width: int,
) -> None:
    """Write the low `width` bytes of each value at its offset, which may be unaligned."""
    rows = values.astype("<u8").view(np.uint8).reshape(-1, 8)
    for byte in range(width):
        target[offsets + byte] = rows[:, byte]


def _place(elf: ElfFile) -> tuple[dict[int, int], int]:
    """Give each allocated section an address, code first; return also the end of them all."""
    addresses = {}
    position = MODULE_BASE
    allocated = [section for section in elf.sections if section.is_alloc]
    for section in sorted(allocated, key=lambda section: not section.is_executable):
        alignment = max(section.alignment, 1)
        if alignment > _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise BadImageError(f"{elf.name}: section {section.name} has an impossible alignment.")
        position = (position + alignment - 1) & -alignment
        addresses[section.index] = position
        position += section.size
        if position - MODULE_BASE > _MAX_SIZE:
            raise BadImageError(f"{elf.name}: its sections are larger than any module's.")
    return addresses, position


def _keys(sections: "Iterable[Section]") -> dict[tuple[str, int], Section]:
    """Name sections, telling those of the same name apart by their order."""
    seen: dict[str, int] = {}
    keys = {}
    for section in sections:
        if section.is_alloc:
            number = seen[section.name] = seen.get(section.name, -1) + 1
            keys[section.name, number] = section
    return keys


def _match(code: ElfFile, debug: ElfFile, addresses: dict[int, int]) -> dict[int, int]:
    """Carry the addresses over to a debug file, which holds the same sections without bytes."""
    if not debug.is_relocatable:
        raise BadImageError(f"{debug.name}: is not the debug file of a module.")
    loaded = _keys(code.sections)
    matched = {}
    for key, section in _keys(debug.sections).items():
        other = loaded.get(key)
        if other is None:
            continue
        if other.size != section.size:
            raise BadImageError(
                f"{debug.name}: does not belong to {code.name}: section {section.name} has "
                "another size; install the debug package of the same version."
            )
        matched[section.index] = addresses[other.index]
    return matched


def _write_image(elf: ElfFile, relocator: _Relocator) -> bytearray:
    """Write an ET_DYN file with DWARF, function symbols and headers of the code sections."""
    dwarf = [section for name in _DWARF if (section := elf.section(name)) and section.size]
    dwarf = [section for section in dwarf if section.type != SHT_NOBITS]
    code = [section for section in elf.sections if section.index in relocator.addresses]
    code = [section for section in code if section.is_executable]
    numbers = {section.index: number for number, section in enumerate(code, 1)}
    symbols = _function_symbols(elf, relocator.values, numbers)
    table = next((s for s in elf.sections if s.type == 2), None)
    strings = b"\0" if table is None else bytes(elf.contents(elf.sections[table.link]))

    layout = _Layout()
    for section in code:
        layout.add(section.name, 8, 0x6, relocator.addresses[section.index], section.size)
    for section in dwarf:
        layout.add(section.name, 1, 0, 0, section.size, stored=True)
    layout.add(".symtab", 2, 0, 0, symbols.nbytes, stored=True, link=len(layout.entries) + 1)
    layout.add(".strtab", 3, 0, 0, len(strings), stored=True)
    # Code comes first, so what else there is has address 0; there may be no code at all.
    end = max(MODULE_BASE, *(entry.address + entry.size for entry in layout.entries))
    image = layout.write(end - MODULE_BASE)
    view = memoryview(image)
    for section, entry in zip(dwarf, layout.entries[len(code) + 1 :], strict=False):
        spot = view[entry.offset : entry.offset + entry.size]
        spot[:] = elf.contents(section)
        relocator.apply(section, spot)
    for entry, data in zip(layout.entries[-3:-1], (symbols.tobytes(), strings), strict=True):
        view[entry.offset : entry.offset + entry.size] = data
    return image


def _function_symbols(
    elf: ElfFile, values: "NDArray[np.uint64]", numbers: dict[int, int]
) -> "NDArray[np.void]":
    """Return the ELF symbols of functions, at their addresses, for the renumbered sections."""
    table = elf.symbols
    lookup = np.zeros(len(elf.sections) + 1, np.uint16)
    for index, number in numbers.items():
        lookup[index] = number
    sections = table.section_indices.astype(np.int64)
    renumbered = lookup[np.minimum(sections, len(elf.sections))]
    chosen = (renumbered != 0) & (table.kinds == STT_FUNC)
    symbols = np.zeros(int(chosen.sum()) + 1, SYMBOL)
    symbols[1:] = table.records[chosen]
    symbols["value"][1:] = values[chosen]
    symbols["section"][1:] = renumbered[chosen]
    return symbols


@dataclass(frozen=True, slots=True)
class _Entry:
    name_offset: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int


class _Layout:
    """The section table of a file that is being written."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = [_Entry(0, 0, 0, 0, 0, 0, 0)]
        self._names = bytearray(b"\0")
        self._end = 64 + 56  # ELF header and one program header

    def add(
        self,
        name: str,
        kind: int,
        flags: int,
        address: int,
        size: int,
        *,
        stored: bool = False,
        link: int = 0,
    ) -> None:
        """Append a section; `stored` ones get room in the file."""
        name_offset = len(self._names)
        self._names += name.encode() + b"\0"
        offset = self._end = self._end + 15 & ~15
        if stored:
            self._end += size
        self.entries.append(_Entry(name_offset, kind, flags, address, offset, size, link))

    def write(self, memory_size: int) -> bytearray:
        """Return the file with headers and section table, the contents still zero."""
        name_offset = len(self._names)
        self._names += b".shstrtab\0"
        names_at = self._end
        self.entries.append(_Entry(name_offset, 3, 0, 0, names_at, len(self._names), 0))
        table_at = names_at + len(self._names) + 15 & ~15
        image = bytearray(table_at + 64 * len(self.entries))
        struct.pack_into(
            "<16sHHIQQQIHHHHHH",
            image,
            0,
            b"\x7fELF\x02\x01\x01",
            *(3, 62, 1, 0, 64, table_at, 0, 64, 56, 1, 64),
            *(len(self.entries), len(self.entries) - 1),
        )
        struct.pack_into(
            "<IIQQQQQQ", image, 64, 1, 5, 0, MODULE_BASE, MODULE_BASE, memory_size, memory_size, 16
        )
        image[names_at : names_at + len(self._names)] = self._names
        for index, entry in enumerate(self.entries):
            entry_size = SYMBOL.itemsize if entry.kind == 2 else 0
            struct.pack_into(
                "<IIQQQQIIQQ",
                image,
                table_at + 64 * index,
                *(entry.name_offset, entry.kind, entry.flags, entry.address, entry.offset),
                *(entry.size, entry.link, 0, 1, entry_size),
            )
        return image
