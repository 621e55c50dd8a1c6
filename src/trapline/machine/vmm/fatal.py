"""ReportFatalError: the last words of a TD.

Linux sends a message of up to 64 bytes in eight registers (arch/x86/coco/tdx/tdx.c,
`tdx_panic`); other guests may name a page of shared memory with more.
"""

import struct
from typing import Final, NamedTuple

from trapline.cpu.engine import Reg
from trapline.machine.vmm.ghci import GPA_VALID

# In the order of the message's bytes (GHCI 1.5, 3.4).
MESSAGE_REGISTERS: Final = (
    Reg.R14, Reg.R15, Reg.RBX, Reg.RDI, Reg.RSI, Reg.R8, Reg.R9, Reg.RDX,
)  # fmt: skip


class FatalError(NamedTuple):
    """`code` is bits 62:0 of R12; `gpa` is where more information is, if the guest says so."""

    code: int
    message: str
    gpa: int | None


def decode(registers: list[int]) -> FatalError:
    """Read the report out of the registers of the TDVMCALL."""
    raw = b"".join(struct.pack("<Q", registers[register]) for register in MESSAGE_REGISTERS)
    text = raw.partition(b"\0")[0].decode("ascii", "replace")
    message = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    code = registers[Reg.R12]
    gpa = registers[Reg.R13] if code & GPA_VALID else None
    return FatalError(code & ~GPA_VALID, message, gpa)
