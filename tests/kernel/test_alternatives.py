"""The three layouts of .altinstructions."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.kernel.elf.alternatives import Alternative, Alternatives, Span

TABLE = 0xFFFFFFFF83000000
CODE = Span(0xFFFFFFFF81000000, 0xFFFFFFFF81001000)
REPLACEMENTS = Span(0xFFFFFFFF83100000, 0xFFFFFFFF83100100)
ENTRIES = [
    Alternative(CODE.start + 0x10, REPLACEMENTS.start, 3, 3 * 32 + 5, 0),
    Alternative(CODE.start + 0x20, REPLACEMENTS.start + 3, 5, 11 * 32 + 1, 0),
]


def encode(entries, layout):
    data = b""
    for entry in entries:
        here = TABLE + len(data)
        data += struct.pack(
            layout,
            entry.origin - here,
            entry.replacement - here - 4,
            entry.feature | entry.flags << 16,
            entry.size,
            entry.size,
            *((0,) if layout.endswith("BBB") else ()),
        )
    return data


def parse(data):
    return Alternatives.parse(memoryview(data), TABLE, [CODE], [REPLACEMENTS])


@pytest.mark.parametrize("layout", ["<iiIBB", "<iiHBB", "<iiHBBB"])
@pytest.mark.parametrize("count", [1, 2])
def test_each_layout_is_told_by_what_it_points_to(layout, count):
    found = parse(encode(ENTRIES[:count], layout))
    assert len(found) == count
    assert found.entry_size == struct.calcsize(layout)
    assert found.replacing_at(REPLACEMENTS.start + 2) == ENTRIES[0]
    assert found.replacing_at(REPLACEMENTS.start - 1) is None
    assert found.replacing_at(REPLACEMENTS.start + 8) is None
    if count == 2:
        assert found.replacing_at(REPLACEMENTS.start + 3) == ENTRIES[1]


def test_flags_are_apart_from_the_feature():
    entry = Alternative(CODE.start, REPLACEMENTS.start, 1, 7, 2)
    assert parse(encode([entry], "<iiIBB")).replacing_at(REPLACEMENTS.start) == entry


def test_an_alternative_that_only_removes_code_replaces_nothing():
    entry = Alternative(CODE.start, 0, 0, 7, 0)
    data = struct.pack("<iiIBB", entry.origin - TABLE, 0, 7, 4, 0)
    assert len(parse(data)) == 0


@given(st.binary(max_size=100))
def test_any_table_is_read_or_empty(data):
    parse(data).replacing_at(REPLACEMENTS.start)
