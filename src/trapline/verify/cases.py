"""What is tried: one case is an instruction with the state it is given.

The second round depends on the first: each form that the handler has accepted is varied in
every way an encoding can be; what it has refused is tried once more with other operands.
"""

import random
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Final, NamedTuple, Self

import iced_x86 as ix

from trapline.cpu.engine import Reg
from trapline.results.trapclass import EmulatedClass
from trapline.rules.rows import CpuidRule, MsrRule
from trapline.rules.ruleset import RuleSet
from trapline.verify.forms import Form, probes
from trapline.verify.inputs import Field, decode, memory_kinds
from trapline.verify.testpages import (
    END,
    KERNEL_BASE,
    OPERAND,
    STACK_AT,
    STACK_SIZE,
)

_M32: Final = (1 << 32) - 1
_TARGET: Final = OPERAND
_STACK_TOP: Final = KERNEL_BASE + STACK_AT + STACK_SIZE
_RSP, _RBP = 4, 5
_LEGACY: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_PREFIX_RUNS: Final = (
    *(bytes([prefix]) for prefix in sorted(_LEGACY)),
    b"\x66\x66", b"\x67\x66", b"\x2e\x66", b"\x66\xf2", b"\x66\xf3", b"\xf3\xf2", b"\xf0\xf2",
    b"\x65\x64", b"\x64\x3e", b"\x48", b"\x4f", b"\x66\x48", b"\x48\x66",
)  # fmt: skip
_IMMEDIATES: Final = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0x7FFF_FFFF, 0x8000_0000, _M32)
_EAX: Final = Field(Reg.RAX, _M32)
_ECX: Final = Field(Reg.RCX, _M32)
_EDX: Final = Field(Reg.RDX, _M32)
_DX: Final = Field(Reg.RDX, 0xFFFF)
# The edges of what the SDM and the TDX module tell apart; what they name comes from the rules.
_PORTS: Final = (0, 1, 0x70, 0x80, 0xCF8, 0x3F8, 0x5000, 0x7FFF, 0x8000, 0xFFFF)
_LEAVES: Final = (
    0, 0x3FFF_FFFF, *range(0x4000_0000, 0x4000_0012), 0x4FFF_FFFF, 0x5000_0000, 0x7FFF_FFFF,
    0x8000_0000, 0x8FFF_FFFF, 0xC000_0000, _M32,
)  # fmt: skip
_SUBLEAVES: Final = (0, 1, 0x8765_4321)
_HOST_MSR: Final = 0x4B56_4D00  # the host's own, which KVM has there
_MSRS: Final = (
    0, 0x1FFF, 0x2000, 0x3FFF_FFFF, 0x4000_0000, _HOST_MSR, 0x4B56_4D04, 0x7FFF_FFFF, 0x8000_0000,
    0xBFFF_FFFF, 0xC000_0000, 0xC000_1FFF, 0xC000_2000, _M32,
)  # fmt: skip
_MOST_OF_A_RANGE: Final = 64


class Case(NamedTuple):
    """One instruction and its circumstances; small enough to be sent to other processes.

    `ring3` runs it in user mode. `user` gives it an address in the user half, with `smap` one
    that SMAP forbids; `crossing` an operand across two pages, of which `private` is plain memory of
    the guest. `rewritten` is what stands in its place when the handler looks. `pinned` are values
    of register fields.
    """

    trap: EmulatedClass
    code: bytes
    seed: int
    ring3: bool = False
    user: bool = False
    smap: bool = False
    crossing: bool = False
    private: int | None = None
    interrupts: bool | None = None
    rewritten: bytes = b""
    pinned: tuple[tuple[Field, int], ...] = ()


class Subjects(NamedTuple):
    """Operands that a table of the rules or the kernel names: MSRs and CPUID leaves."""

    msrs: tuple[int, ...]
    leaves: tuple[int, ...]

    @classmethod
    def of(cls, rules: RuleSet, msrs: tuple[int, ...] = ()) -> Self:
        """Take each number of a short range, and the edges of a long one; add the kernel's MSRs."""
        return cls((*_named(rules.msrs), *msrs), _named(rules.cpuid))


def _named(rows: Iterable[MsrRule | CpuidRule]) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for row in rows:
        if row.first is not None:
            last = row.first if row.last is None else row.last
            step = max((last - row.first) // _MOST_OF_A_RANGE, 1)
            found |= dict.fromkeys((*range(row.first, last + 1, step), last))
    return tuple(found)


class Address(NamedTuple):
    """An addressing mode: numbers of base and index, scale, bytes of displacement, its value."""

    base: int | None
    index_register: int | None = None
    scale: int = 1
    width: int = 0
    displacement: int = 0
    relative: bool = False


class _Parts(NamedTuple):
    prefixes: bytes
    rex: int  # 0: none
    opcode: bytes
    reg: int
    immediate: bytes


def first_round() -> tuple[tuple[Form, ...], tuple[Case, ...]]:
    """Return all forms, and one case for each."""
    forms = tuple(probes())
    return forms, tuple(_probe(form, number) for number, form in enumerate(forms))


def ring3_round(forms: Iterable[Form], subjects: Subjects) -> tuple[Case, ...]:
    """Return what is tried in user mode: all that traps by itself, and some accesses."""
    cases: list[Case] = []
    for form in forms:
        if form.trap == "cpuid":
            cases += _cpuid(form, len(cases), subjects)
        elif form.trap != "mmio":
            cases.append(_probe(form, len(cases)))
        elif len(form.bytes) == 2:
            cases.append(Case("mmio", form.bytes, len(cases)))
    return tuple(case._replace(ring3=True, interrupts=True) for case in cases)


def second_round(
    forms: Iterable[Form], accepted: frozenset[int], subjects: Subjects
) -> tuple[Case, ...]:
    """Return the rest; `accepted` are the codes that the handler does not refuse."""
    cases: list[Case] = []
    for form in forms:
        if form.trap == "mmio":
            if form.code in accepted:
                cases += _mmio(form, len(cases))
            else:
                cases.append(Case("mmio", form.bytes, len(cases)))
        elif form.trap == "pio":
            cases += _ports(form, len(cases))
        elif form.trap == "cpuid":
            cases += _cpuid(form, len(cases), subjects)
        elif form.trap == "msr":
            cases += _msr(form, len(cases), subjects)
        else:
            cases += _plain(form, len(cases))
    cases += _rewrites(forms, accepted, len(cases))
    return tuple(dict.fromkeys(cases))


def _probe(form: Form, number: int) -> Case:
    pinned: tuple[tuple[Field, int], ...] = ()
    if form.trap == "cpuid":
        pinned = ((_EAX, 0x4000_0000), (_ECX, 0))
    elif form.trap == "msr":
        pinned = ((_ECX, _HOST_MSR),)
    elif form.trap == "pio":
        pinned = ((_DX, 0x5000),)
    return Case(form.trap, form.bytes, number, interrupts=False, pinned=pinned)


# MMIO.


def _mmio(form: Form, seed: int) -> Iterator[Case]:
    """Vary registers, addressing, prefixes, immediates and the place of the operand."""
    codes = list(dict.fromkeys(_first_of(code) for code in _encodings(form)))
    for number, code in enumerate(codes):
        yield Case("mmio", code, seed + number)
    for number, code in enumerate(codes[:: max(len(codes) // 24, 1)]):
        yield Case("mmio", code, seed + number, crossing=True, private=(None, 0, 1)[number % 3])
        yield Case("mmio", code, seed + number, user=True)
        yield Case("mmio", code, seed + number, user=True, smap=True)


def _encodings(form: Form) -> Iterator[bytes]:
    parts = _split(form)
    if parts is None:  # no ModRM, or a vector encoding
        yield from (prefix + form.bytes for prefix in (b"", *_PREFIX_RUNS))
        return
    registers = [
        (rex, reg)
        for rex, reg in product((0, 0x40), range(16))
        if (rex or reg < 8) and _is(form, _encode(parts, Address(3), rex=rex, reg=reg))
    ]
    for (rex, reg), base, (width, value) in product(
        registers, range(16), ((0, 0), (1, -0x70), (4, 0x1234))
    ):
        yield _encode(parts, Address(base, None, 1, width, value), rex=rex, reg=reg)
    some = registers[:: max(len(registers) // 4, 1)]
    for (rex, reg), address in product(some, _indexed()):
        yield _encode(parts, address, rex=rex, reg=reg)
    for (rex, reg), address in product(registers, _special()):
        yield _encode(parts, address, rex=rex, reg=reg)
    for prefix, (rex, reg), address in product(
        _PREFIX_RUNS, some, (Address(3), Address(6, 1, 4, 1, 0x10), _RIP)
    ):
        yield prefix + _encode(parts, address, rex=rex, reg=reg)
    if parts.immediate:
        for value, address in product(_IMMEDIATES, (Address(3), Address(14, 9, 8, 4, 77), _RIP)):
            immediate = (value & (1 << 8 * len(parts.immediate)) - 1).to_bytes(
                len(parts.immediate), "little"
            )
            yield _encode(parts._replace(immediate=immediate), address, rex=0, reg=parts.reg)


_RIP: Final = Address(None, None, 1, 4, _TARGET - END, relative=True)


def _first_of(code: bytes) -> bytes:
    """Cut off what a prefix has made a second instruction of."""
    return code[: decode(code, END, strict=False).len]


def _indexed() -> Iterator[Address]:
    for base, index in product((0, _RSP, _RBP, 11, 12, 13), (0, 1, _RBP, 12, 15)):
        for scale in (1, 2, 4, 8):
            yield Address(base, index, scale, 1, 0x33)
    for index in (1, _RBP, 12, 14):
        yield Address(None, index, 4, 4, 0x40)


def _special() -> Iterator[Address]:
    yield _RIP
    yield Address(None, None, 1, 4, (_TARGET & _M32) - (1 << 32))
    yield Address(_RSP, None, 1, 4, _TARGET - (_STACK_TOP - 0x400) + 8)


def _is(form: Form, code: bytes) -> bool:
    return decode(code, END).code == form.code


def _split(form: Form) -> _Parts | None:
    """Take a template apart; None where it has no ModRM."""
    instruction = decode(form.bytes, END)
    if instruction.op_code().encoding != ix.EncodingKind.LEGACY:
        return None
    at = 0
    while form.bytes[at] in _LEGACY:
        at += 1
    prefixes = form.bytes[:at]
    rex = 0
    if form.bytes[at] & 0xF0 == 0x40:
        rex = form.bytes[at]
        at += 1
    start = at
    if form.bytes[at] == 0x0F:
        at += 1
        if form.bytes[at] in {0x38, 0x3A}:
            at += 1
    at += 1
    if at >= len(form.bytes) or ix.OpKind.MEMORY not in memory_kinds(instruction):
        return None
    modrm = form.bytes[at]
    parts = _Parts(prefixes, rex, form.bytes[start:at], modrm >> 3 & 7, form.bytes[at + 1 :])
    longer = _encode(parts, Address(3, None, 1, 1, 1), rex=rex, reg=parts.reg)
    # Where there is no ModRM, one byte more is another instruction.
    return parts if _is(form, longer) else None


def _encode(parts: _Parts, address: Address, *, rex: int, reg: int) -> bytes:
    """Put an instruction together: SDM volume 2, 2.1.5 and 2.2.1."""
    rex |= parts.rex | (reg >> 3) << 2
    base, index, width = address.base, address.index_register, address.width
    rex |= ((base or 0) >> 3) | ((index or 0) >> 3) << 1
    if rex:
        rex |= 0x40
    sib = b""
    displacement = address.displacement
    if address.relative:
        mod, rm, width = 0, 5, 4
    elif base is None:
        mod, rm, width = 0, 4, 4
        sib = _sib(4 if index is None else index, 5, address.scale)
    else:
        if base & 7 == _RBP and width == 0:
            width, displacement = 1, 0
        mod = {0: 0, 1: 1, 4: 2}[width]
        rm = base & 7
        if index is not None or base & 7 == _RSP:
            rm = 4
            sib = _sib(4 if index is None else index, base & 7, address.scale)
    return (
        parts.prefixes
        + (bytes([rex]) if rex else b"")
        + parts.opcode
        + bytes([mod << 6 | (reg & 7) << 3 | rm])
        + sib
        + (displacement & (1 << 8 * width) - 1).to_bytes(width, "little")
        + parts.immediate
    )


def _sib(index: int, base: int, scale: int) -> bytes:
    return bytes([scale.bit_length() - 1 << 6 | (index & 7) << 3 | base & 7])


# Instructions that trap themselves.


def _ports(form: Form, seed: int) -> Iterator[Case]:
    """Ports by immediate and DX, with prefixes that mean nothing here, and REP."""
    ports = (*_PORTS, *_random(4, 0x1_0000, 3))
    number = seed
    for prefix in (b"", *_PREFIX_RUNS):
        for port in ports if not prefix else ports[number % 5 :: 5]:
            code = _first_of(prefix + form.bytes)
            if form.bytes[-1] == 0x5A:
                code = code[:-1] + bytes([port & 0xFF])
            number += 1
            yield Case("pio", code, number, pinned=((_DX, port),))


def _cpuid(form: Form, seed: int, subjects: Subjects) -> Iterator[Case]:
    """Leaves that the rules name, those at the edges of the ranges, and some at random."""
    others = dict.fromkeys((*subjects.leaves, *_random(16, 1 << 32, 2)))
    leaves = (*product(_LEAVES, _SUBLEAVES), *((leaf, 0) for leaf in others))
    for number, (leaf, subleaf) in enumerate(dict.fromkeys(leaves)):
        yield Case(form.trap, form.bytes, seed + number, pinned=((_EAX, leaf), (_ECX, subleaf)))
    for number, prefix in enumerate(_PREFIX_RUNS):
        pinned = ((_EAX, 0x4000_0000), (_ECX, 0))
        yield Case(form.trap, prefix + form.bytes, seed + number, pinned=pinned)


def _msr(form: Form, seed: int, subjects: Subjects) -> Iterator[Case]:
    """MSRs that the rules name, those at the edges of what has a bitmap, and some at random."""
    indices = dict.fromkeys(
        (*subjects.msrs, *_MSRS, *_random(32, 0x2000, 0), *_random(32, 1 << 32, 1))
    )
    for number, index in enumerate(indices):
        yield Case(form.trap, form.bytes, seed + number, pinned=((_ECX, index),))
    values = product((0, 1, 0x7FFF_FFFF, 0x8000_0000, _M32), repeat=2)
    for number, (low, high) in enumerate(values):
        pinned = ((_ECX, _HOST_MSR), (_EAX, low), (_EDX, high))
        yield Case(form.trap, form.bytes, seed + number, pinned=pinned)
    for number, prefix in enumerate(_PREFIX_RUNS):
        yield Case(form.trap, prefix + form.bytes, seed + number, pinned=((_ECX, _HOST_MSR),))


def _random(count: int, below: int, seed: int) -> Iterator[int]:
    """Draw numbers, always the same."""
    source = random.Random(seed)  # noqa: S311 - repeatable on purpose
    return (source.randrange(below) for _ in range(count))


def _plain(form: Form, seed: int) -> Iterator[Case]:
    number = seed
    for interrupts, prefix in product((False, True), (b"", *_PREFIX_RUNS)):
        number += 1
        yield Case(form.trap, prefix + form.bytes, number, interrupts=interrupts)


# An instruction that changes between the trap and the handler's look at it.


def _rewrites(forms: Iterable[Form], accepted: frozenset[int], seed: int) -> Iterator[Case]:
    """Pair accepted forms of the same length."""
    by_length: dict[int, list[bytes]] = {}
    for form in forms:
        if form.trap == "mmio" and form.code in accepted and _split(form) is not None:
            by_length.setdefault(len(form.bytes), []).append(form.bytes)
            moved = form.bytes[:-1] + bytes([form.bytes[-1] & 0xF8 | 6])
            if form.bytes[-1] & 7 == 3 and _is(form, moved):
                by_length[len(form.bytes)].append(moved)
    number = seed
    for codes in by_length.values():
        for old, new in product(codes, codes):
            if old != new:
                number += 1
                yield Case("mmio", old, number, rewritten=new)
