"""Which functions, inlined ones included, own an address, and at which source line.

The DWARF of a kernel is read by symbolic, which writes it down as a SymCache: a sorted table of
address ranges, each with the innermost function and a link to the place it was inlined into.
symbolic only offers a lookup of single addresses; this module reads the table itself with numpy,
so that all ranges of, say, `readl` can be listed at once.

Source of the layout: symbolic 13.9.0, symbolic-symcache/src/raw/v9.rs and writer.rs. It is not a
documented format, so the version is checked and all counts, offsets and links are too.
"""

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np
from symbolic._lowlevel import ffi
from symbolic.debuginfo import Archive
from symbolic.exceptions import SymbolicError

from trapline.base.errors import BadImageError
from trapline.base.printable import decode_name
from trapline.kernel.dwarf.sourcepath import SourceTree
from trapline.results.scan import Frame

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

VERSION: Final = 9
_MAGIC: Final = b"SYMC"
_PREAMBLE: Final = struct.Struct("<4sI")
# After a debug id of 32 bytes: architecture, then the number of files, functions, source
# locations and ranges, then the bytes of string data; 16 bytes are reserved.
_HEADER: Final = struct.Struct("<32s6I16s")
_NONE: Final = 0xFFFFFFFF
_FILE_WORDS: Final = 6
_FUNCTION_WORDS: Final = 4
_LOCATION_WORDS: Final = 4
# The deepest inline chain in Debian's 6.12 kernels has 24 frames.
_MAX_DEPTH: Final = 256
_CHUNK: Final = 1 << 17  # ranges walked together: bounds the temporary arrays
_MAX_STRING: Final = 1 << 16
_LONGEST_NAME: Final = 127  # of those this module searches for: one byte of LEB128


class InlinedSpans(NamedTuple):
    """One place where `name` is inlined; `spans` are (start, end), by address, in pieces."""

    name: str
    spans: tuple[tuple[int, int], ...]


class SymCache:
    """Address ranges with inline chains; addresses are those of the image it was built from.

    `starts` holds the first address of each range, shape (n,), sorted; a range ends where the
    next one starts. `functions` holds the index of each range's innermost function, shape (n,),
    -1 for a gap.
    """

    def __init__(self, blob: bytes, base: int, name: str) -> None:
        self._name = name
        self._blob = blob
        counts, position = _read_header(blob, name)
        files, functions, locations, ranges, string_bytes = counts
        self._files, position = self._table(position, files, _FILE_WORDS)
        self._functions, position = self._table(position, functions, _FUNCTION_WORDS)
        self._locations, position = self._table(position, locations, _LOCATION_WORDS)
        offsets, position = self._table(position, ranges, 1)
        if locations < ranges or position + string_bytes > len(blob):
            raise self._bad()
        self._first_location = locations - ranges
        self._strings = position
        self._string_end = position + string_bytes
        self.starts: NDArray[np.uint64] = offsets[:, 0].astype(np.uint64) + np.uint64(base)
        if np.any(self.starts[1:] <= self.starts[:-1]):
            raise self._bad()
        self.functions: NDArray[np.int64] = self._innermost(functions)
        self._check_links(files, functions, locations)
        self._names: dict[int, str] = {}
        self._paths: dict[int, str | None] = {}
        self._tree = SourceTree(self._directories())

    @classmethod
    def build(cls, image: memoryview | bytes | bytearray, base: int, name: str) -> Self:
        """Read the DWARF of an ELF image whose first PT_LOAD segment is at address `base`.

        The image is only read while this runs. Raises BadImageError where the DWARF is corrupt.
        """
        return cls(_convert(image, name), base, name)

    def __len__(self) -> int:
        return len(self.starts)

    def range_at(self, address: int) -> int:
        """Return the index of the range that holds an address, -1 before the first one."""
        return int(np.searchsorted(self.starts, np.uint64(address), "right")) - 1

    def chain(self, address: int) -> tuple[Frame, ...]:
        """Return the frames of an address, innermost first, the out-of-line function last.

        A frame's file is relative to the source tree; it is None where only a symbol is known,
        as for assembly sources. Empty where nothing is known.
        """
        index = self.range_at(address)
        if index < 0:
            return ()
        frames = []
        location = self._first_location + index
        for _ in range(_MAX_DEPTH):
            file, line, function, parent = self._locations[location].tolist()
            if function == _NONE:
                break
            path = None if file == _NONE else self._path(file)
            frames.append(Frame(function=self._function(function), file=path, line=line or None))
            if parent == _NONE:
                break
            location = parent
        else:
            raise self._bad()
        return tuple(frames)

    def ranges_of(self, names: "Collection[str]") -> "list[tuple[int, int, str]]":
        """Return (start, end, name) of each range whose innermost function has one of the names.

        In order of addresses. The last range of all has no known end and is left out.
        """
        order = sorted(names)
        numbers = self._numbers(order)[self.functions]
        hits = np.flatnonzero(numbers[:-1] >= 0)
        return [
            (start, end, order[number])
            for start, end, number in zip(
                self.starts[hits].tolist(),
                self.starts[hits + 1].tolist(),
                numbers[hits].tolist(),
                strict=True,
            )
        ]

    def inlined_spans(self, names: "Collection[str]") -> list[InlinedSpans]:
        """Return where functions of these names are inlined, whatever they have inlined in turn.

        In order of the lowest address.
        """
        order = sorted(names)
        wanted = self._numbers(order)
        found: dict[tuple[int, int], list[int]] = {}
        last = len(self.starts) - 1  # has no known end
        for first in range(0, last, _CHUNK):
            self._add_inlined(np.arange(first, min(first + _CHUNK, last)), wanted, found)
        instances = [
            InlinedSpans(
                order[number],
                tuple((int(self.starts[index]), int(self.starts[index + 1])) for index in indices),
            )
            for (number, _), indices in found.items()
        ]
        return sorted(instances, key=lambda instance: (instance.spans[0], instance.name))

    def _add_inlined(
        self,
        ranges: "NDArray[np.intp]",
        wanted: "NDArray[np.int64]",
        found: dict[tuple[int, int], list[int]],
    ) -> None:
        """Walk outwards from some ranges; add them to `found` by (number, call location)."""
        locations = ranges + self._first_location
        for _ in range(_MAX_DEPTH):
            parents = self._locations[locations, 3]
            inner = parents != _NONE
            ranges, locations, parents = ranges[inner], locations[inner], parents[inner]
            if not len(ranges):
                return
            functions = self._locations[locations, 2].astype(np.int64)
            numbers = wanted[np.where(functions == _NONE, len(wanted) - 1, functions)]
            for hit in np.flatnonzero(numbers >= 0).tolist():
                instance = (int(numbers[hit]), int(parents[hit]))
                found.setdefault(instance, []).append(int(ranges[hit]))
            locations = parents.astype(np.intp)
        raise self._bad()

    def _numbers(self, names: list[str]) -> "NDArray[np.int64]":
        """Map each function index to the position of its name in `names`, or to -1.

        There is one element more, for index -1: a gap.
        """
        numbers = np.full(len(self._functions) + 1, -1, np.int64)
        for number, name in enumerate(names):
            for offset in self._string_offsets(name):
                numbers[:-1][self._functions[:, 0] == offset] = number
        return numbers

    def _table(self, position: int, count: int, words: int) -> "tuple[NDArray[np.uint32], int]":
        """Read rows of 32-bit words; the next table is aligned to 8 bytes."""
        size = count * words * 4
        if position + size > len(self._blob):
            raise self._bad()
        rows = np.frombuffer(self._blob, "<u4", count * words, position)
        return rows.reshape(count, words), (position + size + 7) & ~7

    def _innermost(self, functions: int) -> "NDArray[np.int64]":
        indices = self._locations[self._first_location :, 2].astype(np.int64)
        indices[indices == _NONE] = -1
        if np.any(indices >= functions):
            raise self._bad()
        return indices

    def _check_links(self, files: int, functions: int, locations: int) -> None:
        for column, limit in ((0, files), (2, functions), (3, locations)):
            values = self._locations[:, column]
            if np.any((values >= limit) & (values != _NONE)):
                raise self._bad()

    def _function(self, index: int) -> str:
        name = self._names.get(index)
        if name is None:
            name = self._names[index] = self._string(int(self._functions[index, 0])) or ""
        return name

    def _path(self, index: int) -> str | None:
        if index not in self._paths:
            compilation, folder, file = (
                self._string(int(offset)) for offset in self._files[index, :3]
            )
            self._paths[index] = self._tree.relative(compilation, folder, file)
        return self._paths[index]

    def _directories(self) -> set[str]:
        offsets = np.unique(self._files[:, 1])
        return {text for offset in offsets.tolist() if (text := self._string(offset))}

    def _string(self, offset: int) -> str | None:
        """Read a string: its length as LEB128, then UTF-8."""
        if offset == _NONE:
            return None
        position = self._strings + offset
        length = shift = 0
        while True:
            if position >= self._string_end or length > _MAX_STRING:
                raise self._bad()
            byte = self._blob[position]
            position += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if position + length > self._string_end:
            raise self._bad()
        return decode_name(self._blob[position : position + length])

    def _string_offsets(self, name: str) -> list[int]:
        """Find where the table of strings may hold `name`; callers match these to functions."""
        encoded = name.encode()
        if len(encoded) > _LONGEST_NAME:
            raise ValueError(f"{name!r} is too long to be searched for")
        pattern = bytes([len(encoded)]) + encoded
        found = []
        position = self._blob.find(pattern, self._strings, self._string_end)
        while position >= 0:
            found.append(position - self._strings)
            position = self._blob.find(pattern, position + 1, self._string_end)
        return found

    def _bad(self) -> BadImageError:
        return BadImageError(f"{self._name}: the table made from its DWARF is inconsistent.")


def _read_header(blob: bytes, name: str) -> tuple[tuple[int, int, int, int, int], int]:
    size = _PREAMBLE.size + _HEADER.size
    if len(blob) < size:
        raise BadImageError(f"{name}: the table made from its DWARF is cut off.")
    magic, version = _PREAMBLE.unpack_from(blob)
    if magic != _MAGIC or version != VERSION:
        raise BadImageError(
            f"{name}: the installed symbolic writes SymCache version {version}, trapline reads "
            f"version {VERSION}; install the pinned version of symbolic."
        )
    _, _, files, functions, locations, ranges, strings, _ = _HEADER.unpack_from(
        blob, _PREAMBLE.size
    )
    return (files, functions, locations, ranges, strings), size


def _convert(image: memoryview | bytes | bytearray, name: str) -> bytes:
    """Have symbolic write the SymCache of an ELF image.

    symbolic takes bytes objects; handing it a view saves a copy of a file of 340 MB.
    """
    view: Any = ffi.from_buffer("uint8_t[]", image)
    try:
        cache: Any = Archive.from_bytes(view).get_object(arch="x86_64").make_symcache()
        with cache.open_stream() as stream:
            return bytes(stream.read())
    except (SymbolicError, LookupError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadImageError(f"{name}: its DWARF cannot be read ({reason}).") from None
    finally:
        ffi.release(view)
