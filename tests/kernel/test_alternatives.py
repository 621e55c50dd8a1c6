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
    Alternative(CODE.start + 0x10, REPLACEMENTS.start, 3, 4, 3 * 32 + 5, False, False),
    Alternative(CODE.start + 0x20, REPLACEMENTS.start + 3, 5, 7, 11 * 32 + 1, True, False),
]


def encode(entries, layout):
    data = b""
    for entry in entries:
        here = TABLE + len(data)
        data += struct.pack(
            layout,
            entry.origin - here,
            entry.replacement - here - 4,
            entry.feature | entry.inverted << (16 if "I" in layout else 15) | entry.direct << 17,
            entry.length,
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
    assert found.in_order() == tuple(ENTRIES[:count])
    assert found.replacing_at(REPLACEMENTS.start + 2) == ENTRIES[0]
    assert found.replacing_at(REPLACEMENTS.start - 1) is None
    assert found.replacing_at(REPLACEMENTS.start + 8) is None
    if count == 2:
        assert found.replacing_at(REPLACEMENTS.start + 3) == ENTRIES[1]


def test_flags_are_apart_from_the_feature():
    entry = Alternative(CODE.start, REPLACEMENTS.start, 1, 2, 7, inverted=False, direct=True)
    assert parse(encode([entry], "<iiIBB")).replacing_at(REPLACEMENTS.start) == entry


def test_an_alternative_that_only_removes_code_replaces_nothing():
    data = struct.pack("<iiIBB", CODE.start - TABLE, 0, 7, 4, 0)
    found = parse(data)
    assert len(found) == 0
    (entry,) = found.in_order()
    assert (entry.origin, entry.length, entry.size) == (CODE.start, 4, 0)


@given(st.binary(max_size=100))
def test_any_table_is_read_or_empty(data):
    parse(data).replacing_at(REPLACEMENTS.start)
