"""Opening of x86-64 ELF files that nobody vouches for: vmlinux, modules, separate debug files.

`ElfFile.open` checks everything its callers rely on before it returns: class, byte order and
machine, that the section and program header tables and every section lie inside the file, that
sections together are no larger than the file (so that a consumer who copies each section is
bounded by the file size), and that compressed sections and .bss together stay within a budget.
Section contents are views of the mapped file; compressed ones are unpacked on first use.

Sources: System V gABI (ELF header, section header, compressed sections), elf(5), and for
.zdebug_* the GNU binutils manual, option --compress-debug-sections=zlib-gnu.
"""

import struct
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from trapline.base.errors import BadImageError
from trapline.base.mapping import dropping_pages, map_file, unmap
from trapline.base.printable import decode_name
from trapline.kernel.elf import compression
from trapline.kernel.elf.header import Header, Note, parse_notes, read_header
from trapline.kernel.elf.symtab import SymbolTable

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

ET_REL: Final = 1
SHT_NULL: Final = 0
SHT_PROGBITS: Final = 1
SHT_SYMTAB: Final = 2
SHT_STRTAB: Final = 3
SHT_RELA: Final = 4
SHT_NOTE: Final = 7
SHT_NOBITS: Final = 8
SHT_SYMTAB_SHNDX: Final = 18
SHF_WRITE: Final = 0x1
SHF_ALLOC: Final = 0x2
SHF_EXECINSTR: Final = 0x4
SHF_COMPRESSED: Final = 0x800
PT_LOAD: Final = 1

_SHN_XINDEX: Final = 0xFFFF
_PN_XNUM: Final = 0xFFFF
_SHDR: Final = struct.Struct("<IIQQQQIIQQ")
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_CHDR: Final = struct.Struct("<IIQQ")
_NT_GNU_BUILD_ID: Final = 3
_LARGE: Final = 64 << 20  # bytes of a file whose pages are worth giving back
# The largest Debian module (amdgpu) has some 300 sections; -ffunction-sections makes thousands.
_MAX_SECTIONS: Final = 100_000
_MAX_NAME: Final = 1024
#: What a compressed file (vmlinux.gz) may unpack to; likewise its compressed sections and .bss
#: together. A whole vmlinux with DWARF is 340 MB to 1 GB.
MAX_KERNEL: Final = 2 << 30
#: The same for a module, of which a scan opens several at once. Debian's largest, amdgpu, has
#: 600 MB with DWARF.
MAX_MODULE: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Section:
    """One section header.

    `size` is in bytes, unpacked; `file_size` is what the section takes in the file (0 for
    SHT_NOBITS). A `.zdebug_x` section is named `.debug_x`. `codec` is how it is packed.
    """

    index: int
    name: str
    type: int
    flags: int
    address: int
    offset: int
    size: int
    file_size: int
    link: int
    info: int
    alignment: int
    entry_size: int
    codec: compression.SectionCodec | None

    @property
    def is_alloc(self) -> bool:
        """Whether the section is part of the running kernel or module."""
        return bool(self.flags & SHF_ALLOC)

    @property
    def is_writable(self) -> bool:
        """Whether the section is flagged as writable."""
        return bool(self.flags & SHF_WRITE)

    @property
    def is_executable(self) -> bool:
        """Whether the section holds instructions."""
        return bool(self.flags & SHF_EXECINSTR)


@dataclass(frozen=True, slots=True)
class Segment:
    """One program header; addresses and sizes in bytes."""

    type: int
    flags: int
    offset: int
    virtual_address: int
    physical_address: int
    file_size: int
    memory_size: int


class ElfFile:
    """A validated x86-64 ELF file. Make one with `open`; use it as a context manager.

    `name` is what messages call the file, `data` all of its bytes (unpacked, where the file was
    compressed), `type` one of ET_REL, ET_EXEC, ET_DYN, `entry` the entry address.
    """

    def __init__(
        self,
        name: str,
        data: memoryview,
        mapping: "mmap.mmap | None" = None,
        *,
        limit: int = MAX_KERNEL,
    ) -> None:
        self.name = name
        self._limit = limit
        self.data = data
        self._mapping = mapping
        self._unpacked: dict[int, memoryview] = {}
        header = read_header(name, data)
        self.type, self.entry = header.type, header.entry
        self.segments = self._read_segments(header.phoff, header.phentsize, header.phnum)
        self.sections = self._read_sections(header)
        self._by_name: dict[str, Section] = {}
        for section in self.sections:
            self._by_name.setdefault(section.name, section)

    @classmethod
    def open(
        cls, source: Path | str | bytes, *, name: str | None = None, limit: int = MAX_KERNEL
    ) -> Self:
        """Open a file, or bytes already in memory, compressed or not.

        `name` replaces the path in messages. `limit`, in bytes, bounds what is unpacked. Raises
        KernelNotFoundError where the file cannot be read, BadImageError where it is anything
        but a sound little-endian x86-64 ELF file.
        """
        if isinstance(source, bytes):
            name, mapping, data = name or "ELF image", None, memoryview(source)
        else:
            name = name or str(source)
            mapping, data = map_file(Path(source), name)
        if compression.detect(data) is not None:
            unpacked = compression.decompress(data, limit=limit, name=name)
            unmap(data, mapping)
            mapping, data = None, memoryview(unpacked)
        try:
            return cls(name, data, mapping, limit=limit)
        except BadImageError:
            unmap(data, mapping)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; views and arrays taken from it keep it mapped until they die."""
        self._unpacked.clear()
        self.__dict__.pop("symbols", None)
        unmap(self.data, self._mapping)

    def read_once(self) -> AbstractContextManager[None]:
        """Keep the pages of a large file out of memory while it is read from end to end."""
        if self._mapping is None or len(self.data) < _LARGE:
            return nullcontext()
        return dropping_pages(self._mapping)

    @property
    def is_relocatable(self) -> bool:
        """Whether this is ET_REL, as modules are: sections have no addresses yet."""
        return self.type == ET_REL

    def section(self, name: str) -> Section | None:
        """Return the first section of that name, or None."""
        return self._by_name.get(name)

    def contents(self, section: Section | str) -> memoryview:
        """Return the bytes of a section, unpacked; empty for SHT_NOBITS or an unknown name.

        Uncompressed contents are a read-only view of the file, with no copy.
        """
        if isinstance(section, str):
            found = self._by_name.get(section)
            if found is None:
                return memoryview(b"")
            section = found
        raw = self.data[section.offset : section.offset + section.file_size]
        if section.codec is None:
            return raw
        if section.index not in self._unpacked:
            skip = _CHDR.size if section.flags & SHF_COMPRESSED else _ZDEBUG_HEADER
            name = f"{self.name}: section {section.name}"
            unpacked = compression.inflate_section(
                raw[skip:], section.codec, section.size, name=name
            )
            self._unpacked[section.index] = memoryview(unpacked)
        return self._unpacked[section.index]

    def notes(self) -> "Iterator[Note]":
        """Yield the entries of all SHT_NOTE sections; a malformed tail ends its section."""
        for section in self.sections:
            if section.type == SHT_NOTE:
                yield from parse_notes(section.name, self.contents(section))

    @cached_property
    def build_id(self) -> str | None:
        """The GNU build id as lower-case hexadecimal, or None where the file has none."""
        for note in self.notes():
            if note.owner == "GNU" and note.type == _NT_GNU_BUILD_ID:
                return note.description.hex()
        return None

    @cached_property
    def symbols(self) -> SymbolTable:
        """The symbol table (.symtab), empty where the file is stripped."""
        table = next((s for s in self.sections if s.type == SHT_SYMTAB), None)
        if table is None:
            return SymbolTable(self.name, memoryview(b""), memoryview(b""))
        strings = self._linked(table, SHT_STRTAB)
        extended = next(
            (s for s in self.sections if s.type == SHT_SYMTAB_SHNDX and s.link == table.index),
            None,
        )
        return SymbolTable(
            self.name,
            self.contents(table),
            self.contents(strings),
            None if extended is None else self.contents(extended),
        )

    def _linked(self, section: Section, kind: int) -> Section:
        if section.link < len(self.sections) and self.sections[section.link].type == kind:
            return self.sections[section.link]
        raise BadImageError(f"{self.name}: section {section.name} links to no string table.")

    def _read_segments(self, offset: int, entry: int, count: int) -> tuple[Segment, ...]:
        if count == 0:
            return ()
        if count == _PN_XNUM or entry != _PHDR.size or offset + count * entry > len(self.data):
            raise BadImageError(f"{self.name}: the program header table is not in the file.")
        segments = []
        for fields in _PHDR.iter_unpack(self.data[offset : offset + count * entry]):
            kind, flags, start, virtual, physical, size, memory, _ = fields
            if kind == PT_LOAD and (
                start + size > len(self.data)
                or memory < size
                or virtual + memory > 1 << 64
                or physical + memory > 1 << 64
            ):
                raise BadImageError(
                    f"{self.name}: the file is truncated: a segment at offset {start:#x} of "
                    f"{size:#x} bytes is not inside it."
                )
            segments.append(Segment(kind, flags, start, virtual, physical, size, memory))
        return tuple(segments)

    def _read_sections(self, header: Header) -> tuple[Section, ...]:
        offset, entry = header.shoff, header.shentsize
        count, names = header.shnum, header.shstrndx
        if offset == 0:
            return ()
        end = len(self.data)
        if entry != _SHDR.size or offset + entry > end:
            raise self._no_table()
        first = _SHDR.unpack_from(self.data, offset)
        # More than 0xff00 sections: count and name index stand in section 0.
        count = first[5] if count == 0 else count
        names = first[6] if names == _SHN_XINDEX else names
        if count > _MAX_SECTIONS:
            raise BadImageError(f"{self.name}: {count} sections are more than any kernel has.")
        if offset + count * entry > end:
            raise self._no_table()
        headers = list(_SHDR.iter_unpack(self.data[offset : offset + count * entry]))
        strings = self._name_strings(headers, names)
        sections = tuple(
            self._section(index, fields, strings) for index, fields in enumerate(headers)
        )
        self._check_sizes(sections)
        return sections

    def _no_table(self) -> BadImageError:
        return BadImageError(
            f"{self.name}: the file is truncated: its section header table is not inside it."
        )

    def _name_strings(self, headers: list[tuple[int, ...]], index: int) -> bytes:
        if index == 0:
            return b"\0"
        if index >= len(headers) or headers[index][1] != SHT_STRTAB:
            raise BadImageError(f"{self.name}: the section name table is missing.")
        offset, size = headers[index][4:6]
        if offset + size > len(self.data):
            raise BadImageError(f"{self.name}: the file is truncated: section names are missing.")
        return bytes(self.data[offset : offset + size])

    def _section(self, index: int, fields: tuple[int, ...], strings: bytes) -> Section:
        name_at, kind, flags, address, offset, size, link, info, alignment, entry = fields
        stop = strings.find(b"\0", name_at, name_at + _MAX_NAME)
        if stop < 0:
            raise BadImageError(f"{self.name}: section {index} has no valid name.")
        name = decode_name(strings[name_at:stop])
        file_size = 0 if kind in {SHT_NOBITS, SHT_NULL} else size
        if offset + file_size > len(self.data):
            raise BadImageError(
                f"{self.name}: the file is truncated: section {name} at offset {offset:#x} of "
                f"{size:#x} bytes is not inside it."
            )
        if address + size > 1 << 64:
            raise BadImageError(f"{self.name}: section {name} ends beyond the address space.")
        codec: compression.SectionCodec | None = None
        if kind == SHT_NULL:
            size = 0
        elif file_size and flags & SHF_COMPRESSED:
            codec, size = self._compressed(name, offset, file_size)
        elif file_size and name.startswith(".zdebug_"):
            codec, size = self._zdebug(name, offset, file_size)
            name = "." + name[2:]
        return Section(
            index,
            name,
            kind,
            flags,
            address,
            offset,
            size,
            file_size,
            link,
            info,
            alignment,
            entry,
            codec,
        )

    def _compressed(
        self, name: str, offset: int, size: int
    ) -> tuple[compression.SectionCodec, int]:
        if size < _CHDR.size:
            raise BadImageError(f"{self.name}: section {name} has no compression header.")
        kind, _, unpacked, _ = _CHDR.unpack_from(self.data, offset)
        if kind == 1:
            return "zlib", unpacked
        if kind == 2:
            return "zstd", unpacked
        raise BadImageError(f"{self.name}: section {name} has unknown compression type {kind}.")

    def _zdebug(self, name: str, offset: int, size: int) -> tuple[compression.SectionCodec, int]:
        if size < _ZDEBUG_HEADER or bytes(self.data[offset : offset + 4]) != b"ZLIB":
            raise BadImageError(f"{self.name}: section {name} has no compression header.")
        return "zlib", int.from_bytes(self.data[offset + 4 : offset + 12], "big")

    def _check_sizes(self, sections: tuple[Section, ...]) -> None:
        if sum(s.file_size for s in sections) > len(self.data):
            raise BadImageError(f"{self.name}: sections overlap: together they exceed the file.")
        unpacked = sum(s.size for s in sections if s.codec or s.type == SHT_NOBITS)
        if unpacked > self._limit:
            raise BadImageError(
                f"{self.name}: sections claim to unpack to {unpacked >> 20} MiB, more than the "
                f"{self._limit >> 20} MiB that are allowed."
            )


_ZDEBUG_HEADER: Final = 12  # "ZLIB", then the unpacked size, big-endian
