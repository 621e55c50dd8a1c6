"""Which source file, and so which object file, an address was compiled from.

Reads the root entry of each DWARF compilation unit: its name, address ranges and line table. The
rest of the DWARF is read by symbolic, which tells functions, but not to which unit they belong:
a static inline function of a header is compiled into many objects.

Source: DWARF 5, 7.5 (units, abbreviations, forms) and 7.25, 7.28 (ranges); DWARF 4 likewise.
"""

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from trapline.base.cursor import Cursor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trapline.base.errors import BadImageError
    from trapline.kernel.elf.file import ElfFile

LANGUAGE_ASSEMBLER: Final = 0x8001  # DW_LANG_Mips_Assembler, which gas uses for all machines

_OLDEST: Final = 2
_NEWEST: Final = 5
_UNIT_TYPES: Final = 5  # the first version with unit types
_UT_COMPILE: Final = 1
_FORM_ADDR: Final = 0x01
_FORM_IMPLICIT_CONST: Final = 0x21
_TAG_COMPILE_UNIT: Final = 0x11
_AT_NAME: Final = 0x03
_AT_STMT_LIST: Final = 0x10
_AT_LOW_PC: Final = 0x11
_AT_HIGH_PC: Final = 0x12
_AT_LANGUAGE: Final = 0x13
_AT_COMP_DIR: Final = 0x1B
_AT_RANGES: Final = 0x55
_AT_ADDR_BASE: Final = 0x73
_AT_STR_OFFSETS_BASE: Final = 0x72
_AT_RNGLISTS_BASE: Final = 0x74
# Kinds of range list entries, and how the two addresses of each are given.
_RLE_END_OF_LIST: Final = 0
_RLE_BASES: Final = {1: "index", 5: "address"}
_RLE_SPANS: Final = {
    2: ("index", "index"),
    3: ("index", "length"),
    4: ("offset", "offset"),
    6: ("address", "address"),
    7: ("address", "length"),
}
_MAX_UNITS: Final = 1_000_000
_MAX_RANGES: Final = 4_000_000
_MASK: Final = (1 << 64) - 1

# Forms by what has to be read; DWARF 5, table 7.6.
_FIXED: Final = {0x0B: 1, 0x11: 1, 0x0C: 1, 0x05: 2, 0x12: 2, 0x06: 4, 0x13: 4, 0x07: 8, 0x14: 8}
_STRX: Final = {0x25: 1, 0x26: 2, 0x27: 3, 0x28: 4}
_ADDRX: Final = {0x29: 1, 0x2A: 2, 0x2B: 3, 0x2C: 4}
_BLOCKS: Final = {0x0A: 1, 0x03: 2, 0x04: 4}


@dataclass(frozen=True, slots=True)
class Unit:
    """One compilation unit, whose header is at `offset` of .debug_info.

    `line_table` is an offset in .debug_line, None where it has none.
    """

    name: str
    compilation: str
    language: int
    line_table: int | None
    offset: int = 0

    @property
    def is_assembly(self) -> bool:
        """Whether the source is a .S file."""
        return self.language == LANGUAGE_ASSEMBLER


class UnitTable:
    """All compilation units of a file, by address."""

    def __init__(self, elf: "ElfFile") -> None:
        self._elf = elf
        self._info = elf.contents(".debug_info")
        #: .debug_abbrev, and where in it the table of each unit starts is in its `Root`.
        self.abbreviations = bytes(elf.contents(".debug_abbrev"))
        self.units: list[Unit] = []
        ranges = self._read_units()
        ranges.sort()
        self._starts = [start for start, _, _ in ranges]
        self._ranges = ranges

    def spans(self, *, assembly: bool) -> "tuple[NDArray[np.uint64], NDArray[np.uint64]]":
        """Return the bounds of what units in assembly, or all others, say is code of theirs."""
        chosen = [
            (start, end)
            for start, end, unit in self._ranges
            if self.units[unit].is_assembly == assembly
        ]
        bounds = np.array(chosen, np.uint64).reshape(-1, 2)
        return bounds[:, 0], bounds[:, 1]

    def unit_at(self, address: int) -> Unit | None:
        """Return the unit whose code is at an address."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._ranges[index][1]:
            return None
        return self.units[self._ranges[index][2]]

    def _cursor(self, section: str, position: int) -> Cursor:
        return Cursor(self._elf.contents(section), f"{self._elf.name}: {section}", position)

    def _read_units(self) -> list[tuple[int, int, int]]:
        ranges: list[tuple[int, int, int]] = []
        position = 0
        while position < len(self._info) and len(self.units) < _MAX_UNITS:
            root, position = self._unit(position)
            if root is not None:
                self._add(root, ranges)
        return ranges

    def _unit(self, start: int) -> "tuple[Root | None, int]":
        """Read the root entry of the unit at `start`; return also where the next unit is."""
        what = f"{self._elf.name}: .debug_info"
        cursor = Cursor(self._info, what, start)
        length = cursor.unsigned(4)
        size = 4
        if length == 0xFFFFFFFF:
            length = cursor.unsigned(8)
            size = 8
        end = cursor.position + length
        root = self._root(Cursor(self._info, what, cursor.position, end), size)
        if root is not None:
            root.start, root.end = start, end
        return root, end

    def root(self, unit: Unit) -> "Root":
        """Read the root entry of a unit again."""
        root, _ = self._unit(unit.offset)
        if root is None:
            raise self.bad()
        return root

    def contents(self, root: "Root") -> bytes:
        """Return the entries of a unit, from its header on."""
        return bytes(self._info[root.start : root.end])

    def bad(self) -> "BadImageError":
        """Return the error for entries that make no sense."""
        return Cursor(b"", f"{self._elf.name}: .debug_info").bad()

    def _add(self, root: "Root", ranges: list[tuple[int, int, int]]) -> None:
        values = root.values
        number = len(self.units)
        line_table = values.get(_AT_STMT_LIST)
        self.units.append(
            Unit(
                str(values.get(_AT_NAME, "")),
                str(values.get(_AT_COMP_DIR, "")),
                self._number(values.get(_AT_LANGUAGE, 0)),
                line_table if isinstance(line_table, int) else None,
                root.start,
            )
        )
        low = self.address(root, values.get(_AT_LOW_PC, 0))
        if _AT_RANGES in values:
            spans = self.spans_of(root, values[_AT_RANGES])
        elif _AT_HIGH_PC in values:
            high = self.address(root, values[_AT_HIGH_PC])
            spans = [(low, high if root.high_is_address else low + high)]
        else:
            return
        ranges.extend((start, end, number) for start, end in spans if start < end < 1 << 64)
        if len(ranges) > _MAX_RANGES:
            raise self.bad()

    def _root(self, cursor: Cursor, offset_size: int) -> "Root | None":
        """Read the root entry of the unit at `cursor`; None for one that compiles nothing."""
        version = cursor.unsigned(2)
        if not _OLDEST <= version <= _NEWEST:
            raise cursor.bad()
        if version >= _UNIT_TYPES and cursor.unsigned(1) != _UT_COMPILE:
            return None
        if version >= _UNIT_TYPES:
            address_size, table = cursor.unsigned(1), cursor.unsigned(offset_size)
        else:
            table, address_size = cursor.unsigned(offset_size), cursor.unsigned(1)
        if address_size != 8:
            raise cursor.bad()
        entries = cursor.position
        abbreviation = self._abbreviation(table, cursor.uleb())
        if abbreviation is None:
            return None
        root = Root(version, offset_size, table, entries)
        self._read_attributes(cursor, abbreviation, root)
        return root

    def _read_attributes(self, cursor: Cursor, abbreviation: Cursor, root: "Root") -> None:
        while True:
            name, form = abbreviation.uleb(), abbreviation.uleb()
            if name == form == 0:
                break
            constant = abbreviation.sleb() if form == _FORM_IMPLICIT_CONST else 0
            value = self.value(cursor, form, constant, root)
            if name == _AT_HIGH_PC:
                # A number is a length, an address is an address.
                root.high_is_address = form == _FORM_ADDR or isinstance(value, _Indirect)
            root.values[name] = value
        # The bases of indexed values may come after them.
        for name, value in root.values.items():
            if isinstance(value, _Indirect) and value.kind == "string":
                root.values[name] = self._indexed_string(root, value.index)

    def _abbreviation(self, table: int, code: int) -> Cursor | None:
        """Find the attribute list of a unit's root; None where `code` is of no root, or 0.

        GCC numbers it last of some hundred.
        A declaration ends with two zero bytes, so the next starts behind them; reading all
        declarations before it one by one would take most of a scan's time.
        """
        key = bytearray()
        rest = code
        while rest > 0x7F:
            key.append(rest & 0x7F | 0x80)
            rest >>= 7
        key += bytes([rest, _TAG_COMPILE_UNIT])
        if self.abbreviations.startswith(bytes(key), table):
            position = table
        else:
            position = self.abbreviations.find(b"\0\0" + key, table) + 2
            if position < 2:
                return None
        what = f"{self._elf.name}: .debug_abbrev"
        return Cursor(self.abbreviations, what, position + len(key) + 1)

    def value(self, cursor: Cursor, form: int, constant: int, root: "Root") -> Any:  # noqa: ANN401 - an attribute is a number, a string or an index
        """Read the value of one attribute of a unit, whose abbreviation has the constant."""
        if form == _FORM_ADDR:
            return cursor.unsigned(8)
        if form in _FIXED:
            return cursor.unsigned(_FIXED[form])
        if form in {0x0E, 0x1F}:  # strp, line_strp
            section = ".debug_str" if form == 0x0E else ".debug_line_str"
            return self._cursor(section, cursor.unsigned(root.offset_size)).string()
        if form in {0x10, 0x17, 0x1D}:  # ref_addr, sec_offset, strp_sup
            return cursor.unsigned(root.offset_size)
        if form == 0x08:
            return cursor.string()
        if form in {0x0F, 0x15}:  # udata, ref_udata
            return cursor.uleb()
        if form == 0x0D:
            return cursor.sleb()
        if form == 0x19:
            return 1
        if form == _FORM_IMPLICIT_CONST:
            return constant
        return self._rare_value(cursor, form)

    def _rare_value(self, cursor: Cursor, form: int) -> Any:  # noqa: ANN401 - as value
        if form == 0x1A or form in _STRX:
            return _Indirect(
                "string", cursor.uleb() if form == 0x1A else cursor.unsigned(_STRX[form])
            )
        if form == 0x1B or form in _ADDRX:
            return _Indirect(
                "address", cursor.uleb() if form == 0x1B else cursor.unsigned(_ADDRX[form])
            )
        if form == 0x23:
            return _Indirect("ranges", cursor.uleb())
        if form in {0x09, 0x18}:  # block, exprloc
            cursor.skip(cursor.uleb())
        elif form in _BLOCKS:
            cursor.skip(cursor.unsigned(_BLOCKS[form]))
        elif form == 0x1E:  # data16
            cursor.skip(16)
        else:
            raise cursor.bad()
        return 0

    def text(self, root: "Root", value: Any) -> str:  # noqa: ANN401 - as value
        """Return the string that a value is, or that it is the number of."""
        return self._indexed_string(root, value.index) if isinstance(value, _Indirect) else value

    def _indexed_string(self, root: "Root", index: int) -> str:
        base = self._number(root.values.get(_AT_STR_OFFSETS_BASE, 8))
        offsets = self._cursor(".debug_str_offsets", base + index * root.offset_size)
        return self._cursor(".debug_str", offsets.unsigned(root.offset_size)).string()

    def address(self, root: "Root", value: Any) -> int:  # noqa: ANN401 - as value
        """Return the address that a value is, or that it is the number of."""
        if not isinstance(value, _Indirect):
            return self._number(value)
        base = self._number(root.values.get(_AT_ADDR_BASE, 8))
        return self._cursor(".debug_addr", base + value.index * 8).unsigned(8)

    def spans_of(self, root: "Root", value: Any) -> list[tuple[int, int]]:  # noqa: ANN401 - as value
        """Read the range list that a value of DW_AT_ranges in a unit names."""
        low = self.address(root, root.values.get(_AT_LOW_PC, 0))
        if root.version < 5:
            return self._old_spans(low, self._number(value))
        if isinstance(value, _Indirect):
            base = self._number(root.values.get(_AT_RNGLISTS_BASE, 12))
            slot = self._cursor(".debug_rnglists", base + value.index * root.offset_size)
            value = base + slot.unsigned(root.offset_size)
        return self._new_spans(root, low, self._number(value))

    def _number(self, value: Any) -> int:  # noqa: ANN401 - whatever form it came in
        """Return a value that must be a number, in whatever form the file has it."""
        if not isinstance(value, int):
            raise Cursor(b"", f"{self._elf.name}: .debug_info").bad()
        return value

    def _new_spans(self, root: "Root", low: int, offset: int) -> list[tuple[int, int]]:
        """Read a range list of DWARF 5 (2.17.3, 7.25)."""
        cursor = self._cursor(".debug_rnglists", offset)
        spans: list[tuple[int, int]] = []
        while len(spans) < _MAX_RANGES:
            kind = cursor.unsigned(1)
            if kind == _RLE_END_OF_LIST:
                return spans
            if kind in _RLE_BASES:
                low = self._bound(cursor, root, _RLE_BASES[kind], 0)
            elif kind in _RLE_SPANS:
                first, last = _RLE_SPANS[kind]
                start = self._bound(cursor, root, first, low)
                spans.append(
                    (start, self._bound(cursor, root, last, start if last == "length" else low))
                )
            else:
                raise cursor.bad()
        raise cursor.bad()

    def _bound(self, cursor: Cursor, root: "Root", how: str, base: int) -> int:
        if how == "address":
            return cursor.unsigned(8)
        if how == "index":
            return self.address(root, _Indirect("address", cursor.uleb()))
        return base + cursor.uleb()  # "offset", "length"

    def _old_spans(self, low: int, offset: int) -> list[tuple[int, int]]:
        """Read a range list of DWARF 4 and before (2.17.3)."""
        cursor = self._cursor(".debug_ranges", offset)
        spans: list[tuple[int, int]] = []
        while len(spans) < _MAX_RANGES:
            start, end = cursor.unsigned(8), cursor.unsigned(8)
            if start == end == 0:
                return spans
            if start == _MASK:
                low = end
            else:
                spans.append((low + start, low + end))
        raise cursor.bad()


@dataclass(frozen=True, slots=True)
class _Indirect:
    """An index into one of the tables of DWARF 5."""

    kind: str
    index: int


class Root:
    """The root entry of a unit, at `entries` of .debug_info; the unit is from `start` to `end`.

    `table` is where its abbreviations are, `values` are its attributes.
    """

    def __init__(self, version: int, offset_size: int, table: int, entries: int) -> None:
        self.version = version
        self.offset_size = offset_size
        self.table = table
        self.entries = entries
        self.start = self.end = 0
        self.values: dict[int, Any] = {}
        self.high_is_address = False
