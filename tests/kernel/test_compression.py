"""Compressed data: every format, what the kernel build appends, and what is broken."""

import bz2
import lzma
import struct
import zlib

import lz4.block
import lz4.frame
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged, only_bad_image

from elf_images import zlib_gzip
from trapline.base.errors import BadImageError
from trapline.kernel.elf.compression import decompress, detect, inflate_section, peek

MIB = 1 << 20
TEXT = b"".join(b"%d: the quick brown fox\n" % number for number in range(3000))


def lz4_legacy(data):
    blocks = [data[i : i + 8 * MIB] for i in range(0, len(data), 8 * MIB)]
    packed = [lz4.block.compress(block, store_size=False) for block in blocks]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(b)) + b for b in packed)


def xz_like_the_kernel(data):
    # scripts/xz_wrap.sh: --check=crc32 --x86 --lzma2
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 32 * MIB}]
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)


PACKERS = {
    "gzip": zlib_gzip,
    "xz": xz_like_the_kernel,
    "zstd": zstandard.ZstdCompressor(write_content_size=False).compress,
    "lz4": lz4.frame.compress,
    "lz4-legacy": lz4_legacy,
    "bzip2": bz2.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}
each_format = pytest.mark.parametrize("codec", PACKERS)


@each_format
def test_unpacks_what_was_packed(codec):
    packed = PACKERS[codec](TEXT)
    assert detect(packed) == codec
    assert decompress(packed, limit=MIB) == TEXT
    assert decompress(memoryview(packed), limit=len(TEXT)) == TEXT


@each_format
def test_ignores_the_appended_size_and_padding(codec):
    packed = PACKERS[codec](TEXT)
    assert decompress(packed + struct.pack("<I", len(TEXT)), limit=MIB) == TEXT
    if codec != "lz4-legacy" or len(TEXT) < 8 * MIB:
        assert decompress(packed + bytes(100), limit=MIB) == TEXT


@each_format
def test_unpacks_streams_one_after_the_other(codec):
    packed = PACKERS[codec](TEXT) + PACKERS[codec](b"the second")
    assert decompress(packed, limit=MIB) == TEXT + b"the second"


@each_format
def test_unpacks_more_than_one_internal_block(codec):
    data = bytes(20 * MIB) + b"end"
    assert decompress(PACKERS[codec](data), limit=32 * MIB) == data


def test_whole_last_block_of_legacy_lz4_with_appended_size():
    data = bytes(16 * MIB)
    packed = lz4_legacy(data)
    assert decompress(packed, limit=16 * MIB) == data
    assert decompress(packed + struct.pack("<I", len(data)), limit=16 * MIB) == data


@each_format
def test_truncated(codec):
    packed = PACKERS[codec](TEXT)
    for cut in (len(packed) // 2, len(packed) - 3):
        with pytest.raises(BadImageError, match=r"^kernel: the .* data is (truncated|corrupt)"):
            decompress(packed[:cut], limit=MIB, name="kernel")


@each_format
def test_output_is_bounded(codec):
    bomb = PACKERS[codec](bytes(64 * MIB))
    with pytest.raises(BadImageError, match=r"^bomb: .* more than the 1 MiB that are allowed"):
        decompress(bomb, limit=MIB, name="bomb")


@each_format
def test_peek_stops_early(codec):
    packed = PACKERS[codec](b"\x7fELF" + bytes(64 * MIB))
    assert peek(packed, 4) == b"\x7fELF"
    assert peek(PACKERS[codec](b"ab"), 4) == b"ab"


def test_huge_lzma_dictionary_is_refused():
    # The header asks for a dictionary of 4 GiB.
    packed = bytearray(lzma.compress(TEXT, lzma.FORMAT_ALONE))
    packed[1:5] = b"\x00\x00\xff\xff"
    with pytest.raises(BadImageError, match="corrupt"):
        decompress(bytes(packed), limit=MIB)


def test_lzo_is_named():
    with pytest.raises(BadImageError, match="LZO compression is not supported"):
        decompress(b"\x89LZO\x00\x0d\x0a\x1a\x0a", limit=MIB)


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"hello", b"\x1f"])
def test_unknown_format(data):
    assert detect(data) is None
    with pytest.raises(BadImageError, match="no known compression format"):
        decompress(data, limit=MIB)


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
def test_section_holds_exactly_what_its_header_says(codec):
    pack = zlib.compress if codec == "zlib" else zstandard.compress
    packed = memoryview(pack(TEXT))
    assert inflate_section(packed, codec, len(TEXT), name="s") == TEXT
    for claimed in (0, len(TEXT) - 1, len(TEXT) + 1):
        with pytest.raises(BadImageError, match=r"^s: "):
            inflate_section(packed, codec, claimed, name="s")
    with pytest.raises(BadImageError, match="corrupt"):
        inflate_section(packed[: len(packed) // 2], codec, len(TEXT), name="s")


def test_section_of_impossible_density_is_refused_before_unpacking():
    with pytest.raises(BadImageError, match="cannot hold"):
        inflate_section(memoryview(zlib.compress(b"a")), "zlib", 1 << 30, name="s")


@each_format
@given(data=st.data())
def test_only_bad_image_error_escapes(codec, data):
    packed = data.draw(damaged(PACKERS[codec](TEXT[:5000]), header=64))
    with only_bad_image():
        assert len(decompress(packed, limit=MIB)) <= MIB
