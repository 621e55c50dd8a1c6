"""What there is to an instruction and its circumstances, as words that causes are made of."""

from typing import Final

import iced_x86 as ix

from trapline.cpu.engine import Reg
from trapline.verify.cases import Case
from trapline.verify.inputs import address_size, decode, field_of, memory_kinds
from trapline.verify.testpages import END

_HIGH: Final = frozenset((ix.Register.AH, ix.Register.CH, ix.Register.DH, ix.Register.BH))
_NEEDS_REX: Final = frozenset((ix.Register.SPL, ix.Register.BPL, ix.Register.SIL, ix.Register.DIL))
_PREFIX_NAMES: Final = {
    0x26: "segment prefix ES", 0x2E: "segment prefix CS", 0x36: "segment prefix SS",
    0x3E: "segment prefix DS", 0x64: "segment prefix FS", 0x65: "segment prefix GS",
    0x66: "prefix 66", 0x67: "prefix 67", 0xF0: "LOCK prefix", 0xF2: "prefix F2",
    0xF3: "prefix F3",
}  # fmt: skip
_SEGMENT_PREFIXES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65))

_MISALIGNED: Final = {step: f"an address that is no multiple of {step}" for step in (2, 4, 8)}
# How wide an immediate is where it is not extended; those that are come with their sign.
_IMMEDIATES: Final = {
    ix.OpKind.IMMEDIATE8: 8, ix.OpKind.IMMEDIATE16: 16, ix.OpKind.IMMEDIATE32: 32,
    ix.OpKind.IMMEDIATE64: 64, ix.OpKind.IMMEDIATE8TO16: 64, ix.OpKind.IMMEDIATE8TO32: 64,
    ix.OpKind.IMMEDIATE8TO64: 64, ix.OpKind.IMMEDIATE32TO64: 64,
}  # fmt: skip

RING0: Final = "in ring 0"
RING3: Final = "in ring 3"
USER: Final = "an address of the user"
NEGATIVE: Final = "negative values in memory"
CROSSING: Final = "an operand that crosses a page"
INTERRUPTS_ON: Final = "interrupts on"
INTERRUPTS_OFF: Final = "interrupts off"
CHANGES: Final = "an instruction that changes under the handler"
NEW_ADDRESS: Final = f"{CHANGES} to one with another address"
NEW_DIRECTION: Final = f"{CHANGES} to one of another direction"
NEW_WIDTH: Final = f"{CHANGES} to one of another width"
STRADDLING: Final = "an operand on private memory and MMIO"
PROCESSORS: Final = "a leaf of the processor's"
OTHER_SUBLEAF: Final = "a sub-leaf that is not 0"
_RANGES: Final = {"cpuid": "a leaf of the range", "msr": "an MSR of the range"}
_SINGLE: Final = {"cpuid": "leaf", "msr": "MSR", "pio": "port"}
# Bits that a sign may be taken from by mistake.
_SIGN_BITS: Final = (0, 6, 7, 14, 15, 30, 31)
_WIDTHS: Final = (8, 16, 32, 64, 80, 128, 256, 512)


def is_single(word: str) -> bool:
    """Whether a word is about one value only; a more general one is the better cause."""
    return word.startswith(("sub-leaf ", *(f"{name} " for name in _SINGLE.values())))


def of_code(code: bytes) -> frozenset[str]:
    """Return what can be said of an instruction alone, so of a site of the scan too."""
    instruction = decode(code, END, strict=False)
    found = _prefixes(code) | _registers(instruction) | _immediates(instruction)
    if ix.OpKind.MEMORY in memory_kinds(instruction):
        found |= _addressing(instruction)
    return frozenset(found)


#: All that `of_code` can say; the rest cannot be seen in an instruction.
CODE: Final = frozenset(
    (
        *_PREFIX_NAMES.values(),
        "a prefix given twice",
        "more than one segment prefix",
        "a REX prefix",
        "a REX prefix that is not the last",
        "register AH, CH, DH or BH",
        "register SPL, BPL, SIL or DIL",
        "register RSP, ESP, SP or SPL",
        *(f"a register of {bits} bits as operand {at + 1}" for bits in _WIDTHS for at in range(5)),
        "a negative immediate",
        "a RIP-relative address",
        "an absolute address",
        "base register RSP",
        "an index register",
        "a segment with a base",
    )
)


def of_case(case: Case, value: int | None = None, address: int | None = None) -> frozenset[str]:
    """Return what can be said of a case.

    `value` is the operand that it read from memory, `address` the operand's.
    """
    found = set(of_code(case.code))
    found.add(RING3 if case.ring3 else RING0)
    instruction = decode(case.code, END, strict=False)
    if case.user or (case.trap == "mmio" and address_size(instruction) == 4):
        found.add(USER)
    if value is not None:
        found |= _value(value, 8 * ix.MemorySizeExt.size(instruction.memory_size))
    if address is not None:
        found |= {word for step, word in _MISALIGNED.items() if address % step}
    if case.private is not None:
        found.add(STRADDLING)
    elif case.crossing:
        found.add(CROSSING)
    if case.rewritten:
        found |= _changes(case)
    if case.interrupts is not None and case.trap == "hlt":
        found.add(INTERRUPTS_ON if case.interrupts else INTERRUPTS_OFF)
    return frozenset(found | _pinned(case))


def _value(value: int, bits: int) -> set[str]:
    """Say what there is to a value that is extended."""
    sign = value >> bits - 1 & 1
    found = {NEGATIVE} if sign else set()
    for bit in _SIGN_BITS:
        if bit < bits - 1 and value >> bit & 1 != sign:
            found.add(f"values in memory whose bit {bit} is not their sign")
    return found


def _pinned(case: Case) -> set[str]:
    """Say which port, leaf or MSR it is, and which bits of a value are set."""
    subject = {"cpuid": Reg.RAX, "msr": Reg.RCX, "pio": Reg.RDX}.get(case.trap)
    found = set()
    for field, value in case.pinned:
        if field.number == subject:
            found.add(f"{_SINGLE[case.trap]} {value:#x}")
            if case.trap == "cpuid" and value >> 28 != 4:  # SDM volume 2, CPUID
                found.add(PROCESSORS)
            if case.trap in _RANGES:
                found.add(f"{_RANGES[case.trap]} {value >> 28:X}0000000h")
        elif case.trap == "cpuid":
            found |= {f"sub-leaf {value:#x}"} | ({OTHER_SUBLEAF} if value else set())
        else:
            name = f"E{Reg(field.number).name[1:]}"
            found |= {f"bit {bit} of {name} set" for bit in (0, 30, 31) if value >> bit & 1}
    return found


def _changes(case: Case) -> set[str]:
    """Say what the instruction is that the handler finds in place of the one that trapped."""
    old = decode(case.code, END, strict=False)
    new = decode(case.rewritten, END, strict=False)
    found = {CHANGES}
    if (old.memory_base, old.memory_index, old.memory_displacement) != (
        new.memory_base, new.memory_index, new.memory_displacement,
    ):  # fmt: skip
        found.add(NEW_ADDRESS)
    info = ix.InstructionInfoFactory()
    kinds = [[memory.access for memory in info.info(each).used_memory()] for each in (old, new)]
    if kinds[0] != kinds[1]:
        found.add(NEW_DIRECTION)
    if old.memory_size != new.memory_size:
        found.add(NEW_WIDTH)
    return found


def _prefixes(code: bytes) -> set[str]:
    at = 0
    seen: list[int] = []
    while at < len(code) and code[at] in _PREFIX_NAMES:
        seen.append(code[at])
        at += 1
    found = {_PREFIX_NAMES[prefix] for prefix in seen}
    if len(seen) != len(set(seen)):
        found.add("a prefix given twice")
    if len([prefix for prefix in seen if prefix in _SEGMENT_PREFIXES]) > 1:
        found.add("more than one segment prefix")
    if at < len(code) and code[at] & 0xF0 == 0x40:
        found.add("a REX prefix")
        if at + 1 < len(code) and (code[at + 1] & 0xF0 == 0x40 or code[at + 1] in _PREFIX_NAMES):
            found.add("a REX prefix that is not the last")
    return found


def _registers(instruction: ix.Instruction) -> set[str]:
    found = set()
    for number in range(instruction.op_count):
        if instruction.op_kind(number) != ix.OpKind.REGISTER:
            continue
        register = instruction.op_register(number)
        field = field_of(register)
        if field is None:
            continue
        if register in _HIGH:
            found.add("register AH, CH, DH or BH")
        if register in _NEEDS_REX:
            found.add("register SPL, BPL, SIL or DIL")
        if field.number == Reg.RSP and register not in _HIGH:
            found.add("register RSP, ESP, SP or SPL")
        size = ix.RegisterExt.size(register)
        found.add(f"a register of {8 * size} bits as operand {number + 1}")
    return found


def _immediates(instruction: ix.Instruction) -> set[str]:
    """Say whether an immediate has a sign; a port's number has none."""
    if ix.OpKind.MEMORY not in memory_kinds(instruction):
        return set()
    signs = (
        instruction.immediate(number) >> _IMMEDIATES[kind] - 1
        for number in range(instruction.op_count)
        if (kind := instruction.op_kind(number)) in _IMMEDIATES
    )
    return {"a negative immediate"} if any(signs) else set()


def _addressing(instruction: ix.Instruction) -> set[str]:
    found = set()
    base, index = instruction.memory_base, instruction.memory_index
    if base in {ix.Register.RIP, ix.Register.EIP}:
        found.add("a RIP-relative address")
    elif base == ix.Register.NONE and index == ix.Register.NONE:
        found.add("an absolute address")
    if base == ix.Register.RSP:
        found.add("base register RSP")
    if index != ix.Register.NONE:
        found.add("an index register")
    if instruction.memory_segment in {ix.Register.FS, ix.Register.GS}:
        found.add("a segment with a base")
    return found
