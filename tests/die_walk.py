"""Finds MMIO instructions along another path than the scan's, to hold the scan against.

Every entry of .debug_info is visited by a loop that numba compiles; names, ranges and instructions
are looked at afterwards. Nothing of trapline is used: pyelftools reads the file, GNU ld links
modules, and the rules for instructions are written down here once more.
"""

import re
import subprocess
from pathlib import Path

import numba
import numpy as np
from elftools.elf.elffile import ELFFile
from iced_x86 import Decoder, MemorySizeExt, Mnemonic, OpKind, Register

SIMPLE = re.compile(r"(?:__raw_|__)?(read|write)([bwlq])")
SIZES = {"b": 1, "w": 2, "l": 4, "q": 8}
STRINGS = {
    *("string_memcpy_fromio", "string_memcpy_toio", "memcpy_fromio", "memcpy_toio"),
    *("memset_io", "rep_movs", "__iowrite32_copy"),
}
WIDE = {"movdir64b", "movdir64b_io", "iosubmit_cmds512", "enqcmds", "__enqcmds"}
_INLINED, _SUBPROGRAM, _UNIT = 0x1D, 0x2E, 0x11
_SECTIONS = (
    *(".debug_info", ".debug_abbrev", ".debug_str", ".debug_line_str"),
    *(".debug_rnglists", ".debug_ranges"),
)
# Columns of a row: tag, own offset, origin, name (offset in .debug_str, or -1 - offset of a
# string in .debug_info), low, high, ranges, base address of the unit, version.
_COLUMNS = 9


@numba.njit(cache=True)
def _number(data, at, size):
    value = np.uint64(0)
    for byte in range(size):
        value |= np.uint64(data[at + byte]) << np.uint64(8 * byte)
    return np.int64(value)


@numba.njit(cache=True)
def _leb(data, at):
    value = np.uint64(0)
    shift = np.uint64(0)
    while True:
        byte = data[at]
        at += 1
        value |= np.uint64(byte & 0x7F) << shift
        if byte < 0x80:
            return np.int64(value), at
        shift += np.uint64(7)


@numba.njit(cache=True)
def _abbreviations(data, at, tables):
    tags, first, names, forms = tables
    count = 0
    while True:
        code, at = _leb(data, at)
        if code == 0:
            return
        tags[code], at = _leb(data, at)
        at += 1  # whether it has children
        first[code] = count
        while True:
            names[count], at = _leb(data, at)
            forms[count], at = _leb(data, at)
            if forms[count] == 0x21:  # the value stands here; none that matters does
                _, at = _leb(data, at)
            count += 1
            if names[count - 1] == 0 and forms[count - 1] == 0:
                break


def _sizes():
    """How many bytes an attribute takes, by form (DWARF 5, table 7.6); -1 where it varies."""
    sizes = np.full(0x30, -1, np.int64)
    by_size = {
        0: (0x19, 0x21),
        1: (0x0B, 0x0C, 0x11),
        2: (0x05, 0x12),
        4: (0x06, 0x0E, 0x10, 0x13, 0x17, 0x1F),
        8: (0x01, 0x07, 0x14, 0x20),
        16: (0x1E,),
    }
    for size, forms in by_size.items():
        sizes[list(forms)] = size
    return sizes


def _counts():
    """How many bytes the count before a block takes, by form; 0 for a LEB128."""
    counts = np.full(0x30, -1, np.int64)
    for count, forms in {0: (0x18, 0x09), 1: (0x0A,), 2: (0x03,), 4: (0x04,)}.items():
        counts[list(forms)] = count
    return counts


_SIZE_OF = _sizes()
_COUNT_OF = _counts()


@numba.njit(cache=True)
def _value(data, at, form):
    """Return the value of an attribute and where the next one is, -1 for an unknown form."""
    size = _SIZE_OF[form]
    if size >= 0:
        return _number(data, at, min(size, 8)), at + size
    if form == 0x0D or form == 0x0F or form == 0x15:  # noqa: PLR1714 - numba has no sets here
        return _leb(data, at)
    if form == 0x08:
        start = at
        while data[at] != 0:
            at += 1
        return np.int64(start), at + 1
    size = _COUNT_OF[form]
    if size > 0:
        return np.int64(0), at + size + _number(data, at, size)
    if size == 0:
        size, at = _leb(data, at)
        return np.int64(0), at + size
    return np.int64(-1), np.int64(-1)


@numba.njit(cache=True)
def _entry(data, at, unit, names, forms, index, row):
    """Read the attributes of one entry into `row`; returns where the next entry is."""
    high_is_length = False
    while names[index] != 0 or forms[index] != 0:
        form = forms[index]
        value, at = _value(data, at, form)
        if at < 0:
            return -form
        name = names[index]
        index += 1
        if name == 0x11:
            row[4] = value
        elif name == 0x12:
            row[5] = value
            high_is_length = form != 0x01
        elif name == 0x55:
            row[6] = value
        elif name == 0x31 or (name == 0x47 and row[2] < 0):
            row[2] = value if form == 0x10 else value + unit
        elif name == 0x03:
            row[3] = -2 - value if form == 0x08 else value
    if high_is_length:
        row[5] += row[4]
    return at


@numba.njit(cache=True)
def _unit(data, at, end, unit, version, tables, rows, count):
    """Visit all entries of one unit; returns the number of rows, -form if one is unknown."""
    tags, first, names, forms = tables
    base = np.int64(0)
    while at < end:
        entry = at
        code, at = _leb(data, at)
        if code == 0:
            continue
        row = rows[count]
        row[:] = -1
        at = _entry(data, at, unit, names, forms, first[code], row)
        if at < 0:
            return at
        tag = tags[code]
        if tag == _UNIT:
            base = row[4] if row[4] != -1 else np.int64(0)
        elif tag == _INLINED or tag == _SUBPROGRAM:  # noqa: PLR1714, SIM109 - as above
            row[0] = tag
            row[1] = entry
            row[7] = base
            row[8] = version
            count += 1
    return count


@numba.njit(cache=True)
def _walk(data, abbreviations, rows):
    """Fill `rows` with functions and inlined instances; returns their number, or as _unit."""
    tables = (
        np.zeros(1 << 16, np.int64),
        np.zeros(1 << 16, np.int64),
        np.zeros(1 << 20, np.int64),
        np.zeros(1 << 20, np.int64),
    )
    at = 0
    count = 0
    while at < len(data) and count >= 0:
        unit = at
        end = at + 4 + _number(data, at, 4)
        version = _number(data, at + 4, 2)
        header = 12 if version >= 5 else 11
        _abbreviations(abbreviations, _number(data, at + (8 if version >= 5 else 6), 4), tables)
        count = _unit(data, at + header, end, unit, version, tables, rows, count)
        at = end
    return count


def _text(section, offset):
    stop = section.index(b"\0", offset)
    return section[offset:stop].decode()


class Walk:
    """The functions of one file, each with its name and its address ranges."""

    def __init__(self, path):
        with Path(path).open("rb") as file:
            elf = ELFFile(file)
            found = {name: elf.get_section_by_name(name) for name in _SECTIONS}
            self._data = {name: s.data() if s else b"" for name, s in found.items()}
            self.code = [
                (section.name, section["sh_addr"], section.data())
                for section in elf.iter_sections()
                if section["sh_flags"] & 4 and section["sh_type"] == "SHT_PROGBITS"
            ]
        info = np.frombuffer(self._data[".debug_info"], np.uint8)
        rows = np.empty((max(len(info) // 40, 100), _COLUMNS), np.int64)
        count = _walk(info, np.frombuffer(self._data[".debug_abbrev"], np.uint8), rows)
        assert count >= 0, f"unknown form {-count:#x}"
        self._rows = rows[:count]
        functions = self._rows[self._rows[:, 0] == _SUBPROGRAM]
        self._by_offset = {offset: i for i, offset in enumerate(functions[:, 1].tolist())}
        self._functions = functions

    def pieces(self, wanted):
        """Yield (start, end, name) of each range of functions that `wanted` says yes to."""
        names = {}
        for origin in np.unique(self._rows[:, 2]).tolist():
            name = self._name(origin)
            if name is not None and wanted(name):
                names[origin] = name
        for row in self._rows[np.isin(self._rows[:, 2], list(names))].tolist():
            yield from ((start, end, names[row[2]]) for start, end in self._ranges(row))
        own = self._functions[(self._functions[:, 4] != -1) | (self._functions[:, 6] != -1)]
        for row in own.tolist():
            name = self._own_name(row)
            if name is not None and wanted(name):
                yield from ((start, end, name) for start, end in self._ranges(row))

    def _name(self, offset):
        for _ in range(8):
            index = self._by_offset.get(offset)
            if index is None:
                return None
            row = self._functions[index].tolist()
            if (name := self._own_name(row)) is not None:
                return name
            offset = row[2]
        return None

    def _own_name(self, row):
        if row[3] == -1:
            return None
        if row[3] < -1:
            return _text(self._data[".debug_info"], -2 - row[3])
        return _text(self._data[".debug_str"], row[3])

    def _ranges(self, row):
        if row[6] == -1:
            if row[4] != -1 and row[5] > row[4]:
                yield row[4] % (1 << 64), row[5] % (1 << 64)
            return
        base = row[7]
        for kind, first, second in self._list(row[6], row[8]):
            if kind == "base":
                base = first
            elif kind == "offsets":
                yield (base + first) % (1 << 64), (base + second) % (1 << 64)
            else:
                yield first, second

    def _list(self, at, version):
        if version < 5:
            data = self._data[".debug_ranges"]
            while True:
                first, second = (
                    int.from_bytes(data[at + i : at + i + 8], "little") for i in (0, 8)
                )
                at += 16
                if first == second == 0:
                    return
                yield ("base", second, 0) if first == (1 << 64) - 1 else ("offsets", first, second)
        data = np.frombuffer(self._data[".debug_rnglists"], np.uint8)
        while (kind := int(data[at])) != 0:
            at += 1
            if kind == 4:
                first, at = _leb(data, at)
                second, at = _leb(data, at)
                yield "offsets", first, second
                continue
            first = int(_number(data, at, 8)) % (1 << 64)
            at += 8
            if kind == 5:
                yield "base", first, 0
            elif kind == 6:
                yield "span", first, int(_number(data, at, 8)) % (1 << 64)
                at += 8
            else:
                assert kind == 7, kind
                size, at = _leb(data, at)
                yield "span", first, first + size


def mmio_instructions(walk):
    """Return {(section, offset in it)} of the MMIO instructions of a walk."""
    found = set()

    def wanted(name):
        return SIMPLE.fullmatch(name) or name in STRINGS | WIDE | {"native_apic_mem_write"}

    for start, end, name in walk.pieces(wanted):
        for section, address, code in walk.code:
            if address <= start < address + len(code):
                window = code[start - address : end - address + 15]
                for instruction in Decoder(64, window, ip=start):
                    if instruction.ip < end and _is_access(instruction, name):
                        found.add((section, instruction.ip - address))
    return found


def _is_access(instruction, name):
    if name in STRINGS:
        return instruction.is_string_instruction
    if name in WIDE:
        return instruction.mnemonic in {Mnemonic.MOVDIR64B, Mnemonic.ENQCMDS, Mnemonic.ENQCMD}
    match = SIMPLE.fullmatch(name)
    reads = match is not None and match[1] == "read"
    size = SIZES[match[2]] if match else 4
    kinds = (OpKind.REGISTER, OpKind.MEMORY) if reads else (OpKind.MEMORY,)
    operands = tuple(instruction.op_kind(i) for i in range(instruction.op_count))
    return (
        instruction.mnemonic in ({Mnemonic.MOV} if reads else {Mnemonic.MOV, Mnemonic.XCHG})
        and operands[: len(kinds)] == kinds
        and MemorySizeExt.size(instruction.memory_size) == size
        and instruction.memory_base != Register.RSP
    )


def link_module(path, folder):
    """Link a module with GNU ld, so that its DWARF has addresses; returns the file."""
    target = Path(folder, "linked")
    script = Path(folder, "script")
    # Sections keep their names and their order; each starts where no other is.
    script.write_text("SECTIONS { . = 0xffffffffc0000000; }")
    command = ["ld", "-T", script, "-e", "0", "--unresolved-symbols=ignore-all", "--no-relax"]
    command += ["--no-warn-mismatch", "--noinhibit-exec", "-o", target, path]
    subprocess.run(command, check=True, capture_output=True)
    return target
