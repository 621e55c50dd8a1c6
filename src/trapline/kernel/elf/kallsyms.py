"""The symbols that a stripped kernel carries for itself: the tables behind /proc/kallsyms.

Nothing points to them. They are found by their contents: the token table has the digits as ten
tokens in a row, and its index agrees with it; names, with markers that agree, and offsets are
found from there.

Sources: scripts/kallsyms.c and kernel/kallsyms.c. The offsets stand before the names until v6.1
and behind the token index from v6.2 on (commit 404bad70fcf7); names of 128 tokens and more have
a length of two bytes since v6.1 (commit 73bbb94466fd); from v6.15 on no offset is of a per-CPU
symbol (commit 4b00c1160a13), until then positive ones are absolute and others count down.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from trapline.kernel.elf.symtab import STT_FUNC, STT_OBJECT, SYMBOL, SymbolTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trapline.kernel.elf.file import ElfFile, Section

_DIGITS: Final = b"\x00" + b"".join(b"%d\x00" % digit for digit in range(10))
_TOKENS: Final = 256
_ALIGNMENT: Final = 8
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
    """The token table: the tokens, and where the table starts and its index ends."""

    tokens: list[bytes]
    start: int
    end: int


class _Names(NamedTuple):
    """The compressed names: where the table's header is, and each name with its type."""

    header: int
    names: list[bytes]


def read_kallsyms(elf: "ElfFile") -> SymbolTable | None:
    """Recover the symbol table of a stripped vmlinux, or None where there are no such tables.

    Sizes are up to the next symbol. Types are STT_FUNC for code and STT_OBJECT for all else.
    """
    for name in (".rodata", ".data"):
        data = bytes(elf.contents(name))
        tokens = _find_tokens(data)
        if tokens is None:
            continue
        names = _find_names(data, tokens)
        if names is None:
            continue
        addresses = _find_addresses(data, tokens, names)
        if addresses is not None:
            return _table(elf, names.names, addresses)
    return None


def _align(position: int) -> int:
    return position + _ALIGNMENT - 1 & -_ALIGNMENT


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
    """Read the table whose start is at or, behind zeros of alignment, after `before`."""
    for start in {before, _align(before)}:
        tokens = data[start : start + _TOKENS * _MAX_TOKEN].split(b"\0")[:_TOKENS]
        if len(tokens) < _TOKENS:
            continue
        offsets = np.cumsum([0, *(len(token) + 1 for token in tokens)])
        index = _align(start + int(offsets[-1]))
        if data[index : index + 2 * _TOKENS] == offsets[:-1].astype("<u2").tobytes():
            return _Tokens(tokens, start, index + 2 * _TOKENS)
    return None


def _find_names(data: bytes, tokens: _Tokens) -> _Names | None:
    """Find the names, which lie before the tokens, by the number of them that comes first."""
    words = np.frombuffer(data, "<u4", tokens.start // _ALIGNMENT * 2)
    counts, zeros = words[::2], words[1::2]
    # Of what follows up to the tokens, a name takes this much, its share of all tables included.
    room = tokens.start - _ALIGNMENT * np.arange(len(counts))
    plausible = (
        (zeros == 0) & (counts > room // _MOST_PER_NAME) & (counts < room // _LEAST_PER_NAME)
    )
    for slot in np.flatnonzero(plausible & (counts < _MAX_SYMBOLS)).tolist():
        header = _ALIGNMENT * slot
        spans = _read_spans(data, header + _ALIGNMENT, int(counts[slot]), tokens.start)
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


def _read_spans(data: bytes, start: int, count: int, limit: int) -> list[tuple[int, int]] | None:
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
    markers = _align(position)
    expected = np.array(marks, "<u4").tobytes()
    return spans if data[markers : markers + len(expected)] == expected else None


def _find_addresses(data: bytes, tokens: _Tokens, names: _Names) -> "NDArray[np.uint64] | None":
    count = len(names.names)
    size = _align(4 * count)
    after = _align(tokens.end)
    before = names.header - _ALIGNMENT - size
    for start in (after, before):
        if start < 0 or start + size + _ALIGNMENT > len(data):
            continue
        base = int.from_bytes(data[start + size : start + size + _ALIGNMENT], "little")
        if base < _KERNEL:
            continue
        offsets = np.frombuffer(data, "<u4", count, start)
        signed = offsets.view("<i4").astype(np.int64)
        if np.all(np.diff(offsets.astype(np.int64)) >= 0):
            # All count from the base.
            return np.uint64(base) + offsets.astype(np.uint64)
        relative = (-1 - signed).astype(np.uint64) + np.uint64(base)
        return np.where(signed < 0, relative, offsets.astype(np.uint64))
    return None


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
