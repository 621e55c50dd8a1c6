"""Builds small x86-64 ELF files in memory, sound ones and unsound ones."""

import bz2
import lzma
import struct
import zlib
from dataclasses import dataclass

import lz4.block
import zstandard

SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_NOTE, SHT_NOBITS = 1, 2, 3, 7, 8
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR, SHF_COMPRESSED = 1, 2, 4, 0x800
ET_REL, ET_EXEC = 1, 2


@dataclass
class Part:
    """A section to be: `size` is for SHT_NOBITS only."""

    name: str
    data: bytes = b""
    type: int = SHT_PROGBITS
    flags: int = 0
    address: int = 0
    link: int = 0
    entry_size: int = 0
    size: int | None = None


def build_elf(parts=(), *, kind=ET_EXEC, machine=62, segments=()):
    """Lay out header, program headers, sections and the section header table, in that order."""
    parts = [*parts, Part(".shstrtab", type=SHT_STRTAB)]
    names, name_at = _strings(part.name for part in parts)
    parts[-1].data = names
    body = b"".join(struct.pack("<IIQQQQQQ", *segment) for segment in segments)
    headers = [bytes(64)]
    for part in parts:
        offset = 64 + len(body)
        size = part.size if part.type == SHT_NOBITS else len(part.data)
        headers.append(
            struct.pack(
                "<IIQQQQIIQQ",
                name_at[part.name],
                part.type,
                part.flags,
                part.address,
                offset,
                size,
                part.link,
                0,
                1,
                part.entry_size,
            )
        )
        if part.type != SHT_NOBITS:
            body += part.data
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        kind,
        machine,
        1,
        0x1000,
        64 if segments else 0,
        64 + len(body),
        0,
        64,
        56,
        len(segments),
        64,
        len(headers),
        len(headers) - 1,
    )
    return header + body + b"".join(headers)


def symbols(entries, *, link):
    """Parts .symtab and .strtab of (name, value, section index, type, binding) entries.

    `link` is the index .strtab will have.
    """
    strings, name_at = _strings(entry[0] for entry in entries)
    table = bytes(24) + b"".join(
        struct.pack("<IBBHQQ", name_at[name], binding << 4 | kind, 0, section, value, 8)
        for name, value, section, kind, binding in entries
    )
    return [
        Part(".symtab", table, SHT_SYMTAB, link=link, entry_size=24),
        Part(".strtab", strings, SHT_STRTAB),
    ]


def build_id(identifier):
    """A note section with a GNU build id."""
    note = struct.pack("<III4s", 4, len(identifier), 3, b"GNU\0") + identifier
    return Part(".note.gnu.build-id", note, SHT_NOTE, SHF_ALLOC)


def compressed(name, data, kind="zlib", *, claimed=None):
    """A section with SHF_COMPRESSED; `claimed` is a size that may be a lie."""
    number, packed = (1, zlib.compress(data)) if kind == "zlib" else (2, zstandard.compress(data))
    size = len(data) if claimed is None else claimed
    return Part(name, struct.pack("<IIQQ", number, 0, size, 1) + packed, flags=SHF_COMPRESSED)


def vmlinux(release="6.12.1-test", *, dwarf=True, identifier=b"\x01" * 20, extra=()):
    """What `locate` needs to see of a vmlinux."""
    banner = f"Linux version {release} (someone@somewhere) (gcc) #1 SMP\n".encode()
    parts = [
        Part(".text", b"\x90" * 64, flags=SHF_ALLOC | SHF_EXECINSTR, address=0xFFFFFFFF81000000),
        Part(".rodata", b"\0" * 8 + banner + b"\0", flags=SHF_ALLOC, address=0xFFFFFFFF82000000),
        build_id(identifier),
        *extra,
    ]
    if dwarf:
        parts.append(Part(".debug_info", b"\x11" * 32))
    return build_elf(parts)


def module(release="6.12.1-test", *, dwarf=False, identifier=b"\x02" * 20):
    """What `locate` needs to see of a module."""
    modinfo = f"license=GPL\0vermagic={release} SMP mod_unload \0".encode()
    parts = [
        Part(".text", b"\x90" * 64, flags=SHF_ALLOC | SHF_EXECINSTR),
        Part(".modinfo", modinfo, flags=SHF_ALLOC),
        build_id(identifier),
    ]
    if dwarf:
        parts.append(Part(".debug_info", b"\x11" * 32))
    return build_elf(parts, kind=ET_REL)


def boot_image(kernel, *, version="6.12.1-test (someone) #1 SMP", packed=None, protocol=0x20F):
    """A bzImage: one setup sector of 2, version string, then code and the packed kernel."""
    payload = zlib_gzip(kernel) if packed is None else packed
    setup = bytearray(3 * 512)
    setup[0x1F1] = 2
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<HxxxxxxH", setup, 0x206, protocol, 0x100)
    text = version.encode()
    setup[0x300 : 0x300 + len(text)] = text
    setup[0x211] = 1
    struct.pack_into("<I", setup, 0x214, 0x100000)
    struct.pack_into("<I", setup, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<IBBHI", setup, 0x230, 0x200000, 1, 21, 0x7F, 2047)
    struct.pack_into("<II", setup, 0x248, 0x40, len(payload))
    struct.pack_into("<QIII", setup, 0x258, 0x1000000, 0x3000000, 0x190, 0x200)
    return bytes(setup) + b"\xcc" * 0x40 + payload + b"\xcc" * 0x80


def packed(kernel):
    """Pack a kernel in each way that Linux's build has, its size behind it as the build puts it."""
    block = lz4.block.compress(kernel, store_size=False)
    size = struct.pack("<I", len(kernel))
    return {
        "gzip": zlib_gzip(kernel),
        "xz": lzma.compress(kernel) + size,
        "zstd": zstandard.compress(kernel) + size,
        "lz4": b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block + size,
        "bzip2": bz2.compress(kernel) + size,
        "lzma": lzma.compress(kernel, lzma.FORMAT_ALONE) + size,
    }


def zlib_gzip(data):
    """Gzip without a time stamp."""
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush()


def _strings(names):
    table = b"\0"
    at = {}
    for name in names:
        at.setdefault(name, len(table))
        if at[name] == len(table):
            table += name.encode() + b"\0"
    return table, at
