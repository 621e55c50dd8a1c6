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

from trapline.base.errors import BadImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    _Decoder = Callable[[memoryview], Iterator[bytes]]

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
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


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
    output = bytearray()
    for chunk in _stream(memoryview(data), name):
        output += chunk
        if len(output) > limit:
            raise BadImageError(
                f"{name}: the data unpacks to more than the {limit >> 20} MiB that are allowed."
            )
    return bytes(output)


def peek(data: bytes | memoryview, size: int, *, name: str = "compressed data") -> bytes:
    """Return up to the first `size` bytes of what `data` unpacks to, with little work.

    Raises BadImageError as `decompress` does, but only for what it comes across.
    """
    output = b""
    for chunk in _stream(memoryview(data), name):
        output += chunk[: size - len(output)]
        if len(output) >= size:
            break
    return output


def _stream(view: memoryview, name: str) -> "Iterator[bytes]":
    codec = detect(view)
    if codec is None:
        raise BadImageError(f"{name}: no known compression format starts here.")
    if codec == "lzo":
        raise BadImageError(
            f"{name}: LZO compression is not supported; give the uncompressed vmlinux."
        )
    try:
        yield from _DECODERS[codec](view)
    except EOFError:
        raise BadImageError(f"{name}: the {codec} data is truncated.") from None
    except (
        zlib.error,
        lzma.LZMAError,
        zstandard.ZstdError,
        lz4.block.LZ4BlockError,
        OSError,  # bz2
        ValueError,
        RuntimeError,  # lz4.frame
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
        output = _deflate_section(data, size) if codec == "zlib" else _zstd_section(data, size)
    except (zlib.error, zstandard.ZstdError, EOFError, MemoryError) as error:
        reason = str(error) or "truncated"
        raise BadImageError(f"{name}: the {codec} data is corrupt ({reason}).") from None
    if len(output) != size:
        raise BadImageError(
            f"{name}: the {codec} data does not hold the {size} bytes its header says."
        )
    return output


def _deflate_section(data: memoryview, size: int) -> bytes:
    stream = zlib.decompressobj()
    output = stream.decompress(data, size + 1)
    if len(output) <= size and not stream.eof:
        raise EOFError
    return output


def _zstd_section(data: memoryview, size: int) -> bytes:
    output = bytearray()
    for chunk in _zstd(data):
        output += chunk
        if len(output) > size:
            break
    return bytes(output)


def _gzip(view: memoryview) -> "Iterator[bytes]":
    while True:
        stream = zlib.decompressobj(wbits=31)
        position = 0
        pending = b""
        while not stream.eof:
            if not pending:
                pending = bytes(view[position : position + _STEP])
                position += len(pending)
            chunk = stream.decompress(pending, _STEP)
            exhausted = not pending
            pending = stream.unconsumed_tail
            if exhausted and not chunk and not stream.eof:
                raise EOFError
            yield chunk
        view = view[position - len(stream.unused_data) :]
        if not _continues(view, "gzip"):
            return


def _streamed(codec: Codec, create: "Callable[[], _Decompressor]") -> "_Decoder":
    def decode(view: memoryview) -> "Iterator[bytes]":
        while True:
            stream = create()
            position = 0
            while not stream.eof:
                piece = bytes(view[position : position + _STEP]) if stream.needs_input else b""
                if stream.needs_input and not piece:
                    raise EOFError
                position += len(piece)
                yield stream.decompress(piece, _STEP)
            view = view[position - len(stream.unused_data or b"") :]
            if not _continues(view, codec):
                return

    return decode


def _zstd(view: memoryview) -> "Iterator[bytes]":
    position = 0
    while True:
        stream = zstandard.ZstdDecompressor().decompressobj()
        while not stream.eof:
            piece = view[position : position + _ZSTD_STEP]
            if not piece:
                raise EOFError
            position += len(piece)
            yield stream.decompress(piece)
        position -= len(stream.unused_data)
        if not _continues(view[position:], "zstd"):
            return


def _lz4_legacy(view: memoryview) -> "Iterator[bytes]":
    """Unpack the legacy frame: after the magic, blocks of a 4-byte size and LZ4 data each.

    There is no end mark. A block that unpacks to less than 8 MiB is the last; after a last one
    of just that size comes the end of the input, or the appended size, whose four bytes stand
    where the size of another block would (lib/decompress_unlz4.c).
    """
    position = 4
    while True:
        if len(view) - position <= _APPENDED_SIZE:
            if position == len(MAGIC["lz4-legacy"]):
                raise EOFError
            return
        (size,) = struct.unpack_from("<I", view, position)
        position += 4
        if size == 0 or size > len(view) - position:
            raise EOFError
        block = lz4.block.decompress(
            view[position : position + size], uncompressed_size=_LZ4_LEGACY_BLOCK
        )
        yield block
        position += size
        if len(block) < _LZ4_LEGACY_BLOCK:
            if not _continues(view[position:], "lz4-legacy"):
                return
            position += 4


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
