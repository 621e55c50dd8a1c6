"""One vmlinux or one module as an object: its code, and what each address of it belongs to.

Addresses of a vmlinux are those it was linked at. A module is linked here (`relocate`), so its
addresses are arbitrary; `offset_of` turns one into what a `.ko` has: an offset in a section.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from trapline.base.errors import BadImageError
from trapline.kernel.codespans import CodeSpans, described_code
from trapline.kernel.dwarf.frames import SourceFrame, SourceFrames
from trapline.kernel.dwarf.linetable import LineTable
from trapline.kernel.dwarf.sourcepath import SourceTree
from trapline.kernel.dwarf.symcache import SymCache
from trapline.kernel.dwarf.units import Unit, UnitTable
from trapline.kernel.elf import jumplabels
from trapline.kernel.elf.alternatives import Alternatives, Span
from trapline.kernel.elf.bzimage import open_vmlinuz
from trapline.kernel.elf.file import MAX_MODULE, PT_LOAD, SHT_PROGBITS, ElfFile, Section
from trapline.kernel.elf.functions import FunctionTable, Symbol
from trapline.kernel.elf.kallsyms import read_kallsyms
from trapline.kernel.elf.relocate import MODULE_BASE, LinkedModule
from trapline.kernel.elf.symtab import SymbolTable
from trapline.results.scan import Frame

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


VMLINUX: Final = "vmlinux"
REPLACEMENTS: Final = ".altinstr_replacement"
# Parts of vmlinux's .text that are sections of their own until the last link, and the symbols
# around them: include/asm-generic/vmlinux.lds.h, arch/x86/kernel/vmlinux.lds.S.
_PARTS: Final = (
    (".noinstr.text", "__noinstr_text_start", "__noinstr_text_end"),
    (".entry.text", "__entry_text_start", "__entry_text_end"),
    (".irqentry.text", "__irqentry_text_start", "__irqentry_text_end"),
    (".softirqentry.text", "__softirqentry_text_start", "__softirqentry_text_end"),
    (".cpuidle.text", "__cpuidle_text_start", "__cpuidle_text_end"),
    (".sched.text", "__sched_text_start", "__sched_text_end"),
    (".kprobes.text", "__kprobes_text_start", "__kprobes_text_end"),
)


class TextSection(NamedTuple):
    """Instructions: `data` is what would be in memory at `address`, relocations applied.

    `is_writable` is what its section's flags say.
    """

    name: str
    address: int
    data: memoryview
    is_writable: bool = False

    @property
    def end(self) -> int:
        """The address behind the last byte."""
        return self.address + len(self.data)


class Binary:
    """A vmlinux or a module. Make one with `open_vmlinux`, `open_vmlinuz` or `open_module`.

    `name` is "vmlinux" or the module's name; `elf` is the file that has the code.
    """

    def __init__(self, name: str, elf: ElfFile, module: LinkedModule | None = None) -> None:
        self.name = name
        self.elf = elf
        self._module = module
        self._line_tables: dict[int, LineTable] = {}
        self._sections = code_sections(elf)

    @classmethod
    def open_vmlinux(cls, path: "Path") -> Self:
        """Open a vmlinux; raises BadImageError where it is none."""
        elf = ElfFile.open(path)
        if elf.is_relocatable:
            raise BadImageError(f"{path}: is a module, not a kernel.")
        return cls(VMLINUX, elf)

    @classmethod
    def open_vmlinuz(cls, path: "Path") -> Self:
        """Unpack and open a boot image: no DWARF, no symbol table."""
        return cls(VMLINUX, open_vmlinuz(path))

    @classmethod
    def open_module(cls, name: str, path: "Path", debug: "Path | None" = None) -> Self:
        """Open a module, and the file that has its DWARF where that is another one."""
        return cls.of_module(name, *open_module_files(path, debug))

    @classmethod
    def of_module(cls, name: str, code: ElfFile, debug: ElfFile) -> Self:
        """Link a module that is open already."""
        return cls(name, code, LinkedModule(code, debug))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        if self._module is not None:
            self._module.debug.close()
        self.elf.close()

    @property
    def is_module(self) -> bool:
        """Whether this is a loadable module."""
        return self._module is not None

    @cached_property
    def text(self) -> tuple[TextSection, ...]:
        """All code, in the order of the file."""
        return tuple(
            TextSection(
                section.name,
                self._address(section),
                self._contents(section),
                section.is_writable,
            )
            for section in self._sections
            if section.size
        )

    @cached_property
    def externals(self) -> "Mapping[int, str]":
        """Address -> name of what is defined in other objects; empty for a vmlinux."""
        return {} if self._module is None else self._module.externals

    @cached_property
    def has_dwarf(self) -> bool:
        """Whether functions can be told apart down to inlined ones, with source lines."""
        return has_dwarf(self.elf if self._module is None else self._module.debug)

    @cached_property
    def symbols(self) -> SymbolTable:
        """The symbol table; of a stripped kernel, the one it carries for /proc/kallsyms."""
        if self._module is None and not len(self.elf.symbols):
            return read_kallsyms(self.elf) or self.elf.symbols
        return self.elf.symbols

    @property
    def has_typed_symbols(self) -> bool:
        """Whether symbols say what they are and how large: those of a symbol table do."""
        return len(self.elf.symbols) > 0

    @cached_property
    def code_spans(self) -> CodeSpans | None:
        """What is code in the sections of `text`; None for a module, where all of it is."""
        return None if self._module is not None else described_code(self)

    @cached_property
    def functions(self) -> FunctionTable:
        """Functions by address and name; empty for a kernel without symbols."""
        return FunctionTable(
            self.symbols, self.symbol_values, {section.index for section in self._sections}
        )

    @cached_property
    def symcache(self) -> SymCache | None:
        """Inline chains by address, or None without DWARF."""
        if not self.has_dwarf:
            return None
        if self._module is not None:
            return SymCache.build(self._module.debug_image, MODULE_BASE, self.elf.name)
        base = next((s.virtual_address for s in self.elf.segments if s.type == PT_LOAD), 0)
        with self.elf.read_once():
            return SymCache.build(self.elf.data, base, self.elf.name)

    @cached_property
    def units(self) -> UnitTable | None:
        """Compilation units by address, or None without DWARF."""
        if not self.has_dwarf:
            return None
        with self._debug.read_once():
            return UnitTable(self._debug)

    @cached_property
    def alternatives(self) -> Alternatives:
        """The alternatives of this object, empty where it has none."""
        section = self.elf.section(".altinstructions")
        if section is None or not section.is_alloc or section.type != SHT_PROGBITS:
            return Alternatives([])
        return Alternatives.parse(
            self._contents(section),
            self._address(section),
            [Span(part.address, part.end) for part in self.text],
            [Span(part.address, part.end) for part in self.text if part.name == REPLACEMENTS],
        )

    @cached_property
    def static_branches(self) -> "Mapping[int, int]":
        """Branches that static keys turn on and off, and where they go; empty without any."""
        section = self.elf.section("__jump_table")
        if section is None or not section.is_alloc or section.type != SHT_PROGBITS:
            return {}
        return jumplabels.parse(self._contents(section), self._address(section))

    def symbol_at(self, address: int) -> Symbol | None:
        """Return the function or label that holds an address."""
        return self.functions.at(address)

    def is_public(self, address: int) -> bool:
        """Whether other objects can call the function at an address by its name."""
        if self._module is None:
            return self.functions.is_global(address)
        return not self._exported.isdisjoint(self.functions.names_at(address))

    @cached_property
    def _exported(self) -> frozenset[str]:
        prefix = "__ksymtab_"
        names = self.symbols.names
        return frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))

    def address_of(self, name: str) -> int | None:
        """Return the address of a symbol of any kind, defined here or elsewhere, or None."""
        if self._module is not None:
            for spot in self._module.external_addresses([name]):
                return spot
        indices, _ = self.symbols.find([name])
        for index in indices.tolist():
            if self.symbols.section_indices[index]:
                return int(self.symbol_values[index])
        return None

    def addresses_of(self, names: "Iterable[str]") -> dict[int, str]:
        """Return address -> name of those functions that exist, here or elsewhere."""
        wanted = set(names)
        found = self.functions.addresses_of(wanted)
        if self._module is not None:
            found.update(self._module.external_addresses(wanted))
        return found

    def chain(self, address: int) -> tuple[Frame, ...]:
        """Return the frames of an address, innermost first.

        Inlined functions come before the function that the bytes belong to.

        Without DWARF there is one frame, without file and line; without symbols there is none.
        """
        symbol = self.symbol_at(address)
        frames = () if self.symcache is None else self.symcache.chain(address)
        if not frames or frames[-1].file is None:
            return self._line_chain(address, symbol, frames)
        if symbol is None or symbol.name == frames[-1].function:
            return frames
        if 0 < symbol.size <= address - symbol.address:
            # Behind the last symbol: a weak function's code stays when another takes its name.
            return frames
        # symbolic names all parts of a function after the lowest, which may be its cold one.
        outer = frames[-1]
        return (*frames[:-1], Frame(function=symbol.name, file=outer.file, line=outer.line))

    def source_frames(self, addresses: "Iterable[int]") -> "dict[int, tuple[SourceFrame, ...]]":
        """Return the frames of addresses to the column, innermost first; none of assembly.

        Raises BadImageError where the debug information is corrupt.
        """
        return {} if self.units is None else SourceFrames(self.units).of(addresses)

    def own_frame(self, address: int) -> Frame | None:
        """Return the function of an address and the line it is at, without what is inlined there.

        It needs the line table of one unit only, where `chain` reads the DWARF of all.
        """
        frames = self._line_chain(address, self.symbol_at(address), ())
        return frames[0] if frames else None

    def unit_at(self, address: int) -> Unit | None:
        """Return the compilation unit of an address, or None where that is not known."""
        return None if self.units is None else self.units.unit_at(address)

    def object_at(self, address: int) -> str | None:
        """Return the object file that an address was linked from, below the source tree."""
        unit = self.unit_at(address)
        if unit is None:
            return None
        path = self._tree.relative(unit.compilation, None, unit.name)
        if path is None:
            return None
        stem, dot, _ = path.rpartition(".")
        return f"{stem}.o" if dot else path

    def section_at(self, address: int) -> str:
        """Return the section of an address; parts of vmlinux's .text by the names they had."""
        for start, end, name in self._parts:
            if start <= address < end:
                return name
        section = self.text_at(address)
        return "" if section is None else section.name

    def text_at(self, address: int) -> TextSection | None:
        """Return the code section that holds an address."""
        for section in self.text:
            if section.address <= address < section.end:
                return section
        return None

    def offset_of(self, address: int) -> int:
        """Return what to call an address: itself, or for a module the offset in its section."""
        section = self.text_at(address)
        return address if self._module is None or section is None else address - section.address

    def read(self, address: int, size: int) -> bytes | None:
        """Return initialised memory of any section, or None where there is none."""
        for section in self.elf.sections:
            start = self._address(section)
            if section.is_alloc and start <= address and address + size <= start + section.size:
                data = self._contents(section)
                offset = address - start
                return bytes(data[offset : offset + size]) if len(data) else None
        return None

    def placed(self, section: Section) -> tuple[int, memoryview]:
        """Return where a section of the object's code file lies, and its bytes as in memory."""
        return self._address(section), self._contents(section)

    def is_mapped(self, address: int) -> bool:
        """Whether an address is in the image, initialised or not."""
        return any(
            section.is_alloc and 0 <= address - self._address(section) < section.size
            for section in self.elf.sections
        )

    def _address(self, section: Section) -> int:
        if self._module is None:
            return section.address
        return self._module.addresses.get(section.index, 0)

    def _contents(self, section: Section) -> memoryview:
        if self._module is None:
            return self.elf.contents(section)
        return self._module.contents(section)

    @property
    def symbol_values(self) -> "NDArray[np.uint64]":
        """The address of each symbol of `symbols`, shape (n,)."""
        if self._module is not None:
            return self._module.symbol_values
        values: NDArray[Any] = self.symbols.records["value"]
        return values

    @property
    def debug(self) -> ElfFile:
        """The file with this object's DWARF."""
        return self.elf if self._module is None else self._module.debug

    @cached_property
    def _debug(self) -> ElfFile:
        """The file whose DWARF has this object's addresses in it."""
        if self._module is None:
            return self.elf
        return ElfFile(self.elf.name, memoryview(self._module.debug_image))

    @cached_property
    def _tree(self) -> SourceTree:
        return SourceTree([] if self.units is None else {unit.name for unit in self.units.units})

    @cached_property
    def _parts(self) -> list[tuple[int, int, str]]:
        if self._module is not None:
            return []
        parts = []
        for name, first, last in _PARTS:
            start, end = self.address_of(first), self.address_of(last)
            if start is not None and end is not None and start < end:
                parts.append((start, end, name))
        return parts

    def line_at(self, address: int) -> tuple[str | None, int] | None:
        """Return file and line of an instruction, in an inlined function where it is in one.

        Below the source tree; None without DWARF of it. Cheaper than `chain`.
        """
        unit = self.unit_at(address)
        if unit is None or unit.line_table is None:
            return None
        place = self._line_table(unit.line_table).at(address)
        if place is None:
            return None
        return self._tree.relative(unit.compilation, place.folder, place.file), place.line

    def _line_table(self, offset: int) -> LineTable:
        table = self._line_tables.get(offset)
        if table is None:
            table = self._line_tables[offset] = LineTable(self._debug, offset)
        return table

    def _line_chain(
        self, address: int, symbol: Symbol | None, frames: tuple[Frame, ...]
    ) -> tuple[Frame, ...]:
        """Build the one frame of code that SymCache does not know."""
        if symbol is None:
            return frames
        unit = self.unit_at(address)
        if unit is None or unit.line_table is None:
            return (Frame(function=symbol.name, file=None, line=None),)
        table = self._line_table(unit.line_table)
        if unit.is_assembly:
            place = table.at(address)
        else:
            place = table.at_in(address, symbol.address, unit.name)
        if place is None:
            return (Frame(function=symbol.name, file=None, line=None),)
        path = self._tree.relative(unit.compilation, place.folder, place.file)
        return (Frame(function=symbol.name, file=path, line=place.line or None),)


def open_module_files(path: "Path", debug: "Path | None" = None) -> tuple[ElfFile, ElfFile]:
    """Open the file with a module's code and the one with its DWARF, often the same.

    Debian's debug files hold the code too; then the module itself, which is compressed, is not
    even opened.
    """
    if debug is None or debug == path:
        code = ElfFile.open(path, limit=MAX_MODULE)
        return code, code
    dwarf = ElfFile.open(debug, limit=MAX_MODULE)
    return (dwarf if has_code(dwarf) else ElfFile.open(path, limit=MAX_MODULE)), dwarf


def has_dwarf(elf: ElfFile) -> bool:
    """Whether a file has DWARF of its own."""
    section = elf.section(".debug_info")
    return section is not None and section.type == SHT_PROGBITS and section.size > 0


def debug_elsewhere(elf: ElfFile) -> str | None:
    """Say what of a file's debug information is in other files, None where it is all there.

    Split DWARF leaves skeletons of its units (DWARF 5, 7.5.1.2, and .debug_gnu_addr's kin before);
    dwz moves what several files share to one that .gnu_debugaltlink names.
    """
    if len(elf.contents(".gnu_debugaltlink")):
        return "a part of the debug information is in the file that dwz moved it to"
    if elf.section(".debug_gnu_pubnames") is None and elf.section(".debug_addr") is None:
        return None
    strings = bytes(elf.contents(".debug_str")) + bytes(elf.contents(".debug_line_str"))
    if has_dwarf(elf) and b".dwo\0" in strings:
        return "the debug information is split off into .dwo files"
    return None


def code_sections(elf: ElfFile) -> list[Section]:
    """List the sections with instructions."""
    return [
        section
        for section in elf.sections
        if section.is_alloc and section.is_executable and section.type == SHT_PROGBITS
    ]


def has_code(elf: ElfFile) -> bool:
    """Whether a file has the bytes of its code: files of debug information have none of them."""
    sections = [s for s in elf.sections if s.is_alloc and s.is_executable and s.size]
    return all(section.type == SHT_PROGBITS for section in sections)
