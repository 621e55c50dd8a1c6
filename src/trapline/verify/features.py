"""What there is to an instruction and its circumstances, as words that causes are made of."""

from typing import Final

import iced_x86 as ix

from trapline.cpu.engine import Reg
from trapline.verify.cases import Case
from trapline.verify.inputs import address_size, decode, field_of, memory_kinds, pattern
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
_LEAVES: Final = tuple(f"a leaf of the range {number:X}0000000h" for number in range(16))
#: What cannot be seen in an instruction.
CIRCUMSTANCES: Final = frozenset(
    (
        RING0,
        RING3,
        USER,
        NEGATIVE,
        CROSSING,
        INTERRUPTS_ON,
        INTERRUPTS_OFF,
        CHANGES,
        NEW_ADDRESS,
        NEW_DIRECTION,
        NEW_WIDTH,
        *_LEAVES,
    )
)


def of_code(code: bytes) -> frozenset[str]:
    """Return what can be said of an instruction alone, so of a site of the scan too."""
    instruction = decode(code, END, strict=False)
    found = _prefixes(code) | _registers(instruction)
    if ix.OpKind.MEMORY in memory_kinds(instruction):
        found |= _addressing(instruction)
    return frozenset(found)


def of_case(case: Case) -> frozenset[str]:
    """Return what can be said of a case."""
    found = set(of_code(case.code))
    found.add(RING3 if case.ring3 else RING0)
    instruction = decode(case.code, END, strict=False)
    if case.user or (case.trap == "mmio" and address_size(instruction) == 4):
        found.add(USER)
    if case.trap == "mmio" and _reads(instruction) and pattern(case.seed)[0] >> 7:
        found.add(NEGATIVE)
    if case.crossing:
        found.add(CROSSING)
    if case.rewritten:
        found |= _changes(case)
    if case.interrupts is not None and case.trap == "hlt":
        found.add(INTERRUPTS_ON if case.interrupts else INTERRUPTS_OFF)
    for field, value in case.pinned:
        if case.trap == "cpuid" and field.number == Reg.RAX:
            found.add(_LEAVES[value >> 28])
    return frozenset(found)


def _reads(instruction: ix.Instruction) -> bool:
    used = ix.InstructionInfoFactory().info(instruction).used_memory()
    return any(memory.access != ix.OpAccess.WRITE for memory in used)


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
