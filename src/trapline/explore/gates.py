"""The gates of the guest's IDT (SDM 3A, 7.14.1), and how many ways into its kernel they are."""

import struct
from typing import Final, NamedTuple, Self

import iced_x86 as ix

from trapline.cpu.engine import Vcpu

_SIZE: Final = 16
_GATE: Final = struct.Struct("<HHBBHI")
_IST: Final = 7
_PRESENT: Final = 0x80
_FIRST_EXTERNAL: Final = 0x20  # those below are exceptions
_VECTORS: Final = 256
_STUB: Final = 32  # bytes of a stub that are looked at
# What a stub may do before it jumps: note its vector.
_NOTES: Final = (ix.Mnemonic.ENDBR64, ix.Mnemonic.NOP, ix.Mnemonic.PUSH)


class Gate(NamedTuple):
    """Where a vector leads; `ist` is 0 for one that switches stacks only on the way from CPL 3."""

    handler: int
    ist: int
    is_present: bool

    @classmethod
    def read(cls, vcpu: Vcpu, vector: int) -> Self | None:
        """Read the gate of a vector; None where the IDT has none, or is not mapped."""
        table = vcpu.segment("idtr")
        at = vector * _SIZE
        if at + _SIZE - 1 > table.limit:
            return None
        data = vcpu.read(table.base + at, _SIZE)
        if data is None:
            return None
        low, _, ist, attributes, middle, high = _GATE.unpack_from(data)
        return cls(low | middle << 16 | high << 32, ist & _IST, bool(attributes & _PRESENT))


def ways_in(vcpu: Vcpu) -> tuple[int, ...]:
    """Return the vectors that the host may post, one for each way into the kernel, in order.

    Stubs that only note their vector and jump to one and the same place are one way.
    """
    ways: dict[int, int] = {}
    for vector in range(_FIRST_EXTERNAL, _VECTORS):
        gate = Gate.read(vcpu, vector)
        if gate is not None and gate.is_present:
            ways.setdefault(_behind_stub(vcpu, gate.handler), vector)
    return tuple(sorted(ways.values()))


def _behind_stub(vcpu: Vcpu, handler: int) -> int:
    """Return where a stub jumps to, or the handler itself if it is no stub."""
    data = vcpu.read(handler, _STUB)
    if data is None:
        return handler
    for instruction in ix.Decoder(64, data, ip=handler):
        if instruction.mnemonic == ix.Mnemonic.JMP and instruction.is_jmp_short_or_near:
            return instruction.near_branch_target
        if instruction.mnemonic not in _NOTES:
            break
    return handler
