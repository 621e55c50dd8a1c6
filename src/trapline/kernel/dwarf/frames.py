"""Where in the source the functions around an address were called, to the column.

A SymCache has lines; what tells two calls on one line apart, and how far a call is from the start
of its function whatever is added above it, is in the debugging information entries only:
DW_AT_call_line and DW_AT_call_column of each inlined function, DW_AT_decl_line of each function.
Only units with addresses that are asked for are read, and of those only what leads to them.

Source: DWARF 5, 2.3 (siblings), 3.3 (subroutines, DW_AT_inline), 7.5.3 (abbreviations).
"""

from bisect import bisect_left
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from trapline.base.cursor import Cursor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from trapline.kernel.dwarf.units import Root, Unit, UnitTable

_TAG_LEXICAL_BLOCK: Final = 0x0B
_TAG_INLINED_SUBROUTINE: Final = 0x1D
_TAG_SUBPROGRAM: Final = 0x2E
_CODE: Final = frozenset({_TAG_LEXICAL_BLOCK, _TAG_INLINED_SUBROUTINE, _TAG_SUBPROGRAM})
# What may hold functions: the unit itself, and namespaces and types of Rust.
_OUTER: Final = frozenset({0x11, 0x39, 0x13, 0x17, 0x04})
_AT_SIBLING: Final = 0x01
_AT_NAME: Final = 0x03
_AT_LOW_PC: Final = 0x11
_AT_HIGH_PC: Final = 0x12
_AT_INLINE: Final = 0x20
_AT_ABSTRACT_ORIGIN: Final = 0x31
_AT_DECL_LINE: Final = 0x3B
_AT_SPECIFICATION: Final = 0x47
_AT_RANGES: Final = 0x55
_AT_CALL_COLUMN: Final = 0x57
_AT_CALL_LINE: Final = 0x59
_BOUNDS: Final = frozenset({_AT_LOW_PC, _AT_HIGH_PC, _AT_RANGES})
_CALL: Final = frozenset({_AT_CALL_LINE, _AT_CALL_COLUMN})
_REFERENCES: Final = frozenset({_AT_ABSTRACT_ORIGIN, _AT_SPECIFICATION})
_NAMING: Final = _REFERENCES | {_AT_NAME, _AT_DECL_LINE, _AT_INLINE}
_INL_INLINED: Final = 1  # DW_INL_inlined: by the compiler's choice, not the programmer's
_FORM_ADDR: Final = 0x01
_FORM_REF_ADDR: Final = 0x10
_UNIT_REFERENCES: Final = frozenset({0x11, 0x12, 0x13, 0x14, 0x15})  # ref1 to ref_udata
_FORM_IMPLICIT_CONST: Final = 0x21
# Sizes in bytes of forms that always have the same; DWARF 5, table 7.6.
_SIZES: Final = {
    **dict.fromkeys((0x0B, 0x0C, 0x11, 0x25, 0x29), 1),
    **dict.fromkeys((0x05, 0x12, 0x26, 0x2A), 2),
    **dict.fromkeys((0x27, 0x2B), 3),
    **dict.fromkeys((0x06, 0x13, 0x28, 0x2C, 0x1C), 4),
    **dict.fromkeys((0x01, 0x07, 0x14, 0x20, 0x24), 8),
    0x1E: 16,
    0x19: 0,
    0x21: 0,
}
# Of the size of an offset: strp, line_strp, sec_offset, ref_addr, strp_sup, dwz's alternatives.
_OFFSETS: Final = frozenset({0x0E, 0x1F, 0x17, 0x10, 0x1D, 0x1F20, 0x1F21})
_LEBS: Final = frozenset({0x0D, 0x0F, 0x15, 0x1A, 0x1B, 0x22, 0x23})
_LEB_BLOCKS: Final = frozenset({0x09, 0x18})
_BLOCKS: Final = {0x0A: 1, 0x03: 2, 0x04: 4}
_STRING: Final = 0x08
_MAX_DEPTH: Final = 256
_MAX_ORIGINS: Final = 8  # abstract origin of an abstract origin: a clone of a clone


class SourceFrame(NamedTuple):
    """One function around an address.

    `declared` is the line its definition starts at; `chosen` whether it was inlined by the
    compiler's choice alone. `line` and `column` are where it was inlined into the next outer one,
    relative to where that is declared; None for a function that the bytes belong to. What is not
    known is None.
    """

    function: str
    declared: int | None
    chosen: bool
    line: int | None
    column: int | None


class _Declaration(NamedTuple):
    """One abbreviation: what entries of a kind look like."""

    tag: int
    has_children: bool
    attributes: tuple[tuple[int, int, int], ...]
    has_code: bool  # is a function, or a part of one, with bounds
    size: int  # -1 where it varies
    sibling: int  # where DW_AT_sibling is, in a form of 4 bytes; -1 where it cannot be told


class _Function(NamedTuple):
    name: str
    declared: int | None
    chosen: bool


_NO_FUNCTION: Final = _Function("", None, False)


class SourceFrames:
    """Reads the frames of addresses of one file, unit by unit."""

    def __init__(self, units: "UnitTable") -> None:
        self._units = units

    def of(self, addresses: "Iterable[int]") -> dict[int, tuple[SourceFrame, ...]]:
        """Return the frames of each address that is in a function of C or Rust, innermost first.

        Raises BadImageError where the entries make no sense.
        """
        wanted: dict[Unit, list[int]] = {}
        for address in sorted(set(addresses)):
            unit = self._units.unit_at(address)
            if unit is not None and not unit.is_assembly:
                wanted.setdefault(unit, []).append(address)
        found: dict[int, tuple[SourceFrame, ...]] = {}
        for unit, held in wanted.items():
            try:
                found.update(_Walk(self._units, self._units.root(unit), held).frames())
            except (IndexError, ValueError):
                raise self._units.bad() from None
        return found


class _Walk:
    """One way through the entries of one unit, past all that has none of the addresses.

    Positions are counted from the unit's header. What runs over the end is an IndexError.
    """

    def __init__(self, units: "UnitTable", root: "Root", wanted: "Sequence[int]") -> None:
        self._units = units
        self._root = root
        self._info = units.contents(root)
        self._wanted = wanted
        self._declarations = _declarations(units.abbreviations, root.table, root.offset_size)
        self._functions: dict[int, _Function] = {}
        self._found: dict[int, tuple[SourceFrame, ...]] = {}

    def frames(self) -> dict[int, tuple[SourceFrame, ...]]:
        """Walk. Deeper entries come later, and know more."""
        info = self._info
        position, end = self._root.entries - self._root.start, len(self._info)
        #: The frames that each open entry is in, outermost first.
        stack: list[tuple[SourceFrame, ...]] = []
        around: tuple[SourceFrame, ...] = ()
        while position < end:
            start = position
            if info[position] == 0:
                if not stack:
                    break
                around = stack.pop()
                position += 1
                continue
            declaration, position = self._declaration(position)
            inside: tuple[SourceFrame, ...] | None = None
            if declaration.has_code:
                inside = self._enter(declaration, position, around, start)
            elif declaration.tag in _OUTER:
                inside = around
            if inside is None and declaration.sibling >= 0:
                position = self._sibling(declaration, position)
                continue
            position = self._behind(declaration, position)
            if declaration.has_children:
                stack.append(around)
                around = around if inside is None else inside
                if len(stack) > _MAX_DEPTH:
                    raise IndexError
        return self._found

    def _declaration(self, position: int) -> tuple[_Declaration, int]:
        """Find what the entry at `position` looks like; return also where its attributes are."""
        code = self._info[position]
        position += 1
        if code > 0x7F:
            code, position = _uleb(self._info, position - 1)
        declaration = self._declarations.get(code)
        if declaration is None:
            raise IndexError
        return declaration, position

    def _sibling(self, declaration: _Declaration, position: int) -> int:
        place = position + declaration.sibling
        following = int.from_bytes(self._info[place : place + 4], "little")
        if not position < following <= len(self._info):
            raise IndexError
        return following

    def _enter(
        self,
        declaration: _Declaration,
        position: int,
        around: tuple[SourceFrame, ...],
        start: int,
    ) -> tuple[SourceFrame, ...] | None:
        """Return the frames inside of an entry of code, None where no address is in it."""
        values = self._read(declaration, position, _BOUNDS)
        held = self._held(values)
        if not held:
            return None
        if declaration.tag == _TAG_LEXICAL_BLOCK:
            return around
        function = self._function(start)
        if declaration.tag == _TAG_SUBPROGRAM or not around:
            inside: tuple[SourceFrame, ...] = (
                SourceFrame(function.name, function.declared, False, None, None),
            )
        else:
            call = self._read(declaration, position, _CALL)
            outer, line = around[-1].declared, call.get(_AT_CALL_LINE)
            relative = None if line is None or outer is None else line - outer
            column = call.get(_AT_CALL_COLUMN)
            frame = SourceFrame(function.name, function.declared, function.chosen, relative, column)
            inside = (*around, frame)
        for address in held:
            self._found[address] = inside[::-1]
        return inside

    def _held(self, values: dict[int, Any]) -> "Sequence[int]":
        """List the wanted addresses that are in an entry's ranges."""
        if _AT_RANGES in values:
            spans = self._units.spans_of(self._root, values[_AT_RANGES])
        elif _AT_LOW_PC in values and _AT_HIGH_PC in values:
            low = values[_AT_LOW_PC]
            spans = [(low, low + values[_AT_HIGH_PC])]
        else:
            return ()
        held: list[int] = []
        for start, end in spans:
            first = bisect_left(self._wanted, start)
            held.extend(self._wanted[first : bisect_left(self._wanted, end)])
        return held

    def _function(self, position: int, depth: int = 0) -> _Function:
        """Read what is said of a function, by the entry at `position` or those it refers to."""
        known = self._functions.get(position)
        if known is not None:
            return known
        if not 0 < position < len(self._info) or depth > _MAX_ORIGINS:
            return _NO_FUNCTION  # in another unit or file: LTO, dwz
        declaration, behind = self._declaration(position)
        values = self._read(declaration, behind, _NAMING)
        reference = values.get(_AT_ABSTRACT_ORIGIN, values.get(_AT_SPECIFICATION))
        origin = _NO_FUNCTION if reference is None else self._function(reference, depth + 1)
        function = _Function(
            values.get(_AT_NAME) or origin.name,
            values.get(_AT_DECL_LINE, origin.declared),
            values.get(_AT_INLINE) == _INL_INLINED or origin.chosen,
        )
        self._functions[position] = function
        return function

    def _read(
        self, declaration: _Declaration, position: int, names: frozenset[int]
    ) -> dict[int, Any]:
        """Read those attributes of an entry that have one of the names."""
        values: dict[int, Any] = {}
        info, root = self._info, self._root
        for name, form, constant in declaration.attributes:
            if name not in names:
                position = _skip(info, position, form, root.offset_size)
                continue
            cursor = Cursor(info, ".debug_info", position)
            value = self._units.value(cursor, form, constant, root)
            position = cursor.position
            if name in _REFERENCES and form not in _UNIT_REFERENCES:
                # From the start of the section; or in another file, which is nowhere here.
                value = value - root.start if form == _FORM_REF_ADDR else -1
            if name == _AT_NAME:
                value = self._units.text(root, value)
            elif name in {_AT_LOW_PC, _AT_HIGH_PC}:
                is_address = form == _FORM_ADDR or not isinstance(value, int)
                value = self._units.address(root, value)
                if name == _AT_HIGH_PC and is_address:
                    value -= values.get(_AT_LOW_PC, 0)
            values[name] = value
        return values

    def _behind(self, declaration: _Declaration, position: int) -> int:
        if declaration.size >= 0:
            return position + declaration.size
        for _, form, _ in declaration.attributes:
            position = _skip(self._info, position, form, self._root.offset_size)
        return position


def _uleb(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError


def _skip(info: bytes, position: int, form: int, offset_size: int) -> int:
    """Return where the next attribute is."""
    size = _SIZES.get(form)
    if size is not None:
        return position + size
    if form in _OFFSETS:
        return position + offset_size
    if form in _LEBS:
        while info[position] > 0x7F:
            position += 1
        return position + 1
    if form in _LEB_BLOCKS:
        length, position = _uleb(info, position)
        return position + length
    if form in _BLOCKS:
        width = _BLOCKS[form]
        return position + width + int.from_bytes(info[position : position + width], "little")
    if form == _STRING:
        return info.index(b"\0", position) + 1
    raise IndexError


def _declarations(data: bytes, position: int, offset_size: int) -> dict[int, _Declaration]:
    """Read one table of abbreviations."""
    found: dict[int, _Declaration] = {}
    while True:
        code, position = _uleb(data, position)
        if code == 0:
            return found
        tag, position = _uleb(data, position)
        has_children = data[position] != 0
        position += 1
        attributes = []
        size = 0
        sibling = -1
        while True:
            name, position = _uleb(data, position)
            form, position = _uleb(data, position)
            constant = 0
            if form == _FORM_IMPLICIT_CONST:
                constant, position = _sleb(data, position)
            if name == form == 0:
                break
            if name == _AT_SIBLING and form == 0x13 and size >= 0:
                sibling = size
            width = _SIZES.get(form, offset_size if form in _OFFSETS else -1)
            size = size + width if size >= 0 and width >= 0 else -1
            attributes.append((name, form, constant))
        has_code = tag in _CODE and any(name in _BOUNDS for name, _, _ in attributes)
        found[code] = _Declaration(
            tag, has_children, tuple(attributes), has_code, size, sibling if has_children else -1
        )


def _sleb(data: bytes, position: int) -> tuple[int, int]:
    start = position
    value, position = _uleb(data, position)
    bits = 7 * (position - start)
    return (value - (1 << bits) if value >> (bits - 1) else value), position
