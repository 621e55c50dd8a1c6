"""The symbols of stripped kernels, from tables that are built here as scripts/kallsyms.c does."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import damaged, only_bad_image

from trapline.kernel.binary import Binary
from trapline.kernel.elf.file import Section
from trapline.kernel.elf.kallsyms import read_kallsyms

TEXT = 0xFFFFFFFF81000000
SYMBOLS = [
    ("A", "fixed_percpu_data", 0),
    ("T", "_text", TEXT),
    ("T", "startup_64", TEXT),
    *(("t", f"function_{number:04}", TEXT + 0x40 + 16 * number) for number in range(700)),
    ("W", "a_" + "long_name_" * 20, TEXT + 0x3000),
    ("D", "pv_ops", TEXT + 0x100000),
]
TABLE = {
    "old": "header names last",
    "debian": "with seqs",
    "new": "offsets last",
    "places": "each offset counts from its own place; 4 bytes of alignment",
}
RODATA = TEXT + 0x200000


def align(data, size=8):
    return data + bytes(-len(data) % size)


def compress(name, tokens):
    """Use the two-letter tokens where they fit."""
    out = []
    while name:
        number = tokens.index(name[:2]) if name[:2] in tokens else tokens.index(name[:1])
        out.append(number)
        name = name[len(tokens[number]) :]
    length = len(out)
    head = bytes([length]) if length < 0x80 else bytes([length & 0x7F | 0x80, length >> 7])
    return head + bytes(out)


def tables(layout, *, absolute_percpu=True, symbols=SYMBOLS):
    """Build .rodata with the tables of one layout."""
    used = {ord(letter) for kind, name, _ in symbols for letter in kind + name} | set(b"0123456789")
    tokens = [bytes([i]) if i in used else b"" for i in range(256)]
    for slot, pair in zip((1, 2, 3, 200), (b"fu", b"nc", b"ti", b"on"), strict=True):
        tokens[slot] = pair
    names = [compress((kind + name).encode(), tokens) for kind, name, _ in symbols]
    starts = np.cumsum([0, *map(len, names)])[:-1]
    table = b"".join(token + b"\0" for token in tokens)
    index = np.cumsum([0, *(len(token) + 1 for token in tokens)])[:-1].astype("<u2").tobytes()
    offsets = [
        address if address < TEXT else (TEXT - 1 - address if absolute_percpu else address - TEXT)
        for _, _, address in symbols
    ]
    if not absolute_percpu:
        offsets[0] = 0
    addresses = align(np.array(offsets, "<i4").tobytes()) + struct.pack("<Q", TEXT)
    header = struct.pack("<II", len(names), 0)
    body = align(b"".join(names)) + align(starts[::256].astype("<u4").tobytes())
    sequences = align(bytes(range(3)) * len(names))
    parts = {
        "old": [addresses, header, body, align(table), align(index)],
        "debian": [addresses, header, body, sequences, align(table), align(index)],
        "new": [header, body, align(table), align(index), addresses, sequences],
    }
    if layout == "places":
        marks = starts[::256].astype("<u4").tobytes()
        parts[layout] = [header[:4], align(b"".join(names), 4), marks, align(table, 4), index]
        # An odd number of words: all is aligned to 4 bytes and not to 8.
        place = RODATA + 4100 + len(b"".join(parts[layout]))
        addresses = [max(address, TEXT) for _, _, address in symbols]
        slots = [address - place - 4 * slot for slot, address in enumerate(addresses)]
        parts[layout] = [b"\x11" * 4, *parts[layout], np.array(slots, "<i4").tobytes(), sequences]
    return b"\x11" * 4096 + b"".join(parts[layout]) + b"\x22" * 4096


class Stripped:
    """What is asked of an ElfFile."""

    name = "vmlinux"
    sections = (
        Section(1, ".text", 1, 6, TEXT, 0, 0x10000, 0x10000, 0, 0, 16, 0, None),
        Section(2, ".data", 1, 3, TEXT + 0x100000, 0, 0x1000, 0x1000, 0, 0, 16, 0, None),
        Section(3, ".bss", 8, 3, TEXT + 0x300000, 0, 0x1000, 0, 0, 0, 16, 0, None),
    )

    def __init__(self, rodata):
        self._rodata = rodata

    def section(self, name):
        size = len(self._rodata)
        found = Section(4, ".rodata", 1, 2, RODATA, 0, size, size, 0, 0, 16, 0, None)
        return found if name == ".rodata" else None

    def contents(self, section):
        return memoryview(self._rodata if section.name == ".rodata" else b"")


@pytest.mark.parametrize("layout", TABLE)
@pytest.mark.parametrize("absolute_percpu", [True, False])
def test_all_layouts(layout, absolute_percpu):
    table = read_kallsyms(Stripped(tables(layout, absolute_percpu=absolute_percpu)))
    found = dict(zip(table.names[1:], table.records["value"][1:].tolist(), strict=True))
    assert {name: found[name] for _, name, address in SYMBOLS if address} == {
        name: address for _, name, address in SYMBOLS if address
    }
    by_name = {table.names[i]: table.records[i] for i in range(len(table))}
    assert by_name["function_0000"]["size"] == 16
    assert by_name["function_0000"]["info"] == 2
    assert by_name["startup_64"]["size"] == 0x40
    assert by_name["startup_64"]["info"] == 0x12
    assert by_name["pv_ops"]["section"] == 2
    assert by_name["pv_ops"]["info"] == 0x11


def test_a_kernel_without_the_tables_has_no_symbols():
    assert read_kallsyms(Stripped(b"")) is None
    assert read_kallsyms(Stripped(bytes(100_000))) is None
    assert read_kallsyms(Stripped(bytes(range(256)) * 100)) is None


def test_tables_that_disagree_are_not_taken():
    sound = tables("new")
    index = sound.rindex(struct.pack("<HHH", 0, 1, 4))
    assert read_kallsyms(Stripped(sound)) is not None
    assert read_kallsyms(Stripped(sound[:index] + b"\x05" + sound[index + 1 :])) is None


@settings(max_examples=60)
@given(data=st.data(), layout=st.sampled_from(sorted(TABLE)))
def test_any_bytes_end_in_a_table_or_none(data, layout):
    with only_bad_image():
        read_kallsyms(Stripped(data.draw(damaged(tables(layout), header=8192))))


@pytest.mark.kernel
def test_the_boot_image_of_debian_has_the_symbols_of_its_vmlinux(debian_kernel):
    with (
        Binary.open_vmlinuz(debian_kernel.vmlinuz) as stripped,
        Binary.open_vmlinux(debian_kernel.vmlinux) as whole,
    ):
        assert len(stripped.elf.symbols) == 0
        ours = stripped.symbols
        theirs = whole.elf.symbols
        known = set(zip(theirs.names, theirs.records["value"].tolist(), strict=True))
        found = list(zip(ours.names[1:], ours.records["value"][1:].tolist(), strict=True))
        assert len(found) > 100_000
        assert [symbol for symbol in found if symbol not in known] == []
