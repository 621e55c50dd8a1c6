"""Opening ELF files: what is sound is read, what is not gives one sentence."""

import lzma
import os
import shutil
import struct
import subprocess

import pytest
import zstandard
from hypothesis import given
from mutations import damaged, only_bad_image

from elf_images import (
    ET_REL,
    SHF_ALLOC,
    SHF_EXECINSTR,
    SHT_NOBITS,
    SHT_STRTAB,
    SHT_SYMTAB,
    Part,
    build_elf,
    build_id,
    compressed,
    symbols,
    vmlinux,
)
from trapline.base.errors import BadImageError, KernelNotFoundError
from trapline.kernel.binary import open_module_files
from trapline.kernel.elf.file import MAX_MODULE, ElfFile
from trapline.kernel.elf.symtab import STT_FUNC

TEXT = b"\x0f\xa2\xc3" * 100
DWARF = bytes(range(256)) * 64
SYMBOLS = [
    ("start", 0x1000, 1, 2, 1),
    ("alias_of_start", 0x1000, 1, 2, 0),
    ("twin", 0x1008, 1, 2, 0),
    ("twin", 0x1010, 1, 2, 0),
    ("elsewhere", 0, 0, 0, 1),
]


def sample():
    return build_elf(
        [
            Part(".text", TEXT, flags=SHF_ALLOC | SHF_EXECINSTR, address=0x1000),
            Part(".bss", type=SHT_NOBITS, flags=SHF_ALLOC, address=0x2000, size=0x5000),
            build_id(b"\xab\xcd" * 10),
            compressed(".debug_info", DWARF, "zlib"),
            compressed(".debug_line", DWARF, "zstd"),
            Part(
                ".zdebug_str",
                b"ZLIB" + len(DWARF).to_bytes(8, "big") + compressed("", DWARF).data[24:],
            ),
            *symbols(SYMBOLS, link=8),
        ],
        segments=[(1, 5, 0x40, 0x1000, 0x1000, 0x20, 0x40, 0x1000)],
    )


def test_sections_and_contents():
    with ElfFile.open(sample()) as elf:
        text = elf.section(".text")
        assert (text.address, text.size, text.is_alloc, text.is_executable) == (
            0x1000,
            300,
            True,
            True,
        )
        assert bytes(elf.contents(".text")) == TEXT
        assert elf.section(".bss").size == 0x5000
        assert bytes(elf.contents(".bss")) == b""
        assert bytes(elf.contents(".absent")) == b""
        assert elf.section(".absent") is None
        assert elf.build_id == "abcd" * 10
        assert not elf.is_relocatable
        assert elf.segments[0].memory_size == 0x40


def test_compressed_sections_are_unpacked():
    with ElfFile.open(sample()) as elf:
        for name, codec in (
            (".debug_info", "zlib"),
            (".debug_line", "zstd"),
            (".debug_str", "zlib"),
        ):
            assert elf.section(name).codec == codec
            assert elf.section(name).size == len(DWARF)
            assert bytes(elf.contents(name)) == DWARF


def test_symbols():
    with ElfFile.open(sample()) as elf:
        table = elf.symbols
        assert table.names == ["", *(entry[0] for entry in SYMBOLS)]
        assert table.by_name["twin"] == [3, 4]
        assert table.address("start") == table.address("alias_of_start") == 0x1000
        assert table.address("elsewhere") is None
        assert table.address("unknown") is None
        assert (table.kinds == STT_FUNC).sum() == 4
        assert table.bindings.tolist()[1:] == [1, 0, 0, 0, 1]
        assert table.section_indices.tolist() == [0, 1, 1, 1, 1, 0]


def test_stripped_file_has_no_symbols_and_no_build_id():
    with ElfFile.open(build_elf([Part(".text", TEXT)])) as elf:
        assert len(elf.symbols) == 0
        assert elf.symbols.by_name == {}
        assert elf.build_id is None


def test_more_than_64k_sections():
    # Count and name index move to section 0 (gABI, "e_shnum").
    image = bytearray(build_elf([Part(f".s{i}") for i in range(0xFF10)]))
    (count, names) = struct.unpack_from("<HH", image, 60)
    (table,) = struct.unpack_from("<Q", image, 40)
    struct.pack_into("<HH", image, 60, 0, 0xFFFF)
    struct.pack_into("<Q", image, table + 32, count)
    struct.pack_into("<I", image, table + 40, names)
    with ElfFile.open(bytes(image)) as elf:
        assert len(elf.sections) == 0xFF12
        assert elf.section(".s65000") is not None


@pytest.mark.parametrize("suffix", ["", ".xz", ".zst", ".gz"])
def test_opens_files_compressed_or_not(tmp_path, suffix):
    pack = {
        "": bytes,
        ".xz": lzma.compress,
        ".zst": zstandard.compress,
        ".gz": __import__("gzip").compress,
    }[suffix]
    path = tmp_path / f"module.ko{suffix}"
    path.write_bytes(pack(sample()))
    with ElfFile.open(path) as elf:
        assert bytes(elf.contents(".text")) == TEXT
        assert elf.name == str(path)


def test_arrays_outlive_the_file(tmp_path):
    path = tmp_path / "vmlinux"
    path.write_bytes(sample())
    with ElfFile.open(path) as elf:
        text, records = elf.contents(".text"), elf.symbols.records
    assert bytes(text) == TEXT
    assert records["value"][1] == 0x1000


def test_real_object_agrees_with_readelf(tmp_path):
    source = tmp_path / "a.c"
    source.write_text("int twice(int x) { return 2 * x; } static int own = 4; int *p = &own;")
    compiler = shutil.which("gcc")
    subprocess.run([compiler, "-g", "-gz=zlib", "-c", source, "-o", tmp_path / "a.o"], check=True)
    listing = subprocess.run(
        ["readelf", "-sW", tmp_path / "a.o"], check=True, capture_output=True, text=True
    ).stdout
    with ElfFile.open(tmp_path / "a.o") as elf:
        assert elf.is_relocatable
        assert elf.section(".debug_info").codec == "zlib"
        assert len(elf.contents(".debug_info")) == elf.section(".debug_info").size
        for name in ("twice", "own", "p"):
            row = next(line.split() for line in listing.splitlines() if line.endswith(f" {name}"))
            index = elf.symbols.by_name[name][0]
            assert int(row[0].rstrip(":")) == index
            assert int(row[1], 16) == elf.symbols.records["value"][index]
            assert int(row[6]) == elf.symbols.section_indices[index]


def patched(offset, layout, *values):
    image = bytearray(sample())
    struct.pack_into(layout, image, offset, *values)
    return bytes(image)


def with_section(index, offset, layout, value):
    image = bytearray(sample())
    (table,) = struct.unpack_from("<Q", image, 40)
    struct.pack_into(layout, image, table + index * 64 + offset, value)
    return bytes(image)


HOSTILE = {
    "empty": (b"", "is not an ELF file"),
    "text": (b"#!/bin/sh\n", "is not an ELF file"),
    "cut in the header": (sample()[:40], "truncated within the ELF header"),
    "cut in the sections": (sample()[:500], "section header table is not inside"),
    "32 bit": (patched(4, "B", 1), "is a 32-bit ELF file"),
    "big endian": (patched(5, "B", 2), "is a big-endian ELF file"),
    "aarch64": (patched(18, "<H", 183), "was built for AArch64"),
    "unheard of": (patched(18, "<H", 4711), "was built for machine 4711"),
    "core file": (patched(16, "<H", 4), "neither a kernel nor a module"),
    "table far away": (patched(40, "<Q", 1 << 62), "section header table is not inside"),
    "odd entry size": (patched(58, "<H", 40), "section header table is not inside"),
    "no names": (patched(62, "<H", 1), "section name table is missing"),
    "segments far away": (patched(32, "<Q", 1 << 60), "program header table is not in the file"),
    "segment too long": (patched(64 + 32, "<Q", 1 << 50), "a segment at offset"),
    "huge segment": (patched(64 + 40, "<Q", (1 << 64) - 1), "a segment at offset"),
    "section far away": (with_section(1, 24, "<Q", 1 << 63), "section .text at offset"),
    "section too long": (with_section(1, 32, "<Q", 1 << 40), "section .text at offset"),
    "section above memory": (with_section(1, 16, "<Q", (1 << 64) - 1), "beyond the address space"),
    "bad name": (with_section(1, 0, "<I", 1 << 30), "section 1 has no valid name"),
    "huge .bss": (with_section(2, 32, "<Q", 1 << 40), "claim to unpack to"),
    "many sections": (
        with_section(0, 32, "<Q", 1 << 32)[:60]
        + bytes(2)
        + with_section(0, 32, "<Q", 1 << 32)[62:],
        "are more than any kernel has",
    ),
    "overlap": (
        build_elf([Part(".a", bytes(1 << 16))])[:-128]
        + struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, 64, 1 << 16, 0, 0, 1, 0) * 2,
        "section name table is missing",
    ),
    "zlib bomb": (build_elf([compressed(".debug_info", b"", claimed=1 << 40)]), "claim to unpack"),
    "unknown packing": (
        build_elf([Part(".debug_info", struct.pack("<IIQQ", 9, 0, 1, 1), flags=0x800)]),
        "unknown compression type 9",
    ),
    "no packing header": (
        build_elf([Part(".debug_info", b"abc", flags=0x800)]),
        "has no compression header",
    ),
    "no zdebug header": (build_elf([Part(".zdebug_info", b"x" * 40)]), "no compression header"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_gives_one_sentence(case):
    image, message = HOSTILE[case]
    with pytest.raises(BadImageError, match=message) as caught:
        ElfFile.open(image, name="vmlinux")
    assert str(caught.value).startswith("vmlinux: ")
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_overlapping_sections_are_refused():
    image = bytearray(build_elf([Part(".a", bytes(4096)), Part(".b"), Part(".c")]))
    (table,) = struct.unpack_from("<Q", image, 40)
    for index in (2, 3):
        struct.pack_into("<QQ", image, table + index * 64 + 24, 64, 4096)
    with pytest.raises(BadImageError, match="sections overlap"):
        ElfFile.open(bytes(image))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Part(".symtab", bytes(48), SHT_SYMTAB, link=7)], "links to no string table"),
        (
            [Part(".symtab", bytes(47), SHT_SYMTAB, link=2), Part(".strtab", b"\0", SHT_STRTAB)],
            "cut off within a symbol",
        ),
        (
            [
                Part(".symtab", struct.pack("<IBBHQQ", 99, 0, 0, 0, 0, 0), SHT_SYMTAB, link=2),
                Part(".strtab", b"\0abc\0", SHT_STRTAB),
            ],
            "outside of the string table",
        ),
        (
            [
                Part(".symtab", struct.pack("<IBBHQQ", 1, 0, 0, 0, 0, 0), SHT_SYMTAB, link=2),
                Part(".strtab", b"\0" + b"a" * 9000 + b"\0", SHT_STRTAB),
            ],
            "longer than any kernel has",
        ),
        (
            # 100,000 symbols that share one long name: 400 MB of names in a file of 2.4 MB.
            [
                Part(
                    ".symtab",
                    struct.pack("<IBBHQQ", 1, 0, 0, 0, 0, 0) * 100_000,
                    SHT_SYMTAB,
                    link=2,
                ),
                Part(".strtab", b"\0" + b"a" * 4000 + b"\0", SHT_STRTAB),
            ],
            "longer than any kernel has",
        ),
    ],
)
def test_hostile_symbol_tables(parts, message):
    with ElfFile.open(build_elf(parts)) as elf, pytest.raises(BadImageError, match=message):
        _ = elf.symbols


def test_note_with_a_lying_size_ends_its_section():
    note = struct.pack("<III4s", 4, 1 << 31, 3, b"GNU\0")
    with ElfFile.open(build_elf([Part(".notes", note, 7)])) as elf:
        assert elf.build_id is None


def test_files_that_cannot_be_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, reason in (
        (tmp_path / "absent", "no such file"),
        (tmp_path, "directory|regular file"),
        (tmp_path / "fifo", "is not a regular file"),
        ("with\0zero", "not valid"),
    ):
        with pytest.raises(KernelNotFoundError, match=reason):
            ElfFile.open(path)
    (tmp_path / "empty").touch()
    with pytest.raises(BadImageError, match="is not an ELF file"):
        ElfFile.open(tmp_path / "empty")


def test_compressed_file_with_something_else_inside(tmp_path):
    path = tmp_path / "vmlinux.xz"
    path.write_bytes(lzma.compress(b"hello"))
    with pytest.raises(BadImageError, match="is not an ELF file"):
        ElfFile.open(path)


def test_names_cannot_break_out_of_a_line():
    parts = [
        Part(".text\n\x1b[31mred", TEXT, flags=SHF_ALLOC),
        *symbols([("two\nlines", 0, 1, 2, 1), ("größe", 0, 1, 2, 1)], link=3),
    ]
    with ElfFile.open(build_elf(parts)) as elf:
        assert elf.sections[1].name == r".text\n\x1b[31mred"
        assert elf.symbols.names == ["", r"two\nlines", "größe"]
        assert elf.symbols.name(1) == r"two\nlines"


def exercise(image):
    with ElfFile.open(image) as elf:
        for section in elf.sections:
            assert len(elf.contents(section)) in {section.size, 0}
        assert len(elf.symbols.names) == len(elf.symbols)
        list(elf.notes())
        _ = elf.build_id, elf.symbols.by_name, elf.symbols.section_indices


@given(damaged(sample()))
def test_only_our_errors_escape(image):
    with only_bad_image():
        exercise(image)


@given(damaged(vmlinux(), header=128))
def test_only_our_errors_escape_from_a_kernel(image):
    with only_bad_image():
        exercise(image)


def test_module_type():
    with ElfFile.open(build_elf([Part(".text", TEXT)], kind=ET_REL)) as elf:
        assert elf.is_relocatable


def test_a_module_may_unpack_to_less_than_a_kernel(tmp_path):
    large = (MAX_MODULE >> 20) + 1
    module = tmp_path / "large.ko"
    module.write_bytes(with_section(2, 32, "<Q", large << 20))
    with ElfFile.open(module) as elf:
        assert elf.section(".bss").size == large << 20
    with pytest.raises(BadImageError, match=f"more than the {large - 1} MiB that are allowed"):
        open_module_files(module)


def test_a_compressed_file_may_unpack_to_the_limit_only(tmp_path):
    module = tmp_path / "small.ko.xz"
    module.write_bytes(lzma.compress(sample()))
    with ElfFile.open(module, limit=1 << 20) as elf:
        assert bytes(elf.contents(".text")) == TEXT
    with pytest.raises(BadImageError, match=r"small\.ko\.xz"):
        ElfFile.open(module, limit=1 << 10)
