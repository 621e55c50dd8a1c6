"""One vmlinux from two files: the code of one, the debug information of the other.

RPM distributions split a vmlinux: `vmlinux-RELEASE.debug` has the DWARF, and sections of code
without contents (SHT_NOBITS); the code is in a stripped vmlinux or in the boot image only. Joined
they are what the linker made, but for where things are in the file; it is kept in the cache.

Source: ELF-64 Object File Format; elfutils' eu-unstrip does the same to files that were stripped.
"""

import hashlib
import struct
from typing import TYPE_CHECKING, Final

from trapline.base import files
from trapline.base.errors import BadImageError
from trapline.kernel.elf.file import PT_LOAD, SHT_NOBITS, SHT_PROGBITS, ElfFile
from trapline.kernel.find.deb import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_PAGE: Final = 4096
_ENTRY_AT: Final = 24  # e_entry, e_phoff, e_shoff: ELF-64, figure 3
_COUNTS_AT: Final = 54  # e_phentsize, e_phnum
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_SHDR_SIZE: Final = 64
_TYPE_AT: Final = 4
_OFFSET_AT: Final = 24


def join(
    debug: "Path",
    code: ElfFile,
    source: "Path",
    announce: "Callable[[str], None] | None" = None,
) -> "Path":
    """Return the path of a vmlinux with the DWARF of `debug` and the code of `code`.

    `source` is the file that the code comes from. Raises BadImageError where they are not of one
    build, OutputError or OSError where the cache cannot be written.
    """
    with ElfFile.open(debug) as dwarf:
        if dwarf.build_id is None or dwarf.build_id != code.build_id:
            raise BadImageError(f"{debug} is not of the same build as {source}.")
        target = _place(debug, source, dwarf.build_id)
        if not target.exists():
            if announce is not None:
                announce(f"Joining {debug.name} with the code in {source.name}.")
            target.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(target, map(bytes, _image(dwarf, code)))
    return target


def _place(debug: "Path", source: "Path", build_id: str) -> "Path":
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (debug, source)]
    digest = hashlib.blake2b(repr(states).encode("utf-8", "surrogateescape"), digest_size=8)
    return cache_folder() / "joined" / f"{build_id}-{digest.hexdigest()}" / "vmlinux"


def _image(dwarf: ElfFile, code: ElfFile) -> "Iterator[bytes | memoryview]":
    """Yield the file: that of the DWARF with patched headers, then the segments of the code."""
    size = len(dwarf.data)
    loads = [segment for segment in code.segments if segment.type == PT_LOAD]
    table = _aligned(size)
    offset = _aligned(table + len(loads) * _PHDR.size)
    places = []
    for load in loads:
        places.append(offset)
        offset = _aligned(offset + load.file_size)
    head = bytearray(dwarf.data[:64])
    (section_table,) = struct.unpack_from("<Q", head, _ENTRY_AT + 16)
    struct.pack_into("<QQ", head, _ENTRY_AT, code.entry, table)
    struct.pack_into("<HH", head, _COUNTS_AT, _PHDR.size, len(loads))
    patches = {0: bytes(head)}
    for section in dwarf.sections:
        if section.type != SHT_NOBITS or not section.is_alloc or not section.size:
            continue
        for load, place in zip(loads, places, strict=True):
            within = section.address - load.virtual_address
            if within >= 0 and within + section.size <= load.file_size:
                at = section_table + section.index * _SHDR_SIZE
                header = bytearray(dwarf.data[at : at + _SHDR_SIZE])
                struct.pack_into("<I", header, _TYPE_AT, SHT_PROGBITS)
                struct.pack_into("<Q", header, _OFFSET_AT, place + within)
                patches[at] = bytes(header)
                break
    yield from _patched(dwarf.data, patches)
    yield bytes(table - size)
    segments = b"".join(
        _PHDR.pack(
            *(PT_LOAD, load.flags, place, load.virtual_address, load.physical_address),
            *(load.file_size, load.memory_size, 1),
        )
        for load, place in zip(loads, places, strict=True)
    )
    yield segments
    at = table + len(segments)
    for load, place in zip(loads, places, strict=True):
        yield bytes(place - at)
        yield code.data[load.offset : load.offset + load.file_size]
        at = place + load.file_size


def _patched(data: memoryview, patches: dict[int, bytes]) -> "Iterator[bytes | memoryview]":
    at = 0
    for start, patch in sorted(patches.items()):
        yield data[at:start]
        yield patch
        at = start + len(patch)
    yield data[at:]


def _aligned(offset: int) -> int:
    return -(-offset // _PAGE) * _PAGE
