"""The .altinstructions table: which instructions replace which, on processors with a feature.

Code in .altinstr_replacement never runs where it stands: it is copied over its origin at boot.

Source: struct alt_instr, arch/x86/include/asm/alternative.h. An entry has 14 bytes since 5df0e5e
(v6.3-rc1: `flags` became 32 bits), 12 since cc9a9b2 (v5.14-rc1: without `padlen`), 13 before.
"""

import bisect
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

_COMMON: Final = [("origin", "<i4"), ("replacement", "<i4")]
_FORMATS: Final = (
    np.dtype([*_COMMON, ("feature", "<u4"), ("length", "u1"), ("size", "u1")]),
    np.dtype([*_COMMON, ("feature", "<u2"), ("length", "u1"), ("size", "u1")]),
    np.dtype([*_COMMON, ("feature", "<u2"), ("length", "u1"), ("size", "u1"), ("padding", "u1")]),
)


class Span(NamedTuple):
    """Addresses from `start` up to but without `end`."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Alternative:
    """`size` bytes at `replacement` that may be copied to `length` bytes at `origin`.

    `feature` is the CPU feature bit, 32 * word + bit, that decides (arch/x86/include/asm/
    cpufeatures.h). It must be absent if `inverted`. The replacement of a `direct` one is a call
    whose target stands where the origin's operand points to. `size` may be 0: the origin becomes
    NOPs.
    """

    origin: int
    replacement: int
    size: int
    length: int
    feature: int
    inverted: bool
    direct: bool


class Alternatives:
    """All alternatives of one image, by the address of the replacement.

    `entry_size` is that of the image's struct alt_instr in bytes; today's where it has no table.
    """

    def __init__(
        self, entries: "Sequence[Alternative]", entry_size: int = _FORMATS[0].itemsize
    ) -> None:
        self.entry_size = entry_size
        self._in_order = tuple(entries)
        filled = (entry for entry in entries if entry.size)
        self._entries = sorted(filled, key=lambda entry: entry.replacement)
        self._starts = [entry.replacement for entry in self._entries]

    @classmethod
    def parse(
        cls, data: memoryview, address: int, code: "Sequence[Span]", replacements: "Sequence[Span]"
    ) -> "Alternatives":
        """Read the table at `address`, in whichever format fits.

        Origins lie in `code`, replacements in `replacements`: that tells the formats apart. A
        table that fits none is taken for empty.
        """
        for layout in _FORMATS:
            if len(data) % layout.itemsize:
                continue
            records = np.frombuffer(data, layout)
            here = np.uint64(address) + np.arange(len(records), dtype=np.uint64) * np.uint64(
                layout.itemsize
            )
            origins = here + records["origin"].astype(np.int64).view(np.uint64)
            targets = here + np.uint64(4) + records["replacement"].astype(np.int64).view(np.uint64)
            filled = records["size"] > 0
            if not _inside(origins, code).all() or not _inside(targets[filled], replacements).all():
                continue
            width = layout["feature"].itemsize
            return cls(
                [
                    Alternative(origin, target, size, length, *_feature(feature, width))
                    for origin, target, size, length, feature in zip(
                        origins.tolist(),
                        targets.tolist(),
                        records["size"].tolist(),
                        records["length"].tolist(),
                        records["feature"].tolist(),
                        strict=True,
                    )
                ],
                layout.itemsize,
            )
        return cls([])

    def __len__(self) -> int:
        return len(self._entries)

    def in_order(self) -> "tuple[Alternative, ...]":
        """Return all in the order of the table, in which the kernel applies them."""
        return self._in_order

    def spans(self) -> "tuple[NDArray[np.uint64], NDArray[np.uint64]]":
        """Return the bounds of all replacements."""
        starts = np.array([entry.replacement for entry in self._entries], np.uint64)
        sizes = np.array([entry.size for entry in self._entries], np.uint64)
        return starts, starts + sizes

    def __iter__(self) -> "Iterator[Alternative]":
        return iter(self._entries)

    def origins(self, addresses: "NDArray[np.uint64]") -> "NDArray[np.uint64]":
        """Return where instructions run that stand at addresses: others than replacements there."""
        if not self._entries:
            return addresses
        starts, ends, origins = self._arrays
        places = np.maximum(np.searchsorted(starts, addresses, "right") - 1, 0)
        inside = (addresses >= starts[places]) & (addresses < ends[places])
        return np.where(inside, origins[places] + (addresses - starts[places]), addresses)

    @cached_property
    def _arrays(self) -> "tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]":
        return (*self.spans(), np.array([entry.origin for entry in self._entries], np.uint64))

    def replacing_at(self, address: int) -> Alternative | None:
        """Return the alternative whose replacement holds an address."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        entry = self._entries[index]
        return entry if address < entry.replacement + entry.size else None


def _feature(field: int, width: int) -> tuple[int, bool, bool]:
    """Take feature, ALT_FLAG_NOT and ALT_FLAG_DIRECT_CALL apart.

    The flags are bits 16 and 17 of a wide field; ALTINSTR_FLAG_INV was bit 15 of a narrow one.
    """
    if width == 4:
        return field & 0xFFFF, bool(field >> 16 & 1), bool(field >> 17 & 1)
    return field & 0x7FFF, bool(field >> 15), False


def _inside(addresses: "NDArray[Any]", spans: "Sequence[Span]") -> "NDArray[np.bool_]":
    inside = np.zeros(len(addresses), np.bool_)
    for span in spans:
        inside |= (addresses >= np.uint64(span.start)) & (addresses < np.uint64(span.end))
    return inside
