"""The ELF header and notes of x86-64 kernels and modules.

Source: System V gABI, chapters 4 ("ELF Header") and 5 ("Note Section").
"""

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from trapline.base.errors import BadImageError
from trapline.base.printable import decode_name

if TYPE_CHECKING:
    from collections.abc import Iterator

# ET_REL (a module), ET_EXEC (a kernel), ET_DYN (an image that is relocated when loaded).
_KINDS: Final = (1, 2, 3)
_EM_X86_64: Final = 62
_MACHINES: Final = {
    2: "SPARC",
    3: "i386",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC 64",
    22: "S/390",
    40: "ARM",
    183: "AArch64",
    243: "RISC-V",
    258: "LoongArch",
}
_EHDR: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_NOTE: Final = struct.Struct("<III")


class Header(NamedTuple):
    """The fields of the ELF header that vary, under the gABI's names without "e_"."""

    type: int
    entry: int
    phoff: int
    phentsize: int
    phnum: int
    shoff: int
    shentsize: int
    shnum: int
    shstrndx: int


@dataclass(frozen=True, slots=True)
class Note:
    """One entry of a note section."""

    section: str
    owner: str
    type: int
    description: bytes


def read_header(name: str, data: memoryview) -> Header:
    """Read the ELF header; raises BadImageError unless it is of an x86-64 kernel or module."""
    if bytes(data[:4]) != b"\x7fELF":
        raise BadImageError(f"{name}: is not an ELF file; give a vmlinux, a vmlinuz or a module.")
    if len(data) < _EHDR.size:
        raise BadImageError(f"{name}: the file is truncated within the ELF header.")
    fields = _EHDR.unpack_from(data)
    width, order = data[4], data[5]
    kind, machine = fields[1:3]
    if order != 1:
        raise BadImageError(f"{name}: is a big-endian ELF file; trapline reads x86-64 kernels.")
    if width != 2:
        raise BadImageError(f"{name}: is a 32-bit ELF file; trapline reads x86-64 kernels.")
    if machine != _EM_X86_64:
        known = _MACHINES.get(machine, f"machine {machine}")
        raise BadImageError(f"{name}: was built for {known}; trapline reads x86-64 kernels.")
    if kind not in _KINDS:
        raise BadImageError(f"{name}: is neither a kernel nor a module (ELF type {kind}).")
    _, _, _, _, entry, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, shstrndx = fields
    return Header(kind, entry, phoff, phentsize, phnum, shoff, shentsize, shnum, shstrndx)


def parse_notes(section: str, data: memoryview) -> "Iterator[Note]":
    """Yield the entries of a note section; a malformed tail ends it."""
    position = 0
    while position + _NOTE.size <= len(data):
        name_size, size, kind = _NOTE.unpack_from(data, position)
        name_at = position + _NOTE.size
        start = name_at + (name_size + 3 & ~3)
        if start + size > len(data):
            return
        owner = bytes(data[name_at : name_at + name_size]).rstrip(b"\0")
        yield Note(section, decode_name(owner), kind, bytes(data[start : start + size]))
        position = start + (size + 3 & ~3)
