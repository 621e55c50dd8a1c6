"""Sweeps name every instruction that could matter, whatever stands around it."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from iced_x86 import Decoder

from trapline.isa import traps
from trapline.isa.sweep import Sweep

BASE = 0xFFFFFFFF81000000
PREFIXES = [b"", b"\x66", b"\xf2", b"\xf3", b"\x48", b"\x66\x48", b"\xf3\x41", b"\x2e\x65\xf2\x67"]
ESCAPES = [b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a"]


def starts(sweep):
    return [sweep.address + offset for offset in sweep.starts.tolist()]


def decoded(code):
    return [(i.ip, i) for i in Decoder(64, code, ip=BASE)]


def test_every_encoding_that_traps_is_a_candidate():
    trapping = set()
    for prefix, escape in itertools.product(PREFIXES, ESCAPES):
        for opcode in range(256):
            head = prefix + escape + bytes([opcode])
            # All ModRM bytes only where the opcode has a trapping form at all.
            for modrm in range(256):
                instruction = Decoder(64, head + bytes([modrm]) + bytes(12)).decode()
                if traps.classify(instruction) is not None:
                    trapping.add(head + bytes([modrm]) + bytes(12))
                elif modrm == 0 and not escape and instruction.len == len(head):
                    break
    assert len(trapping) > 2000
    missed = [code.hex() for code in trapping if 0 not in Sweep(code, 0).trap_candidates()]
    assert missed == []


@given(st.binary(max_size=400))
def test_any_bytes_are_swept_as_iced_decodes_them(code):
    sweep = Sweep(code, BASE)
    plain = decoded(code)
    assert starts(sweep) == [ip for ip, _ in plain]
    expected = {ip for ip, i in plain if traps.classify(i) is not None}
    assert expected <= set(sweep.trap_candidates())
    middle = BASE + len(code) // 2
    assert sweep.within(middle, BASE + 1000) == [ip for ip, _ in plain if ip >= middle]
    assert b"".join(sweep.bytes_of(sweep.decode(ip)) for ip, _ in plain) == code


@given(st.binary(min_size=12, max_size=200), st.integers(0, 199))
def test_branches_are_found_wherever_they_stand(code, target):
    reached = {
        ip
        for ip, i in decoded(code)
        if i.len >= 5 and (i.is_call_near or i.is_jmp_near or i.is_jcc_near)
        if i.near_branch_target == BASE + target
    }
    assert reached <= set(Sweep(code, BASE).branch_candidates([BASE + target]))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("e8fb000000", True),  # call BASE + 0x100
        ("e9fb000000", True),  # jmp
        ("0f84fa000000", True),  # je
        ("2ee8fa000000", True),  # cs call, as retpolines have it
        ("e8fc000000", False),  # elsewhere
        ("90909090", False),
    ],
)
def test_forms_of_branches(code, found):
    sweep = Sweep(bytes.fromhex(code), BASE)
    assert bool(sweep.branch_candidates([BASE + 0x100])) == found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("ff15fa000000", True),  # call *0x100(%rip)
        ("ff25fa000000", True),  # jmp *
        ("ff142500010081", True),  # call *BASE+0x100, absolute
        ("2eff142500010081", True),
        ("ff15f8000000", False),  # below the table
        ("ff150a010000", False),  # behind it
        ("ff350a010000", False),  # push
        ("ff1481", False),  # call *(%rcx,%rax,4)
    ],
)
def test_forms_of_calls_through_a_table(code, found):
    sweep = Sweep(bytes.fromhex(code), BASE)
    assert bool(sweep.pointer_candidates(BASE + 0x100, BASE + 0x110)) == found


def test_constants_among_the_code_do_not_hide_a_function():
    # 0x48 0xb8 starts a MOV that swallows the eight bytes behind it.
    code = bytes.fromhex("c348b80fa2c3900fa2c390") + bytes.fromhex("909090")
    plain = Sweep(code, BASE)
    assert BASE + 3 not in starts(plain)
    aligned = Sweep(code, BASE, [BASE, BASE + 3])
    assert BASE + 3 in starts(aligned)
    assert aligned.trap_candidates()[0] == BASE + 3
    assert np.all(np.diff(aligned.starts.astype(np.int64)) > 0)


def test_the_name_in_an_emulation_mark_is_no_code():
    # arch/x86/include/asm/emulate_prefix.h: the "n" of "xen" would be OUTSB, and "kvm" would be
    # an IMUL that takes the first byte of the CPUID behind it.
    for name in (b"xen", b"kvm"):
        sweep = Sweep(b"\x90\x0f\x0b" + name + b"\x0f\xa2\xc3", BASE)
        assert starts(sweep) == [BASE, BASE + 1, BASE + 6, BASE + 8]
        assert sweep.trap_candidates() == [BASE + 6]
    # Without UD2 the same bytes are code: js; outsb.
    assert Sweep(b"\x78\x65\x6e", BASE).trap_candidates() == [BASE + 2]
    # Nor are they a mark where they are within an instruction: movabs.
    inside = Sweep(b"\x48\xb8\x0f\x0bxen\x00\x00\x00\xc3", BASE)
    assert starts(inside) == [BASE, BASE + 10]
    assert starts(Sweep(b"\x0f\x0bxen", BASE)) == [BASE]


def test_many_entries_out_of_step_cost_no_more_than_few():
    # movabs, entered in its middle, a hundred thousand times: each once rewrote all starts.
    code = bytes.fromhex("48b80000000000000000") * 100_000
    sweep = Sweep(code, BASE, [BASE + 10 * number + 2 for number in range(100_000)])
    assert starts(sweep)[:7] == [BASE + offset for offset in (0, 2, 4, 6, 8, 10, 12)]
    assert len(sweep) == 500_000


@given(st.binary(min_size=1, max_size=200), st.sets(st.integers(0, 199), max_size=20))
@example(b"\0\0\0\0", {1, 2})  # what is decoded from the first entry passes over the second
@example(b"\x0f\x0bxen\0\0\0\0", {5, 6})
@example(b"\x90\x90\x48\xb8\0\0\0\0\0\0\0\0\x0f\xa2\xc3", {0, 1, 2, 3, 12})
def test_each_entry_starts_an_instruction(code, offsets):
    entries = {offset for offset in offsets if offset < len(code)}
    found = Sweep(code, 0, entries).starts.tolist()
    assert found == sorted(set(found))
    # A mark's name is never code, whatever a symbol says.
    inside = {m.start() + n for m in re.finditer(b"\x0f\x0b(?:xen|kvm)", code) for n in (2, 3, 4)}
    assert entries - inside <= set(found)


def test_entries_outside_of_the_section_do_not_matter():
    code = bytes.fromhex("0fa2c3")
    assert starts(Sweep(code, BASE, [BASE - 5, BASE + 3, BASE + 99])) == [BASE, BASE + 2]
    assert len(Sweep(b"", BASE, [BASE])) == 0
