"""The raw tables of BTF: records by type id, what follows each, and strings by offset.

Sources: Documentation/bpf/btf.rst, include/uapi/linux/btf.h.
"""

import struct
from array import array
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np

from trapline.base.errors import BadImageError
from trapline.base.printable import decode_name

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Kind(IntEnum):
    """BTF_KIND_*."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


class Record(NamedTuple):
    """The fixed part of a type. `target` is a size or a type id, by kind.

    `vlen` is the number of items that follow, `flag` the kind's own bit.
    """

    name: int
    kind: Kind
    vlen: int
    flag: bool
    target: int


_MAGIC: Final = 0xEB9F
_HEADER: Final = struct.Struct("<HBBIIIII")
_INFO: Final = struct.Struct("<I")
_FIXED: Final = 12
_TYPE: Final = np.dtype([("name", "<u4"), ("info", "<u4"), ("target", "<u4")])
# Bytes after the fixed part: once, and for each item.
_TAIL: Final = {Kind.INT: 4, Kind.ARRAY: 12, Kind.VAR: 4, Kind.DECL_TAG: 4}
_PER_ITEM: Final = {
    Kind.STRUCT: 12,
    Kind.UNION: 12,
    Kind.ENUM: 8,
    Kind.FUNC_PROTO: 8,
    Kind.DATASEC: 12,
    Kind.ENUM64: 12,
}
# Debian's vmlinux has 4.7 MB and 107,000 types.
_MAX_SIZE: Final = 64 << 20
_MAX_STRING: Final = 4096
# Names overlap in hostile data, so that a small file can hold gigabytes of them.
_MAX_STRINGS: Final = 256 << 20
_VOID: Final = Record(0, Kind.VOID, 0, False, 0)


class TypeTable:
    """One BTF section: types from id `first` on, strings from offset `first_string` on.

    `stop` and `stop_string` are where the next section would go on.
    """

    def __init__(
        self, name: str, types: bytes, strings: bytes, first: int, first_string: int
    ) -> None:
        self.name = name
        self.first = first
        self.first_string = first_string
        self._types = types
        self._strings = strings
        self._offsets = self._walk()
        self._decoded: dict[int, str] = {}
        self._read: dict[int, Record] = {}
        self._decoded_size = 0
        self._records: NDArray[Any] = self._gather()
        self.stop = first + len(self._offsets)
        self.stop_string = first_string + len(strings)

    @classmethod
    def parse(cls, data: bytes | memoryview, name: str, previous: "TypeTable | None") -> Self:
        """Parse a .BTF section that continues `previous`; id 0 of the first is void."""
        if len(data) > _MAX_SIZE:
            raise BadImageError(f"{name}: {len(data) >> 20} MiB of BTF are more than any kernel.")
        if len(data) < _HEADER.size:
            raise BadImageError(f"{name}: the BTF is truncated within its header.")
        magic, version, _, length, type_at, type_size, string_at, string_size = _HEADER.unpack_from(
            data
        )
        if magic != _MAGIC or version != 1:
            raise BadImageError(f"{name}: is not little-endian BTF of version 1.")
        body = memoryview(data)[length:]
        if length < _HEADER.size or max(type_at + type_size, string_at + string_size) > len(body):
            raise BadImageError(f"{name}: the BTF is truncated.")
        strings = bytes(body[string_at : string_at + string_size])
        if not strings.endswith(b"\0"):
            raise BadImageError(f"{name}: the BTF's strings have no end.")
        first = 1 if previous is None else previous.stop
        first_string = 0 if previous is None else previous.stop_string
        types = bytes(body[type_at : type_at + type_size])
        return cls(name, types, strings, first, first_string)

    def record(self, index: int) -> Record:
        """Return the fixed part of a type of this section, or of void."""
        if index == 0:
            return _VOID
        known = self._read.get(index)
        if known is None:
            name, info, target = self._records[index - self.first].tolist()
            kind = Kind(info >> 24 & 31)
            known = Record(name, kind, info & 0xFFFF, bool(info >> 31), target)
            self._read[index] = known
        return known

    def items(self, index: int, layout: str) -> list[tuple[int, ...]]:
        """Unpack what follows the fixed part of a type: `layout`, for each of its items."""
        if index == 0:
            return []
        start = int(self._offsets[index - self.first]) + _FIXED
        record = self.record(index)
        count = record.vlen if record.kind in _PER_ITEM else 1
        size = struct.calcsize(layout) * count
        return list(struct.iter_unpack(layout, self._types[start : start + size]))

    def string(self, offset: int) -> str:
        """Return a string of this section."""
        known = self._decoded.get(offset)
        if known is not None:
            return known
        start = offset - self.first_string
        stop = self._strings.find(b"\0", start, start + _MAX_STRING)
        self._decoded_size += stop - start
        if stop < 0 or self._decoded_size > _MAX_STRINGS:
            raise BadImageError(f"{self.name}: a BTF name is outside of the strings or too long.")
        name = decode_name(self._strings[start:stop])
        self._decoded[offset] = name
        return name

    def of_kind(self, *kinds: Kind) -> list[int]:
        """Return the ids of all types of these kinds, in order."""
        wanted = np.isin(self._records["info"] >> 24 & 31, kinds)
        found: list[int] = (np.flatnonzero(wanted) + self.first).tolist()
        return found

    def _walk(self) -> "NDArray[np.uint32]":
        """Find where each type starts; all of each lies inside the data afterwards."""
        types, end = self._types, len(self._types)
        tails = [_TAIL.get(kind, 0) for kind in Kind]
        per_item = [_PER_ITEM.get(kind, 0) for kind in Kind]
        offsets = array("I")
        position = 0
        unpack = _INFO.unpack_from
        while position + _FIXED <= end:
            offsets.append(position)
            (info,) = unpack(types, position + 4)
            kind = info >> 24 & 31
            if not Kind.INT <= kind <= Kind.ENUM64:
                raise BadImageError(f"{self.name}: BTF kind {kind} is not known.")
            position += _FIXED + tails[kind] + per_item[kind] * (info & 0xFFFF)
        if position != end:
            raise BadImageError(f"{self.name}: the BTF is truncated within a type.")
        return np.array(offsets, np.uint32)

    def _gather(self) -> "NDArray[Any]":
        if not len(self._offsets):
            return np.zeros(0, _TYPE)
        rows = self._offsets[:, None] + np.arange(_FIXED, dtype=np.uint32)
        records: NDArray[Any] = np.frombuffer(self._types, np.uint8)[rows].reshape(-1).view(_TYPE)
        return records
