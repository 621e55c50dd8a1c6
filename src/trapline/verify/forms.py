"""Instructions, made by going through the opcode maps: nothing is chosen by hand.

`probes` yields one instruction for each form that the decoder knows and that reaches memory or
traps; what the handler then takes upon itself is varied by `trapline.verify.cases`.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

import iced_x86 as ix

from trapline.isa import traps
from trapline.results.trapclass import EMULATED_CLASSES, EmulatedClass
from trapline.verify.inputs import memory_kinds
from trapline.verify.testpages import OPERAND, OPERAND_BELOW_4G

# Immediates and displacements are cut from this: no byte twice, the first of an imm8 positive.
_TAIL: Final = bytes((0x5A, 0xC3, 0x17, 0xE9, 0x2D, 0x84, 0x71, 0xB6))
_RM_RBX: Final = 3
_REX_W: Final = 0x48
_LEGACY_PREFIXES: Final = (b"", b"\x66", b"\xf2", b"\xf3")
_MAPS: Final = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")
# What is no opcode in its map: prefixes, escapes and the vector encodings.
_PREFIXES: Final = frozenset(
    (15, 38, 46, 54, 62, *range(64, 80), 98, 100, 101, 102, 103, 196, 197, 213, 240, 242, 243)
)
_NO_OPCODE: Final = {b"": _PREFIXES, b"\x0f": frozenset((0x38, 0x3A))}
_NO_FLOW: Final = frozenset(
    (
        ix.FlowControl.NEXT,
        ix.FlowControl.EXCEPTION,
        ix.FlowControl.XBEGIN_XABORT_XEND,
    )
)


class Form(NamedTuple):
    """One form: the decoder's name of it and an instruction."""

    trap: EmulatedClass
    code: int  # of iced_x86.Code
    name: str
    bytes: bytes


def classify(instruction: ix.Instruction) -> EmulatedClass | None:
    """Say as which class an instruction traps that is given MMIO to work on."""
    if instruction.is_invalid:
        return None
    trap = traps.classify(instruction)
    if trap is not None:
        return next((kind for kind in EMULATED_CLASSES if kind == trap.kind), None)
    return "mmio" if memory_kinds(instruction) and _touches(instruction) else None


def name_of(instruction: ix.Instruction) -> str:
    """Return the manual's name of a form; vector forms with their encoding."""
    info = instruction.op_code()
    if info.encoding == ix.EncodingKind.LEGACY:
        return str(info.instruction_string)
    return f"{info.instruction_string} [{info.op_code_string}]"


def probes() -> Iterator[Form]:
    """Yield the forms, by opcode map; each one once."""
    seen: set[int] = set()
    for raw in _templates():
        instruction = ix.Decoder(64, raw).decode()
        trap = classify(instruction)
        if trap is None or instruction.code in seen:
            continue
        seen.add(instruction.code)
        code = _aimed(raw[: instruction.len], instruction)
        yield Form(trap, instruction.code, name_of(instruction), code)


def _aimed(code: bytes, instruction: ix.Instruction) -> bytes:
    """Let an address inside the instruction, as MOV AL,moffs8 has it, be that of the operand."""
    size = instruction.memory_displ_size
    if instruction.memory_base != ix.Register.NONE or size < 4 or trap_by_itself(instruction):
        return code
    address = OPERAND if size == 8 else OPERAND_BELOW_4G
    at = len(code) - size
    return code[:at] + address.to_bytes(size, "little")


def trap_by_itself(instruction: ix.Instruction) -> bool:
    """Whether it traps without an operand in memory."""
    return traps.classify(instruction) is not None


def _touches(instruction: ix.Instruction) -> bool:
    """Whether the operand is accessed, and control does not leave through it."""
    if instruction.flow_control not in _NO_FLOW:
        return False
    used = ix.InstructionInfoFactory().info(instruction).used_memory()
    return any(memory.access != ix.OpAccess.NO_MEM_ACCESS for memory in used)


def _templates() -> Iterator[bytes]:
    """Yield bytes to decode: each opcode, ModRM.reg and mandatory prefix."""
    for map_ in _MAPS:
        for opcode in sorted(set(range(256)) - _NO_OPCODE.get(map_, frozenset())):
            for prefix in _LEGACY_PREFIXES:
                for rex in (b"", bytes([_REX_W])):
                    for reg in range(8):
                        modrm = bytes([reg << 3 | _RM_RBX])
                        yield prefix + rex + map_ + bytes([opcode]) + modrm + _TAIL
    # Addresses of their own, and those of 32 bits.
    for opcode in sorted(set(range(256)) - _PREFIXES):
        for prefix in (b"\x67", b"\x67\x66", b"\x67\x48"):
            yield prefix + bytes([opcode, _RM_RBX]) + _TAIL
    yield from _vex()
    yield from _evex()


def _vex() -> Iterator[bytes]:
    """VEX with three bytes: SDM volume 2, 2.3.5; vvvv = 1111b, then register 1 for BMI."""
    for map_ in (1, 2, 3):
        for opcode in range(256):
            for low in range(32):  # W, vvvv is 0 or not, L, pp
                vvvv = 0x78 if not low & 8 else 0x70
                byte = (low & 16) << 3 | vvvv | low & 7
                for reg in (1, 2, 3, 4, 5, 6, 7):
                    modrm = bytes([reg << 3 | _RM_RBX])
                    yield bytes([0xC4, 0xE0 | map_, byte, opcode]) + modrm + _TAIL


def _evex() -> Iterator[bytes]:
    """EVEX: SDM volume 2, 2.7.1; no mask and mask k1."""
    for map_ in (1, 2, 3, 5, 6):
        for opcode in range(256):
            for low in range(48):  # W, pp, L'L
                w, pp, length = low & 1, low >> 1 & 3, low >> 3
                if length > 2:
                    continue
                for mask in (0, 1):
                    for vvvv in (0x78, 0x70):
                        head = [0x62, 0xF0 | map_, w << 7 | vvvv | 4 | pp, length << 5 | 8 | mask]
                        yield bytes([*head, opcode, 1 << 3 | _RM_RBX]) + _TAIL
