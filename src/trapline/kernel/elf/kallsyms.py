"""The symbols that a stripped kernel carries for itself: the tables behind /proc/kallsyms.

Nothing points to them. They are found by their contents: the token table has the digits as ten
tokens in a row, and its index agrees with it; names, with markers that agree, and offsets are
found from there.

Sources: scripts/kallsyms.c and kernel/kallsyms.c. The offsets stand before the names until v6.1
and behind the token index from v6.2 on (commit 404bad70fcf7); names of 128 tokens and more have
a length of two bytes since v6.1 (commit 73bbb94466fd); from v6.15 on no offset is of a per-CPU
symbol (commit 4b00c1160a13), until then positive ones are absolute and others count down. In v7.2
tables are aligned to 4 bytes, not to 8, and each offset counts from where it stands itself, as
seen in Debian's kernels.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from trapline.kernel.elf.symtab import STT_FUNC, STT_OBJECT, SYMBOL, SymbolTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trapline.kernel.elf.file import ElfFile, Section

_DIGITS: Final = b"\x00" + b"".join(b"%d\x00" % digit for digit in range(10))
_TOKENS: Final = 256
_POINTER: Final = 8
_OFFSET: Final = 4
_ALIGNMENTS: Final = (8, 4)  # bytes, of each table
_PER_MARKER: Final = 256
_MAX_SYMBOLS: Final = 4_000_000
_MAX_TOKEN: Final = 512
_MAX_NAMES: Final = 256 << 20  # bytes of all names
_MOST_PER_NAME: Final = 64  # bytes, compressed, and of the tables that go with a name
_LEAST_PER_NAME: Final = 4
_LONG: Final = 0x80
_CODE_TYPES: Final = frozenset(b"tTwW")
_LAST_SIZE: Final = 16  # bytes, of a section's last symbol: nothing says
_KERNEL: Final = 0xFFFF_FFFF_0000_0000


class _Tokens(NamedTuple):
    """The token table: the tokens, where the table starts and its index ends, and the alignment."""

    tokens: list[bytes]
    start: int
    end: int
    alignment: int


class _Names(NamedTuple):
    """The compressed names: where the table's header is, and each name with its type."""

    header: int
    names: list[bytes]


def read_kallsyms(elf: "ElfFile") -> SymbolTable | None:
    """Recover the symbol table of a stripped vmlinux, or None where there are no such tables.

    Sizes are up to the next symbol. Types are STT_FUNC for code and STT_OBJECT for all else.
    """
    for name in (".rodata", ".data"):
        section = elf.section(name)
        if section is None:
            continue
        data = bytes(elf.contents(section))
        tokens = _find_tokens(data)
        if tokens is None:
            continue
        names = _find_names(data, tokens)
        if names is None:
            continue
        end = max(part.address + part.size for part in _allocated(elf))
        addresses = _find_addresses(data, tokens, names, section, end)
        if addresses is not None:
            return _table(elf, names.names, addresses)
    return None


def _align(position: int, alignment: int) -> int:
    return position + alignment - 1 & -alignment


def _find_tokens(data: bytes) -> _Tokens | None:
    found = data.find(_DIGITS)
    while found >= 0:
        # Token "0" is number 0x30, so as many tokens end before it.
        start = found + 1
        for _ in range(ord("0") + 1):
            start = data.rfind(b"\0", 0, start - 1) + 1
            if start <= 0:
                break
        tokens = _read_tokens(data, start)
        if tokens is not None:
            return tokens
        found = data.find(_DIGITS, found + 1)
    return None


def _read_tokens(data: bytes, before: int) -> _Tokens | None:
    """Read the table whose start is at or, behind what fills up eight bytes, after `before`."""
    least = _align(before, _ALIGNMENTS[-1])
    for start in {before, *range(least, least + _POINTER + 1, _ALIGNMENTS[-1])}:
        tokens = data[start : start + _TOKENS * _MAX_TOKEN].split(b"\0")[:_TOKENS]
        if len(tokens) < _TOKENS:
            continue
        offsets = np.cumsum([0, *(len(token) + 1 for token in tokens)])
        for alignment in _ALIGNMENTS:
            index = _align(start + int(offsets[-1]), alignment)
            if data[index : index + 2 * _TOKENS] == offsets[:-1].astype("<u2").tobytes():
                return _Tokens(tokens, start, index + 2 * _TOKENS, alignment)
    return None


def _find_names(data: bytes, tokens: _Tokens) -> _Names | None:
    """Find the names, which lie before the tokens, by the number of them that comes first."""
    # The alignment may differ from that of the tokens, which fit either where they are by chance.
    for alignment in _ALIGNMENTS:
        words = np.frombuffer(data, "<u4", tokens.start // alignment * (alignment // 4))
        words = words.reshape(-1, alignment // 4)
        counts = words[:, 0]
        # Of what follows up to the tokens, a name takes this much, its share of all tables too.
        room = tokens.start - alignment * np.arange(len(counts))
        plausible = (counts > room // _MOST_PER_NAME) & (counts < room // _LEAST_PER_NAME)
        plausible &= (words[:, 1:] == 0).all(axis=1) & (counts < _MAX_SYMBOLS)
        for slot in np.flatnonzero(plausible).tolist():
            header = alignment * slot
            first = header + alignment
            spans = _read_spans(data, first, int(counts[slot]), tokens.start, alignment)
            if spans is not None:
                return _expand(data, header, spans, tokens)
    return None


def _expand(
    data: bytes, header: int, spans: list[tuple[int, int]], tokens: _Tokens
) -> _Names | None:
    """Put the names together from their tokens, or None where no kernel has names so long."""
    expand = tokens.tokens.__getitem__
    names = []
    size = 0
    for start, end in spans:
        name = b"".join(map(expand, data[start:end]))
        size += len(name)
        if size > _MAX_NAMES:
            return None
        names.append(name)
    return _Names(header, names)


def _read_spans(
    data: bytes, start: int, count: int, limit: int, alignment: int
) -> list[tuple[int, int]] | None:
    """Return where `count` names are; None where the markers behind them disagree."""
    position = start
    spans = []
    marks = []
    for number in range(count):
        if number % _PER_MARKER == 0:
            marks.append(position - start)
        length = data[position]
        position += 1
        if length >= _LONG:
            length = length & 0x7F | data[position] << 7
            position += 1
        spans.append((position, position + length))
        position += length
        if length == 0 or position + 1 >= limit:
            return None
    markers = _align(position, alignment)
    expected = np.array(marks, "<u4").tobytes()
    return spans if data[markers : markers + len(expected)] == expected else None


def _find_addresses(
    data: bytes, tokens: _Tokens, names: _Names, section: "Section", end: int
) -> "NDArray[np.uint64] | None":
    """Return the address of each name; `end` is behind the last section of the kernel."""
    count = len(names.names)
    size = _align(_OFFSET * count, _POINTER)
    for start in (_align(tokens.end, _POINTER), names.header - _POINTER - size):
        if start >= 0 and start + size + _POINTER <= len(data):
            offsets = np.frombuffer(data, "<i4", count, start).astype(np.int64)
            base = int.from_bytes(data[start + size : start + size + _POINTER], "little")
            if base >= _KERNEL:
                return _by_base(offsets, base)
    start = _align(tokens.end, _OFFSET)
    if start + _OFFSET * count > len(data):
        return None
    offsets = np.frombuffer(data, "<i4", count, start).astype(np.int64)
    return _by_place(offsets, section.address + start, end)


def _by_base(offsets: "NDArray[np.int64]", base: int) -> "NDArray[np.uint64]":
    """Read offsets of a table that has its base behind it."""
    unsigned = offsets & 0xFFFF_FFFF
    if np.all(np.diff(unsigned) >= 0):
        # All count from the base.
        return np.uint64(base) + unsigned.astype(np.uint64)
    relative = (-1 - offsets).astype(np.uint64) + np.uint64(base)
    return np.where(offsets < 0, relative, unsigned.astype(np.uint64))


def _by_place(offsets: "NDArray[np.int64]", place: int, end: int) -> "NDArray[np.uint64] | None":
    """Read offsets that each count from where they stand; None where they are of another kind."""
    relative = _OFFSET * np.arange(len(offsets), dtype=np.int64) + offsets
    if np.any(np.diff(relative) < 0):
        return None
    if not _KERNEL <= place + int(relative[0]) <= place + int(relative[-1]) <= end:
        return None
    return np.uint64(place) + relative.view(np.uint64)


def _table(elf: "ElfFile", names: list[bytes], addresses: "NDArray[np.uint64]") -> SymbolTable:
    order = np.argsort(addresses, kind="stable")
    addresses = addresses[order]
    strings = bytearray(b"\0")
    records = np.zeros(len(names) + 1, SYMBOL)
    offsets = []
    for index in order.tolist():
        offsets.append(len(strings))
        strings += names[index][1:] + b"\0"
    kinds = [names[index][:1] for index in order.tolist()]
    records["name"][1:] = offsets
    records["info"][1:] = [
        STT_FUNC if kind and kind[0] in _CODE_TYPES else STT_OBJECT for kind in kinds
    ]
    # Upper case is global: binding 1 in the upper half.
    records["info"][1:] |= np.array([kind.isupper() << 4 for kind in kinds], np.uint8)
    records["value"][1:] = addresses
    ends, sections = _bounds(elf, addresses)
    records["section"][1:] = sections
    records["size"][1:] = ends - addresses
    return SymbolTable(elf.name, memoryview(records.tobytes()), memoryview(bytes(strings)))


def _bounds(
    elf: "ElfFile", addresses: "NDArray[np.uint64]"
) -> "tuple[NDArray[np.uint64], NDArray[np.uint16]]":
    """Return where each symbol ends, and its section's index."""
    # The next higher address; symbols at one address end together.
    unique, inverse = np.unique(addresses, return_inverse=True)
    following = np.append(unique[1:], unique[-1:] + np.uint64(_LAST_SIZE))[inverse]
    sections = np.zeros(len(addresses), np.uint16)
    for section in _allocated(elf):
        start, end = np.uint64(section.address), np.uint64(section.address + section.size)
        inside = (addresses >= start) & (addresses < end)
        sections[inside] = section.index
        following[inside] = np.minimum(following[inside], end)
    return np.where(sections > 0, following, addresses), sections


def _allocated(elf: "ElfFile") -> "list[Section]":
    return [section for section in elf.sections if section.is_alloc and section.address]
