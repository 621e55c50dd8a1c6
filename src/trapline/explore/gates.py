"""The gates of the guest's IDT (SDM 3A, 7.14.1)."""

import struct
from typing import Final, NamedTuple, Self

from trapline.cpu.engine import Vcpu

_SIZE: Final = 16
_GATE: Final = struct.Struct("<HHBBHI")
_IST: Final = 7
_PRESENT: Final = 0x80


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
