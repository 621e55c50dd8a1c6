"""ORC tables: the four formats of the flags word, lookup, and damaged sections."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.base.errors import BadImageError
from trapline.kernel.live.orc import NULL_CALL, OrcEntry, OrcReg, OrcTable, OrcType, orc_format

BASE = 0xFFFFFFFF82E8F000
TEXT = 0xFFFFFFFF81000000
HASH_6_3 = bytes.fromhex("db84aed4103b31dd51e017f8f79783ca985c2c51")
HASH_6_4 = bytes.fromhex("fe5d32bf581bd63b2ca9a5c65ba5a625eab3fe24")
HASH_7 = bytes.fromhex("137c36ad7627c4dd55932176bb0ecdbd5041fc82")


def table(entries, version=3):
    """Build a table from (address, sp_offset, bp_offset, flags)."""
    ip = b"".join(
        struct.pack("<i", address - (BASE + 4 * index))
        for index, (address, *_) in enumerate(entries)
    )
    unwind = b"".join(struct.pack("<hhH", *rest) for _, *rest in entries)
    return OrcTable.parse(ip, BASE, unwind, version)


def flags(sp_reg, bp_reg, kind, signal=False):
    return sp_reg | bp_reg << 4 | kind << 8 | signal << 11


CALL = flags(OrcReg.SP, 0, OrcType.CALL)


def test_entries_cover_up_to_the_next():
    found = table([(TEXT, 8, 0, CALL), (TEXT + 1, 16, -16, flags(OrcReg.SP, 1, OrcType.CALL))])
    assert found.find(TEXT - 1) is None
    assert found.find(TEXT) == OrcEntry(8, 0, OrcReg.SP, 0, OrcType.CALL, signal=False)
    assert found.find(TEXT).is_plain_call
    assert found.find(TEXT + 1) == OrcEntry(16, -16, OrcReg.SP, 1, OrcType.CALL, signal=False)
    assert found.find(TEXT + 0x1000) == found.find(TEXT + 1)
    assert not found.find(TEXT + 1).is_plain_call


def test_addresses_outside_64_bits_have_no_entry():
    found = table([(TEXT, 8, 0, CALL)])
    assert found.find(-1) is None
    assert found.find(1 << 64) is None


def test_a_real_entry_wins_over_a_terminator_at_the_same_address():
    terminator = flags(0, 0, OrcType.UNDEFINED)
    for order in ([CALL, terminator], [terminator, CALL]):
        found = table([(TEXT, 8, 0, order[0]), (TEXT, 8, 0, order[1])])
        assert found.find(TEXT).type == OrcType.CALL


def test_an_unsorted_module_table_is_sorted():
    found = table([(TEXT + 32, 24, 0, CALL), (TEXT, 8, 0, CALL), (TEXT + 16, 16, 0, CALL)])
    assert [found.find(TEXT + 16 * i).sp_offset for i in range(3)] == [8, 16, 24]


@pytest.mark.parametrize(
    ("version", "word", "kind", "signal"),
    [
        (1, OrcReg.SP, OrcType.CALL, False),
        (1, OrcReg.SP | 1 << 8, OrcType.REGS, True),
        (1, OrcReg.SP | 2 << 8, OrcType.REGS_PARTIAL, True),
        (1, 0, OrcType.UNDEFINED, False),
        (1, 1 << 10, OrcType.END_OF_STACK, False),
        (2, OrcReg.SP, OrcType.CALL, False),
        (2, OrcReg.SP | 1 << 10, OrcType.CALL, True),
        (2, OrcReg.SP | 1 << 8 | 1 << 10, OrcType.REGS, True),
        (2, OrcReg.SP | 2 << 8, OrcType.REGS_PARTIAL, False),
        (2, 0, OrcType.UNDEFINED, False),
        (2, 1 << 11, OrcType.END_OF_STACK, False),
        (3, flags(OrcReg.SP, 0, OrcType.REGS, signal=True), OrcType.REGS, True),
        (3, flags(0, 0, OrcType.END_OF_STACK), OrcType.END_OF_STACK, False),
    ],
)
def test_formats_are_read_alike(version, word, kind, signal):
    entry = table([(TEXT, 8, 0, word)], version).find(TEXT)
    assert (entry.type, entry.signal) == (kind, signal)
    assert entry.sp_reg == word & 0xF


def test_format_4_numbers_the_registers_anew():
    """ORC_REG_* of orc_types.h of 7.2.11: SP is 3, BP 4, PREV_SP 8, R10 6, AX 1, BP_INDIRECT 10."""
    words = {
        flags(3, 0, OrcType.CALL): (OrcReg.SP, OrcReg.UNDEFINED),
        flags(4, 8, OrcType.REGS, signal=True): (OrcReg.BP, OrcReg.PREV_SP),
        flags(6, 4, OrcType.CALL): (OrcReg.R10, OrcReg.BP),
        flags(1, 10, OrcType.CALL): (OrcReg.AX, OrcReg.BP_INDIRECT),
    }
    entries = [(TEXT + at, 8, 0, word) for at, word in enumerate(words)]
    found = [table(entries, 4).find(TEXT + at) for at in range(len(words))]
    assert [(entry.sp_reg, entry.bp_reg) for entry in found] == list(words.values())
    assert (found[1].type, found[1].signal) == (OrcType.REGS, True)
    assert found[0].is_plain_call


@pytest.mark.parametrize(
    ("header", "release", "expected"),
    [
        (HASH_7, None, 4),
        (HASH_6_4, None, 3),
        (HASH_6_3, "6.4.1", 2),
        (b"\1" * 20, "6.12.1", None),
        (None, "6.1.0-56-cloud-amd64", 1),
        (None, "5.10.0", 1),
        (None, "6.3.2", 2),
        (None, "6.4.0", 3),
        (None, "7.0", 3),
        (None, None, None),
        (None, "rolling", None),
    ],
)
def test_format_is_told_by_header_then_release(header, release, expected):
    assert orc_format(header, release) == expected


@pytest.mark.parametrize(("ip", "unwind"), [(b"\0" * 8, b"\0" * 6), (b"\0" * 5, b"\0" * 6)])
def test_sections_that_do_not_belong_together_are_refused(ip, unwind):
    with pytest.raises(BadImageError, match="orc_unwind"):
        OrcTable.parse(ip, BASE, unwind, 3)


def test_an_empty_table_covers_nothing():
    found = OrcTable.parse(b"", BASE, b"", 3)
    assert len(found) == 0
    assert found.find(TEXT) is None


@given(st.binary(max_size=200), st.integers(0, 2**64 - 1), st.sampled_from([1, 2, 3]))
def test_any_bytes_make_a_table_that_answers(data, address, version):
    count = len(data) // 10
    found = OrcTable.parse(
        data[: 4 * count], 0xFFFFFFFFFFFFFFF0, data[4 * count : 10 * count], version
    )
    entry = found.find(address)
    assert (entry is None) == (not any(int(a) <= address for a in found.addresses))


def test_a_jump_to_null_left_the_return_address_on_top():
    assert NULL_CALL.is_plain_call
