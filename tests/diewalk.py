"""Finds the MMIO instructions of a kernel a second way, to check `trapline scan` against.

It walks every debugging information entry of .debug_info (compiled with numba, as there are some
18 million in a vmlinux) for inlined and out-of-line instances of the accessors, and decodes what
lies in their ranges. With the product it shares iced-x86 and nothing else: not the reader of ELF,
of DWARF, of relocations, nor the list of accessors.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
from elftools.elf.elffile import ELFFile
from iced_x86 import Decoder, MemorySizeExt, Mnemonic, OpKind, Register

READ = re.compile(r"(?:__|__raw_|mmio_config_)?read([bwlq])")
WRITE = re.compile(r"(?:__|__raw_|mmio_config_)?write([bwlq])")
APIC_WRITE = "native_apic_mem_write"
COPIES = re.compile(r"(string_)?memcpy_(to|from)io|memset_io|rep_movs|__iowrite32_copy")
WIDE = re.compile(r"movdir64b_io|enqcmds|iosubmit_cmds512|__memcpy_ntdq[au]")
WIDTHS = {"b": 1, "w": 2, "l": 4, "q": 8}
_STORES = {Mnemonic.MOVDIR64B, Mnemonic.ENQCMD, Mnemonic.ENQCMDS}
_WIDE_MNEMONICS = _STORES | {Mnemonic.MOVNTDQA}
_FRAME_POINTER = b"\x48\x89\xe5"  # mov %rsp,%rbp
_PROLOGUE = 80

TAG_INLINED, TAG_SUBPROGRAM = 0x1D, 0x2E
# Columns of what `walk` gives.
TAG, DIE, ORIGIN, LOW, HIGH, RANGES, NAME, NAME_FORM, BASE = range(9)
_NONE = -1
_MASK = (1 << 64) - 1  # kernel addresses are negative in an int64


class Mmio(NamedTuple):
    """One instruction: its section, and its address (vmlinux) or offset in there (module)."""

    section: str
    address: int
    accessor: str


@numba.njit(cache=True)
def _uleb(data, at):
    result = np.uint64(0)
    shift = np.uint64(0)
    while True:
        byte = data[at]
        at += 1
        result |= np.uint64(byte & 0x7F) << shift
        if byte < 0x80:
            return np.int64(result), at
        shift += np.uint64(7)


@numba.njit(cache=True)
def _word(data, at, size):
    result = np.uint64(0)
    for i in range(size):
        result |= np.uint64(data[at + i]) << np.uint64(8 * i)
    return np.int64(result)


@numba.njit(cache=True)
def _abbreviations(data, at, tags, children, first, names, forms, implicit):
    """Read one table; row numbers of `names` and `forms` are in `first`, by code."""
    row = 0
    while True:
        code, at = _uleb(data, at)
        if code == 0:
            return
        tags[code], at = _uleb(data, at)
        children[code] = data[at]
        at += 1
        first[code] = row
        while True:
            names[row], at = _uleb(data, at)
            forms[row], at = _uleb(data, at)
            if forms[row] == 0x21:  # DW_FORM_implicit_const
                implicit[row] = at  # its value is never one of those looked for
                while data[at] >= 0x80:
                    at += 1
                at += 1
            row += 1
            if names[row - 1] == 0 and forms[row - 1] == 0:
                break


@numba.njit(cache=True)
def _value(data, at, form, address_size):  # noqa: C901, PLR0912 - one branch for each kind of form
    """Return (value, where the next attribute is); -1 behind an unknown form."""
    if form in (0x0B, 0x11, 0x0C, 0x25, 0x29):
        return np.int64(data[at]), at + 1
    if form in (0x05, 0x12, 0x26, 0x2A):
        return _word(data, at, 2), at + 2
    if form in (0x06, 0x13, 0x28, 0x2C, 0x0E, 0x1F, 0x17, 0x10, 0x1D, 0x1C):
        return _word(data, at, 4), at + 4
    if form in (0x07, 0x14, 0x20):
        return _word(data, at, 8), at + 8
    if form == 0x01:
        return _word(data, at, address_size), at + address_size
    if form in (0x27, 0x2B):
        return _word(data, at, 3), at + 3
    if form == 0x1E:
        return np.int64(0), at + 16
    if form == 0x08:
        start = at
        while data[at] != 0:
            at += 1
        return np.int64(start), at + 1
    if form in (0x19, 0x21):
        return np.int64(1), at
    if form in (0x0F, 0x15, 0x1A, 0x1B, 0x22, 0x23, 0x0D):
        return _uleb(data, at)  # DW_FORM_sdata too: only its length matters
    if form in (0x18, 0x09):
        size, at = _uleb(data, at)
        return np.int64(0), at + size
    if form == 0x0A:
        return np.int64(0), at + 1 + np.int64(data[at])
    if form == 0x03:
        return np.int64(0), at + 2 + _word(data, at, 2)
    if form == 0x04:
        return np.int64(0), at + 4 + _word(data, at, 4)
    return np.int64(0), np.int64(-1)


@numba.njit(cache=True)
def _walk(info, abbrev, out):  # noqa: C901, PLR0912, PLR0915 - calls cost time in the inner loop
    """Store each subprogram and inlined instance; returns how many there are, or -offset."""
    tags = np.zeros(1 << 16, np.int64)
    children = np.zeros(1 << 16, np.uint8)
    first = np.zeros(1 << 16, np.int64)
    names = np.zeros(1 << 20, np.int64)
    forms = np.zeros(1 << 20, np.int64)
    implicit = np.zeros(1 << 20, np.int64)
    count = 0
    unit = 0
    while unit < len(info):
        end = unit + 4 + _word(info, unit, 4)
        version = _word(info, unit + 4, 2)
        if version >= 5:
            address_size, table, at = np.int64(info[unit + 7]), _word(info, unit + 8, 4), unit + 12
            if info[unit + 6] != 1:  # no type or split units in a kernel
                return -unit
        else:
            address_size, table, at = np.int64(info[unit + 10]), _word(info, unit + 6, 4), unit + 11
        _abbreviations(abbrev, table, tags, children, first, names, forms, implicit)
        base = np.int64(0)
        while at < end:
            die = at
            code, at = _uleb(info, at)
            if code == 0:
                continue
            tag = tags[code]
            origin, low, high, ranges, name, name_form, relative = -1, -1, -1, -1, -1, 0, False
            row = first[code]
            while names[row] != 0 or forms[row] != 0:
                form = forms[row]
                value, at = _value(info, at, form, address_size)
                if at < 0:
                    return -die
                attribute = names[row]
                row += 1
                if attribute == 0x11:
                    low = value
                elif attribute == 0x12:
                    high, relative = value, form != 0x01
                elif attribute == 0x55:
                    ranges = value
                elif attribute == 0x03:
                    name, name_form = value, form
                elif attribute in (0x31, 0x47):  # abstract origin, specification
                    origin = value + unit if form in (0x11, 0x12, 0x13, 0x14, 0x15) else value
            if tag == 0x11 and low != -1:
                base = low
            if tag in (0x1D, 0x2E):
                if count < len(out):
                    out[count, 0] = tag
                    out[count, 1] = die
                    out[count, 2] = origin
                    out[count, 3] = low
                    out[count, 4] = high + low if relative else high
                    out[count, 5] = ranges
                    out[count, 6] = name
                    out[count, 7] = name_form
                    out[count, 8] = base
                count += 1
        unit = end
    return count


class _Image:
    """One vmlinux or .ko: DWARF and code at addresses; a module's sections are spread out."""

    STRIDE = 1 << 32

    def __init__(self, path, debug=None):
        with Path(path).open("rb") as code_file, Path(debug or path).open("rb") as debug_file:
            code, dwarf = ELFFile(code_file), ELFFile(debug_file)
            self.module = code["e_type"] == "ET_REL"
            self.texts = {}
            for index, section in enumerate(code.iter_sections()):
                header = section.header
                if header["sh_flags"] & 4 and header["sh_type"] == "SHT_PROGBITS":
                    start = index * self.STRIDE if self.module else header["sh_addr"]
                    self.texts[start] = (section.name, section.data())
            indices = {s.name: i for i, s in enumerate(code.iter_sections())}
            names = ("info", "abbrev", "str", "line", "line_str", "rnglists", "ranges")
            self.debug = {name: self._section(dwarf, f".debug_{name}", indices) for name in names}

    def _section(self, elf, name, indices):
        section = elf.get_section_by_name(name)
        if section is None or section["sh_type"] == "SHT_NOBITS":
            return np.zeros(0, np.uint8)
        data = np.frombuffer(section.data(), np.uint8).copy()
        relocations = elf.get_section_by_name(".rela" + name)
        if self.module and relocations is not None:
            self._relocate(elf, data, relocations, indices)
        return data

    def _relocate(self, elf, data, relocations, indices):
        """Apply R_X86_64_64 and R_X86_64_32: the only ones in what is read here."""
        table = np.frombuffer(
            relocations.data(), [("at", "<u8"), ("type", "<u4"), ("symbol", "<u4"), ("add", "<i8")]
        )
        symtab = elf.get_section(relocations["sh_link"])
        symbols = np.frombuffer(
            symtab.data(),
            [("n", "<u4"), ("i", "u1"), ("o", "u1"), ("x", "<u2"), ("v", "<u8"), ("s", "<u8")],
        )
        bases = np.zeros(1 << 16, np.int64)
        for number, section in enumerate(elf.iter_sections()):
            if section["sh_flags"] & 2:
                bases[number] = indices.get(section.name, 0) * self.STRIDE
        symbol = symbols[table["symbol"]]
        values = bases[symbol["x"]] + symbol["v"].astype(np.int64) + table["add"]
        for kind, width in ((1, 8), (10, 4)):
            chosen = table["type"] == kind
            raw = values[chosen].astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width]
            places = table["at"][chosen].astype(np.int64)[:, None] + np.arange(width)
            data[places] = raw

    def text_at(self, address):
        """Return (start, name, data) of the code section that holds an address, or None."""
        for start, (name, data) in self.texts.items():
            if start <= address < start + len(data):
                return start, name, data
        return None


class _Functions:
    """The subprograms and inlined instances of an image."""

    def __init__(self, image):
        info, abbrev = image.debug["info"], image.debug["abbrev"]
        count = _walk(info, abbrev, np.zeros((0, 9), np.int64))
        assert count >= 0, f"unknown form near {-count:#x}"
        self.rows = np.zeros((count, 9), np.int64)
        _walk(info, abbrev, self.rows)
        self._image = image
        forms = {0x0E: "str", 0x1F: "line_str", 0x08: "info"}
        self._strings = {form: image.debug[name].tobytes() for form, name in forms.items()}
        self._by_die = {die: row for row, die in enumerate(self.rows[:, DIE].tolist())}
        self._names = {}

    def name(self, row):
        """Name a row, following abstract origins."""
        if row not in self._names:
            fields = self.rows[row].tolist()
            if fields[NAME] != _NONE:
                strings, at = self._strings[fields[NAME_FORM]], fields[NAME]
                self._names[row] = strings[at : strings.index(b"\0", at)].decode()
            else:
                origin = self._by_die.get(fields[ORIGIN])
                self._names[row] = None if origin is None else self.name(origin)
        return self._names[row]

    def instances(self, wanted):
        """Yield (name, ranges) of each instance, inlined or not, of functions of wanted names."""
        rows = self.rows
        abstract = {
            int(rows[row, DIE]): name
            for row in np.flatnonzero(rows[:, TAG] == TAG_SUBPROGRAM).tolist()
            if (name := self.name(row)) is not None and wanted(name)
        }
        for _, name, ranges in self.placed(abstract):
            yield name, ranges

    def placed(self, dies):
        """Yield (DIE, name, ranges) of each instance of the functions that `dies` describe."""
        rows = self.rows
        wanted = np.array(sorted(dies), np.int64)
        placed = (rows[:, LOW] != _NONE) | (rows[:, RANGES] != _NONE)
        chosen = placed & (np.isin(rows[:, ORIGIN], wanted) | np.isin(rows[:, DIE], wanted))
        for row in np.flatnonzero(chosen).tolist():
            fields = rows[row].tolist()
            die = fields[ORIGIN] if fields[ORIGIN] in dies else fields[DIE]
            ranges = [(start & _MASK, end & _MASK) for start, end in self.ranges(fields)]
            yield die, self.name(row), ranges

    def ranges(self, fields):
        """Return [(start, end)] of one instance."""
        if fields[RANGES] == _NONE:
            return [(fields[LOW], fields[HIGH])]
        if len(self._image.debug["rnglists"]):
            return list(self._range_list(fields[RANGES], fields[BASE]))
        return list(self._old_ranges(fields[RANGES], fields[BASE]))

    def _range_list(self, at, base):
        data = self._image.debug["rnglists"]
        while True:
            kind = int(data[at])
            at += 1
            if kind == 0:
                return
            if kind == 5:
                base, at = int(_word(data, at, 8)), at + 8
            elif kind == 4:
                first, at = _uleb(data, at)
                second, at = _uleb(data, at)
                yield base + int(first), base + int(second)
            elif kind == 6:
                yield int(_word(data, at, 8)), int(_word(data, at + 8, 8))
                at += 16
            elif kind == 7:
                start, at = int(_word(data, at, 8)), at + 8
                length, at = _uleb(data, at)
                yield start, start + int(length)
            else:
                raise ValueError(f"range list entry {kind}")

    def _old_ranges(self, at, base):
        data = self._image.debug["ranges"]
        while True:
            first, second = int(_word(data, at, 8)), int(_word(data, at + 8, 8))
            at += 16
            if first == second == 0:
                return
            if first == -1:
                base = second
            else:
                yield base + first, base + second

    def enclosing(self, address):
        """Return the start of the out-of-line function around an address, or None."""
        starts, ends = self._extents
        row = int(np.searchsorted(starts, address, "right")) - 1
        return int(starts[row]) if row >= 0 and address < ends[row] else None

    @cached_property
    def _extents(self):
        rows = self.rows
        placed = rows[(rows[:, TAG] == TAG_SUBPROGRAM) & (rows[:, LOW] != _NONE)]
        starts, ends = placed[:, LOW].astype(np.uint64), placed[:, HIGH].astype(np.uint64)
        order = np.argsort(starts, kind="stable")
        return starts[order], ends[order]


def _wanted(name):
    return bool(
        READ.fullmatch(name)
        or WRITE.fullmatch(name)
        or name == APIC_WRITE
        or COPIES.fullmatch(name)
        or WIDE.fullmatch(name)
    )


def _is_access(instruction, name):
    """Whether this is the access that the accessor was called for, and no spill or reload."""
    if COPIES.fullmatch(name):
        return instruction.is_string_instruction
    if WIDE.fullmatch(name):
        return instruction.mnemonic in _WIDE_MNEMONICS
    read, write = READ.fullmatch(name), WRITE.fullmatch(name)
    if read:
        fits = instruction.mnemonic == Mnemonic.MOV and instruction.op1_kind == OpKind.MEMORY
        width = WIDTHS[read[1]]
    else:
        fits = instruction.mnemonic in {Mnemonic.MOV, Mnemonic.XCHG}
        fits = fits and instruction.op0_kind == OpKind.MEMORY
        width = WIDTHS[write[1]] if write else 4
    return (
        fits
        and MemorySizeExt.size(instruction.memory_size) == width
        and instruction.memory_base != Register.RSP
    )


def find(path, debug=None):
    """Return the `Mmio` of a vmlinux or a module, one for each address, in order.

    `debug` is where its DWARF is. Of accessors that are inlined in each other, one is named.
    """
    image = _Image(path, debug)
    strings = image.debug["str"].tobytes()
    if not re.search(
        rb"(read|write)[bwlq]\0|io\0|movs\0|copy\0|64b_io|enqcmds|cmds512|ntdq[au]", strings
    ):
        return []
    functions = _Functions(image)
    found = {}
    for name, ranges in functions.instances(_wanted):
        for start, end in ranges:
            text = image.text_at(start)
            if text is None:
                continue
            base, section, data = text
            for instruction in Decoder(64, data[start - base : end - base], ip=start):
                if not _is_access(instruction, name):
                    continue
                if instruction.memory_base == Register.RBP and _keeps_frame(
                    functions, image, instruction.ip
                ):
                    continue
                address = instruction.ip - base if image.module else instruction.ip
                found[section, address] = name
    return sorted(Mmio(*place, name) for place, name in found.items())


def _keeps_frame(functions, image, address):
    start = functions.enclosing(address)
    text = None if start is None else image.text_at(start)
    if text is None:
        return False
    base, _, data = text
    return _FRAME_POINTER in data[start - base : start - base + _PROLOGUE]


class Comparison(NamedTuple):
    """Addresses that only one of both ways found: `missing` by this module, `extra` by the scan."""

    missing: tuple[Mmio, ...]
    extra: tuple[tuple[str, int], ...]


def compare(walked, scanned):
    """Hold what `find` gave against (section, address) pairs of a scan's MMIO instructions.

    A scan calls parts of vmlinux's .text by names of their own: addresses alone are compared for
    addresses of vmlinux, which are unique.
    """
    scanned = set(scanned)
    walked_places = {(item.section, item.address) for item in walked}
    if any(address >> 63 for _, address in scanned | walked_places):
        known = {address for _, address in scanned}
        seen = {address for _, address in walked_places}
        missing = [item for item in walked if item.address not in known]
        extra = [place for place in scanned if place[1] not in seen]
    else:
        missing = [item for item in walked if (item.section, item.address) not in scanned]
        extra = list(scanned - walked_places)
    return Comparison(tuple(sorted(missing)), tuple(sorted(extra)))


def scanned_places(sites, module):
    """Return (section, address) of one module's MMIO instructions in accessors, as a scan has them.

    What is accessed through a pointer alone is no inlined function, and not for this walk to find.
    """
    return [
        (site.section, int(site.address, 16))
        for site in sites
        if site.module == module
        and site.trap == "mmio"
        and site.form == "instruction"
        and site.mapped_by is None
    ]
