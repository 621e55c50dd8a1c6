"""Source lines of code that SymCache does not have: runs one unit's line program.

That is assembly code, and the few functions of C that symbolic passes over.

Source: DWARF 5, 6.2 (line number information); DWARF 2 to 4 likewise, with their older header.
"""

import bisect
import posixpath
from typing import TYPE_CHECKING, Final, NamedTuple

from trapline.base.cursor import Cursor

if TYPE_CHECKING:
    from trapline.kernel.elf.file import ElfFile

_MAX_ROWS: Final = 1_000_000
_MAX_FILES: Final = 100_000
_PATH: Final = 1  # DW_LNCT_path
_DIRECTORY: Final = 2  # DW_LNCT_directory_index
_FORM_SIZES: Final = {0x0B: 1, 0x05: 2, 0x06: 4, 0x07: 8, 0x1E: 16}


class SourceLine(NamedTuple):
    """A place in a source file; `folder` may be empty or relative to the compilation folder."""

    folder: str
    file: str
    line: int


class LineTable:
    """The rows of one line program, by address."""

    def __init__(self, elf: "ElfFile", offset: int) -> None:
        """Run the program at `offset` in .debug_line."""
        self._elf = elf
        self._folders: list[str] = [""]
        self._files: list[tuple[str, int]] = []
        self._first_file = 1
        rows = self._run(self._cursor(".debug_line", offset))
        # Sequences are sorted in themselves; a row (None) ends each.
        rows.sort(key=lambda row: (row[0], row[1] is not None))
        self._starts = [row[0] for row in rows]
        self._rows = rows

    def at(self, address: int) -> SourceLine | None:
        """Return the source line of an address, or None outside of the unit's code."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        _, file, line = self._rows[index]
        if file is None:
            return None
        index = file - self._first_file
        if not 0 <= index < len(self._files):
            return None
        name, folder = self._files[index]
        return SourceLine(self._folders[folder] if folder < len(self._folders) else "", name, line)

    def at_in(self, address: int, start: int, unit: str) -> SourceLine | None:
        """Return the line, in the unit's own source, that code from `start` on is at by `address`.

        For functions with others inlined into them: the last row of the unit's own file is that
        of the call. Without one it is the line of whatever is inlined.
        """
        name = posixpath.basename(unit)
        index = bisect.bisect_right(self._starts, address) - 1
        while index >= 0 and self._starts[index] >= start:
            place = self.at(self._starts[index])
            if place is not None and posixpath.basename(place.file) == name:
                return place
            index -= 1
        return self.at(address)

    def _cursor(self, section: str, position: int, end: int | None = None) -> Cursor:
        return Cursor(self._elf.contents(section), f"{self._elf.name}: {section}", position, end)

    def _run(self, cursor: Cursor) -> list[tuple[int, int | None, int]]:
        length, size = cursor.unsigned(4), 4
        if length == 0xFFFFFFFF:
            length, size = cursor.unsigned(8), 8
        cursor = self._cursor(".debug_line", cursor.position, cursor.position + length)
        version = cursor.unsigned(2)
        if not 2 <= version <= 5:
            raise cursor.bad()
        if version >= 5:
            cursor.skip(2)  # address size, segment selector size
        header_length = cursor.unsigned(size)
        program = cursor.position + header_length
        minimum = cursor.unsigned(1)
        if version >= 4:
            cursor.skip(1)  # operations per instruction: 1 but for VLIW
        cursor.skip(1)  # default_is_stmt
        line_base, line_range, opcode_base = (
            cursor.signed(1),
            cursor.unsigned(1),
            cursor.unsigned(1),
        )
        if not line_range or not opcode_base:
            raise cursor.bad()
        lengths = [cursor.unsigned(1) for _ in range(opcode_base - 1)]
        if version >= 5:
            self._first_file = 0
            self._folders = [path for path, _ in self._entries(cursor, size)]
            self._files = self._entries(cursor, size)
        else:
            self._old_names(cursor)
        cursor = self._cursor(".debug_line", program, cursor.end)
        header = _Header(minimum, line_base, line_range, opcode_base, lengths)
        machine = _Machine(cursor, header, self)
        machine.run()
        return machine.rows

    def _entries(self, cursor: Cursor, size: int) -> list[tuple[str, int]]:
        """Read the folder or file names of a DWARF 5 header."""
        formats = [(cursor.uleb(), cursor.uleb()) for _ in range(cursor.unsigned(1))]
        count = cursor.uleb()
        if count > _MAX_FILES:
            raise cursor.bad()
        entries = []
        for _ in range(count):
            path, folder = "", 0
            for content, form in formats:
                if content == _PATH:
                    path = self._text(cursor, form, size)
                else:
                    number = self._number(cursor, form)
                    folder = number if content == _DIRECTORY else folder
            entries.append((path, folder))
        return entries

    def _text(self, cursor: Cursor, form: int, size: int) -> str:
        if form == 0x08:
            return cursor.string()
        if form in {0x0E, 0x1F}:
            section = ".debug_str" if form == 0x0E else ".debug_line_str"
            return self._cursor(section, cursor.unsigned(size)).string()
        raise cursor.bad()

    @staticmethod
    def _number(cursor: Cursor, form: int) -> int:
        if form == 0x0F:
            return cursor.uleb()
        if form in _FORM_SIZES:
            return cursor.unsigned(_FORM_SIZES[form])
        raise cursor.bad()

    def _old_names(self, cursor: Cursor) -> None:
        while name := cursor.string():
            self._folders.append(name)
        while name := cursor.string():
            self.add_file(name, cursor)

    def add_file(self, name: str, cursor: Cursor) -> None:
        """Add a file whose folder, time and length follow (DWARF 2 to 4)."""
        if len(self._files) >= _MAX_FILES:
            raise cursor.bad()
        self._files.append((name, cursor.uleb()))
        cursor.uleb()
        cursor.uleb()


class _Header(NamedTuple):
    """What the program's opcodes depend on."""

    minimum: int  # length of an instruction
    line_base: int
    line_range: int
    opcode_base: int
    lengths: list[int]  # number of arguments of each standard opcode


class _Machine:
    """The state machine that line programs drive; `rows` are (address, file, line).

    The file of a row is None where a sequence ends.
    """

    def __init__(self, cursor: Cursor, header: _Header, table: LineTable) -> None:
        self.rows: list[tuple[int, int | None, int]] = []
        self._cursor = cursor
        self._header = header
        self._table = table
        self._address, self._file, self._line = 0, 1, 1
        self._standard = {
            1: self._append,  # copy
            2: self._advance_pc,
            3: self._advance_line,
            4: self._set_file,
            8: self._const_add_pc,
            9: self._fixed_advance_pc,
        }

    def run(self) -> None:
        """Execute the whole program."""
        cursor, header = self._cursor, self._header
        while cursor.position < cursor.end:
            if len(self.rows) > _MAX_ROWS:
                raise cursor.bad()
            opcode = cursor.unsigned(1)
            if opcode >= header.opcode_base:
                self._special(opcode)
            elif opcode == 0:
                self._extended()
            elif opcode in self._standard:
                self._standard[opcode]()
            else:
                for _ in range(header.lengths[opcode - 1]):
                    cursor.uleb()

    def _append(self) -> None:
        self.rows.append((self._address, self._file, self._line))

    def _special(self, opcode: int) -> None:
        advance, step = divmod(opcode - self._header.opcode_base, self._header.line_range)
        self._address += advance * self._header.minimum
        self._line += self._header.line_base + step
        self._append()

    def _extended(self) -> None:
        cursor = self._cursor
        length = cursor.uleb()
        end = cursor.position + length
        opcode = cursor.unsigned(1) if length else 0
        if opcode == 1:  # end_sequence
            self.rows.append((self._address, None, 0))
            self._address, self._file, self._line = 0, 1, 1
        elif opcode == 2:  # set_address
            self._address = cursor.unsigned(8)
        elif opcode == 3:  # define_file
            self._table.add_file(cursor.string(), cursor)
        cursor.skip(end - cursor.position)

    def _advance_pc(self) -> None:
        self._address += self._cursor.uleb() * self._header.minimum

    def _advance_line(self) -> None:
        self._line += self._cursor.sleb()

    def _set_file(self) -> None:
        self._file = self._cursor.uleb()

    def _const_add_pc(self) -> None:
        steps = (255 - self._header.opcode_base) // self._header.line_range
        self._address += steps * self._header.minimum

    def _fixed_advance_pc(self) -> None:
        self._address += self._cursor.unsigned(2)
