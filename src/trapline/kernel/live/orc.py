"""The kernel's ORC unwind tables: for each code address, where the previous frame is.

objtool writes two parallel arrays into vmlinux and into every module: `.orc_unwind_ip` holds
one 32-bit offset per entry, relative to its own address, to the first instruction the entry
covers; `.orc_unwind` holds six bytes for it (arch/x86/include/asm/orc_types.h). What the last two
bytes say has changed three times without a version number:

====== =========================================================== ==========================
format bits of the flags word, from bit 0                          since
====== =========================================================== ==========================
1      sp_reg:4 bp_reg:4 type:2 end:1                              ee9f8fce9964 (v4.14)
2      sp_reg:4 bp_reg:4 type:2 signal:1 end:1                     ffb1b4a41016 (v6.3)
3      sp_reg:4 bp_reg:4 type:3 signal:1                           fb799447ae29 (v6.4)
4      the same, with other numbers for the registers, and RAX     v7.x; 7.2.11 has it
====== =========================================================== ==========================

Since b9f174c811e3 (v6.4, and v6.3.10) `.orc_header` holds a hash of the structure's source, which
tells 2, 3 and 4 apart; before that only the release does. Tables are kept here in format 3.
Offsets are relative to the table, so addresses are link-time addresses whatever the slide.
"""

import re
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import numpy as np

from trapline.base.errors import BadImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trapline.kernel.elf.file import ElfFile

# scripts/orc_hash.sh over orc_types.h of the release that introduced the format.
_HEADER_FORMATS: Final = {
    bytes.fromhex("db84aed4103b31dd51e017f8f79783ca985c2c51"): 2,
    bytes.fromhex("fe5d32bf581bd63b2ca9a5c65ba5a625eab3fe24"): 3,
    bytes.fromhex("137c36ad7627c4dd55932176bb0ecdbd5041fc82"): 4,
}
_ENTRY_SIZE: Final = 6
_IP_SIZE: Final = 4


class OrcReg(IntEnum):
    """The register an offset is relative to (ORC_REG_* of orc_types.h)."""

    UNDEFINED = 0
    PREV_SP = 1
    DX = 2
    DI = 3
    BP = 4
    SP = 5
    R10 = 6
    R13 = 7
    BP_INDIRECT = 8
    SP_INDIRECT = 9
    AX = 10  # not in format 3


# The registers of format 4 in its order; numbers that it does not have are none that is known.
_FORMAT_4: Final = (
    OrcReg.UNDEFINED, OrcReg.AX, OrcReg.DX, OrcReg.SP, OrcReg.BP, OrcReg.DI, OrcReg.R10, OrcReg.R13,
    OrcReg.PREV_SP, OrcReg.SP_INDIRECT, OrcReg.BP_INDIRECT, *range(11, 16),
)  # fmt: skip


class OrcType(IntEnum):
    """What lies at the previous stack pointer (ORC_TYPE_* of orc_types.h, format 3)."""

    UNDEFINED = 0
    END_OF_STACK = 1
    CALL = 2
    REGS = 3
    REGS_PARTIAL = 4


class OrcEntry(NamedTuple):
    """How to find the frame before this one; offsets in bytes."""

    sp_offset: int
    bp_offset: int
    sp_reg: int
    bp_reg: int
    type: int
    signal: bool

    @property
    def is_plain_call(self) -> bool:
        """Whether the return address is on top of the stack: a function's first instruction."""
        return (self.type, self.sp_reg, self.sp_offset) == (OrcType.CALL, OrcReg.SP, 8)


# A jump to NULL has just pushed the return address (null_orc_entry, unwind_orc.c).
NULL_CALL: Final = OrcEntry(8, 0, OrcReg.SP, OrcReg.UNDEFINED, OrcType.CALL, signal=False)
# Generated code is assumed to keep a frame pointer (orc_fp_entry, unwind_orc.c).
FRAME_POINTER: Final = OrcEntry(16, -16, OrcReg.BP, OrcReg.PREV_SP, OrcType.CALL, signal=False)


def orc_format(header: bytes | None, release: str | None) -> int | None:
    """Tell the table format from `.orc_header`, or without one from the kernel release.

    None means that the format is newer than this table, or that nothing tells it.
    """
    if header:
        return _HEADER_FORMATS.get(header)
    match = re.match(r"(\d{1,4})\.(\d{1,4})", release or "")
    if match is None:
        return None
    version = int(match[1]), int(match[2])
    if version >= (6, 4):
        return 3
    return 2 if version == (6, 3) else 1


def orc_spans(elf: "ElfFile") -> "tuple[NDArray[np.uint64], NDArray[np.uint64]]":
    """Return the bounds of the code that the table of a linked kernel describes, by address.

    In each format, known or not, an entry whose flags are 0 says that nothing is known.
    """
    section = elf.section(".orc_unwind_ip")
    words = np.frombuffer(bytes(elf.contents(".orc_unwind")), "<u2")
    offsets = np.frombuffer(bytes(elf.contents(".orc_unwind_ip")), np.uint8)
    count = len(offsets) // _IP_SIZE
    if section is None or not count or len(words) != count * _ENTRY_SIZE // 2:
        return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    flags = words.reshape(count, -1)[:, -1]
    relative = offsets[: count * _IP_SIZE].view("<i4").astype(np.int64).view(np.uint64)
    slots = np.arange(count, dtype=np.uint64) * np.uint64(_IP_SIZE)
    addresses = np.uint64(section.address) + slots + relative
    # Section terminators are weak: a real entry at the same address wins, so it goes last.
    order = np.lexsort((flags != 0, addresses))
    addresses, flags = addresses[order], flags[order]
    described = np.flatnonzero(flags[:-1])
    return addresses[described], addresses[described + 1]


class OrcTable:
    """One sorted table. `addresses` is uint64, the other arrays run beside it.

    `version` is the format that it was read from.
    """

    def __init__(
        self,
        addresses: "NDArray[np.uint64]",
        sp_offsets: "NDArray[np.int16]",
        bp_offsets: "NDArray[np.int16]",
        flags: "NDArray[np.uint16]",
        version: int,
    ) -> None:
        self.addresses = addresses
        self.version = version
        self._sp_offsets = sp_offsets
        self._bp_offsets = bp_offsets
        self._flags = flags

    @classmethod
    def parse(cls, ip: bytes, ip_address: int, unwind: bytes, version: int) -> Self:
        """Build from section contents; `ip_address` is where `.orc_unwind_ip` is linked.

        Raises BadImageError when the two sections do not belong together.
        """
        count = len(ip) // _IP_SIZE
        if len(ip) % _IP_SIZE or len(unwind) != count * _ENTRY_SIZE:
            raise BadImageError(
                "the sections .orc_unwind and .orc_unwind_ip do not have the same number of "
                "entries; the image is damaged, take it from its package again."
            )
        offsets = np.frombuffer(ip, dtype="<i4").astype(np.int64)
        slots = np.arange(count, dtype=np.uint64) * np.uint64(_IP_SIZE)
        base = np.uint64(ip_address & 0xFFFF_FFFF_FFFF_FFFF)
        addresses = base + slots + offsets.astype(np.uint64)
        words = np.frombuffer(unwind, dtype="<u2").reshape(count, 3)
        flags = _to_format_3(words[:, 2], version)
        # Section terminators are weak: a real entry at the same address wins, so it goes last.
        # vmlinux is sorted at build time (f14bf6a350df, v5.6), a module only when it is loaded.
        order = np.lexsort((flags & 0x700 != 0, addresses))
        return cls(
            addresses[order],
            words[order, 0].astype(np.int16),
            words[order, 1].astype(np.int16),
            flags[order],
            version,
        )

    @classmethod
    def of_vmlinux(cls, elf: "ElfFile", release: str | None) -> Self | None:
        """Read the table of a linked kernel; None without one, or where its format is not known.

        `release` is only asked of kernels before v6.4.
        """
        section = elf.section(".orc_unwind_ip")
        version = orc_format(bytes(elf.contents(".orc_header")), release)
        if section is None or version is None:
            return None
        ip, unwind = elf.contents(section), elf.contents(".orc_unwind")
        return cls.parse(bytes(ip), section.address, bytes(unwind), version)

    def __len__(self) -> int:
        return len(self.addresses)

    def find(self, address: int) -> OrcEntry | None:
        """Return the entry that covers a link-time address, None below the first one."""
        if not 0 <= address < 1 << 64:
            return None
        index = int(np.searchsorted(self.addresses, np.uint64(address), side="right")) - 1
        return None if index < 0 else self._entry(index)

    def _entry(self, index: int) -> OrcEntry:
        flags = int(self._flags[index])
        return OrcEntry(
            sp_offset=int(self._sp_offsets[index]),
            bp_offset=int(self._bp_offsets[index]),
            sp_reg=flags & 0xF,
            bp_reg=flags >> 4 & 0xF,
            type=flags >> 8 & 7,
            signal=bool(flags & 0x800),
        )


def _to_format_3(flags: "NDArray[np.uint16]", version: int) -> "NDArray[np.uint16]":
    """Rewrite the flags word of another format.

    Formats 1 and 2 say "undefined" and "end of stack" through an undefined sp_reg and the end
    bit, and count CALL, REGS and REGS_PARTIAL from 0. Format 1 has no signal bit: there, every
    frame with saved registers is one.
    """
    if version == 3:
        return flags.astype(np.uint16)
    if version == 4:
        numbers = np.array(_FORMAT_4, np.uint16)
        return np.asarray(
            flags & 0xFF00 | numbers[flags & 0xF] | numbers[flags >> 4 & 0xF] << 4, np.uint16
        )
    end_bit = 0x400 if version == 1 else 0x800
    kind = flags >> 8 & 3
    has_no_sp = (flags & 0xF) == 0
    has_ended = (flags & end_bit) != 0
    kinds = np.where(has_no_sp, np.where(has_ended, 1, 0), kind + OrcType.CALL)
    signal = kind > 0 if version == 1 else (flags & 0x400) != 0
    return np.asarray(flags & 0xFF | kinds << 8 | np.where(signal, 0x800, 0), dtype=np.uint16)
