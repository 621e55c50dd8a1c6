"""Unpacking of compressed kernels, modules and debug sections, with a bound on the output.

The formats are those Linux can be built with (scripts/Makefile.lib, lib/decompress.c): gzip, xz,
zstd, lz4, bzip2 and lzma, recognised by their first bytes. LZO is recognised and refused. For
all but gzip the kernel build appends the unpacked size in 4 bytes, and boot images pad the
payload, so bytes that follow a complete stream are ignored unless they start another stream of
the same format.

Every function here reads hostile input: the output, the decoder's window and the time are
bounded by `limit` and the input size, and all that can go wrong ends in a `BadImageError`.
"""

import bz2
import lzma
import struct
import zlib
from typing import TYPE_CHECKING, Final, Literal, Protocol

import lz4.block
import lz4.frame
import zstandard

from trapline.model.errors import BadImageError

if TYPE_CHECKING:
    from collections.abc import Callable

    _Decoder = Callable[[memoryview, int], bytes]

Codec = Literal["gzip", "xz", "zstd", "lz4", "lz4-legacy", "bzip2", "lzma", "lzo"]
SectionCodec = Literal["zlib", "zstd"]

MAGIC: Final[dict[Codec, bytes]] = {
    "gzip": b"\x1f\x8b\x08",
    "xz": b"\xfd7zXZ\x00",
    "zstd": b"\x28\xb5\x2f\xfd",
    "lz4": b"\x04\x22\x4d\x18",
    "lz4-legacy": b"\x02\x21\x4c\x18",
    "bzip2": b"BZh",
    "lzma": b"\x5d\x00\x00",
    "lzo": b"\x89LZO\x00",
}
# 4 bytes of size are appended by the kernel build; they can look like anything.
_APPENDED_SIZE: Final = 4
# xz and lzma allocate the dictionary the header asks for; the kernel build uses at most 128 MiB.
_LZMA_MEMORY: Final = 256 << 20
_LZ4_LEGACY_BLOCK: Final = 8 << 20
# A zstd block of 4 bytes can unpack to 128 KiB, so 1 KiB of input yields at most 32 MiB.
_ZSTD_STEP: Final = 1 << 10
_STEP: Final = 1 << 20
# No run of deflate is denser than 1032:1 (zlib's technical notes).
_DEFLATE_RATIO: Final = 1032


class _Decompressor(Protocol):
    """What bz2, lzma and lz4.frame have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _TooLargeError(Exception):
    """The output grew beyond the limit."""


def detect(data: bytes | memoryview) -> Codec | None:
    """Name the compression format `data` starts with, None where it is none of them."""
    head = bytes(data[:8])
    for codec, magic in MAGIC.items():
        if head.startswith(magic):
            return codec
    return None


def decompress(data: bytes | memoryview, *, limit: int, name: str = "compressed data") -> bytes:
    """Unpack `data`, which starts with one of the known magics, to at most `limit` bytes.

    `name` is what error messages call the input. Raises BadImageError where the format is
    unknown, the data truncated or corrupt, or the output larger than `limit`.
    """
    codec = detect(data)
    if codec is None:
        raise BadImageError(f"{name}: no known compression format starts here.")
    if codec == "lzo":
        raise BadImageError(
            f"{name}: LZO compression is not supported; give the uncompressed vmlinux."
        )
    view = memoryview(data)
    try:
        return _DECODERS[codec](view, limit)
    except _TooLargeError:
        raise BadImageError(
            f"{name}: the {codec} data unpacks to more than the {limit >> 20} MiB that are allowed."
        ) from None
    except EOFError:
        raise BadImageError(f"{name}: the {codec} data is truncated.") from None
    except (
        zlib.error,
        lzma.LZMAError,
        zstandard.ZstdError,
        lz4.block.LZ4BlockError,
        OSError,
        ValueError,
        RuntimeError,  # lz4.frame reports corrupt frames so
        MemoryError,
    ) as error:
        raise BadImageError(f"{name}: the {codec} data is corrupt ({error}).") from None


def inflate_section(data: memoryview, codec: SectionCodec, size: int, *, name: str) -> bytes:
    """Unpack a compressed ELF section of exactly `size` bytes when unpacked.

    The caller has bounded `size`. Raises BadImageError where the stream does not hold it.
    """
    if codec == "zlib" and size > _DEFLATE_RATIO * len(data) + 1024:
        raise BadImageError(f"{name}: {len(data)} bytes of zlib data cannot hold {size} bytes.")
    try:
        output = _deflate_section(data, size) if codec == "zlib" else _zstd(data, size)
    except (zlib.error, zstandard.ZstdError, EOFError, _TooLargeError, MemoryError) as error:
        reason = str(error) or "truncated, or larger than its header says"
        raise BadImageError(f"{name}: the {codec} data is corrupt ({reason}).") from None
    if len(output) != size:
        raise BadImageError(
            f"{name}: the {codec} data holds {len(output)} bytes, its header says {size}."
        )
    return output


def _deflate_section(data: memoryview, size: int) -> bytes:
    stream = zlib.decompressobj()
    output = stream.decompress(data, size + 1)
    if len(output) <= size and not stream.eof:
        raise EOFError
    return output


def _gzip(view: memoryview, limit: int) -> bytes:
    chunks: list[bytes] = []
    total = 0
    while True:
        stream = zlib.decompressobj(wbits=31)
        pending: bytes | memoryview = view
        while not stream.eof:
            chunk = stream.decompress(pending, _STEP)
            pending = stream.unconsumed_tail
            if not chunk and not pending and not stream.eof:
                raise EOFError
            total = _append(chunks, chunk, total, limit)
        rest = memoryview(stream.unused_data)
        if not _continues(rest, "gzip"):
            return b"".join(chunks)
        view = rest


def _streamed(codec: Codec, create: "Callable[[], _Decompressor]") -> "_Decoder":
    def decode(view: memoryview, limit: int) -> bytes:
        chunks: list[bytes] = []
        total = 0
        while True:
            stream = create()
            pending = bytes(view)
            while not stream.eof:
                chunk = stream.decompress(pending, _STEP)
                if not chunk and not pending and not stream.eof:
                    raise EOFError
                pending = b""
                total = _append(chunks, chunk, total, limit)
            rest = memoryview(stream.unused_data or b"")
            if not _continues(rest, codec):
                return b"".join(chunks)
            view = rest

    return decode


def _zstd(view: memoryview, limit: int) -> bytes:
    chunks: list[bytes] = []
    total = 0
    start = 0
    while True:
        stream = zstandard.ZstdDecompressor().decompressobj()
        while not stream.eof:
            piece = view[start : start + _ZSTD_STEP]
            if not piece:
                raise EOFError
            total = _append(chunks, stream.decompress(piece), total, limit)
            start += len(piece)
        start -= len(stream.unused_data)
        if not _continues(view[start:], "zstd"):
            return b"".join(chunks)


def _lz4_legacy(view: memoryview, limit: int) -> bytes:
    """Unpack the legacy frame: after the magic, blocks of a 4-byte size and LZ4 data each.

    There is no end mark: the data ends with the input, or with the appended size, whose four
    bytes stand where the size of another block would (lib/decompress_unlz4.c).
    """
    chunks: list[bytes] = []
    total = 0
    position = 0
    while len(view) - position > _APPENDED_SIZE:
        (size,) = struct.unpack_from("<I", view, position)
        position += 4
        if view[position - 4 : position] == MAGIC["lz4-legacy"]:
            continue
        if size == 0 or size > len(view) - position:
            raise EOFError
        block = lz4.block.decompress(
            view[position : position + size], uncompressed_size=_LZ4_LEGACY_BLOCK
        )
        position += size
        total = _append(chunks, block, total, limit)
    if not chunks:
        raise EOFError
    return b"".join(chunks)


def _append(chunks: list[bytes], chunk: bytes, total: int, limit: int) -> int:
    total += len(chunk)
    if total > limit:
        raise _TooLargeError
    chunks.append(chunk)
    return total


def _continues(rest: memoryview, codec: Codec) -> bool:
    """Whether the bytes after a complete stream are a further stream of the same format."""
    return len(rest) > _APPENDED_SIZE and detect(rest) == codec


_DECODERS: "Final[dict[str, _Decoder]]" = {
    "gzip": _gzip,
    "xz": _streamed("xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY)),
    "zstd": _zstd,
    "lz4": _streamed("lz4", lz4.frame.LZ4FrameDecompressor),
    "lz4-legacy": _lz4_legacy,
    "bzip2": _streamed("bzip2", bz2.BZ2Decompressor),
    "lzma": _streamed(
        "lzma", lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY)
    ),
}
