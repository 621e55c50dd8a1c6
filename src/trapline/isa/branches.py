"""Where control goes from each instruction of a swept section, as arrays.

The bytes behind the prefixes say what a branch is and where it leads, so that no instruction has
to be decoded one by one: SDM vol. 2, appendix A. Which function an address belongs to is not known
here.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trapline.isa.sweep import Sweep


class Flow(IntEnum):
    """What a branch does; conditional ones fall through as well."""

    CALL = 0
    JUMP = 1
    CONDITIONAL = 2


_CHUNK: Final = 1 << 18
_NEAR_CALL: Final = 0xE8
_NEAR_JUMP: Final = 0xE9
_SHORT_JUMP: Final = 0xEB
_ESCAPE: Final = 0x0F
_GROUP_5: Final = 0xFF
#: First opcode bytes behind which nothing of the same path follows: RET, IRET, far RET, INT3.
_ENDS: Final = (0xC2, 0xC3, 0xCA, 0xCB, 0xCC, 0xCF, _NEAR_JUMP, _SHORT_JUMP, 0xEA)
#: The same behind 0x0F: SYSRET, UD2, SYSEXIT, UD1, UD0.
_ENDS_ESCAPED: Final = (0x07, 0x0B, 0x35, 0xB9, 0xFF)


@dataclass(frozen=True, slots=True)
class Branches:
    """All branches of some sections, in the order of addresses.

    `sites`, `targets` and `flows` (`Flow`), all of shape (n,), are those with a target of their
    own. `pointers` and `pointer_flows`, of shape (m,), are those through a register or memory.
    `loads` and `loaded`, of shape (k,), are the instructions that have an address in them, and it:
    LEA …(%rip), MOV $…, PUSH $….
    """

    sites: "NDArray[np.uint64]"
    targets: "NDArray[np.uint64]"
    flows: "NDArray[np.uint8]"
    pointers: "NDArray[np.uint64]"
    pointer_flows: "NDArray[np.uint8]"
    loads: "NDArray[np.uint64]"
    loaded: "NDArray[np.uint64]"

    @classmethod
    def of(cls, sweeps: "Sequence[Sweep]", low: int, high: int) -> Self:
        """Read the branches of sections; `low` up to `high` is what `loads` may have in them."""
        parts = [part for sweep in sweeps for part in _Reader(sweep, low, high).parts()]
        columns = zip(*parts, strict=True) if parts else [[]] * 7
        joined: list[NDArray[Any]] = [
            np.concatenate(column) if len(column) else np.zeros(0, np.uint64) for column in columns
        ]
        for keys, *values in (joined[0:3], joined[3:5], joined[5:7]):
            order = np.argsort(keys, kind="stable")
            for array in (keys, *values):
                array[:] = array[order]
        return cls(*joined)


def falls_through(sweep: "Sweep", places: "NDArray[np.int64]") -> "NDArray[np.bool_]":
    """Say of instructions, by their index in the sweep, whether the next one may follow."""
    at = sweep.opcode_positions(sweep.starts[places].astype(np.int64))
    first, second = sweep.bytes[at], sweep.bytes[at + 1]
    jumps = (first == _GROUP_5) & ((second >> 3 & 7) == 4)
    ends: NDArray[np.bool_] = np.isin(first, _ENDS) | jumps
    ends |= (first == _ESCAPE) & np.isin(second, _ENDS_ESCAPED)
    return ~ends


class _Reader:
    """Reads one section, some instructions at a time."""

    def __init__(self, sweep: "Sweep", low: int, high: int) -> None:
        self._sweep = sweep
        self._bytes = sweep.bytes
        self._low, self._high = np.uint64(low), np.uint64(high)

    def parts(self) -> "list[tuple[NDArray[Any], ...]]":
        """Return the columns of `Branches` for each chunk."""
        starts = self._sweep.starts.astype(np.int64)
        ends = np.append(starts[1:], len(self._sweep.data))
        return [
            self._part(starts[first : first + _CHUNK], ends[first : first + _CHUNK])
            for first in range(0, len(starts), _CHUNK)
        ]

    def _part(
        self, starts: "NDArray[np.int64]", ends: "NDArray[np.int64]"
    ) -> "tuple[NDArray[Any], ...]":
        at = self._sweep.opcode_positions(starts)
        first, second = self._bytes[at], self._bytes[at + 1]
        extension = second >> np.uint8(3) & np.uint8(7)
        near_jcc = (first == _ESCAPE) & ((second & 0xF0) == 0x80)
        short_jcc = ((first & 0xF0) == 0x70) | ((first & 0xFC) == 0xE0)
        short_jump = first == _SHORT_JUMP
        flows = np.full(len(starts), 255, np.uint8)
        flows[first == _NEAR_CALL] = Flow.CALL
        flows[(first == _NEAR_JUMP) | short_jump] = Flow.JUMP
        flows[near_jcc | short_jcc] = Flow.CONDITIONAL
        direct = np.flatnonzero(flows != 255)
        is_short = (short_jump | short_jcc)[direct]
        distance = np.where(is_short, self._signed_byte(ends[direct]), self._word(ends[direct]))
        targets = self._absolute(ends[direct] + distance)
        pointer = np.flatnonzero((first == _GROUP_5) & ((extension == 2) | (extension == 4)))
        pointer_flows = np.where(extension[pointer] == 2, Flow.CALL, Flow.JUMP).astype(np.uint8)
        loads, loaded = self._loads(first, second, at, ends)
        return (
            *(self._absolute(starts[direct]), targets, flows[direct]),
            *(self._absolute(starts[pointer]), pointer_flows),
            *(self._absolute(starts[loads]), loaded),
        )

    def _loads(
        self,
        first: "NDArray[np.uint8]",
        second: "NDArray[np.uint8]",
        at: "NDArray[np.int64]",
        ends: "NDArray[np.int64]",
    ) -> "tuple[NDArray[np.int64], NDArray[np.uint64]]":
        relative = np.flatnonzero((first == 0x8D) & ((second & 0xC7) == 0x05))
        near = self._absolute(ends[relative] + self._word(ends[relative]))
        constant = ((first & 0xF8) == 0xB8) & (ends - at == 5)
        constant |= (first == 0xC7) & ((second & 0x38) == 0)
        constant |= first == 0x68
        absolute = np.flatnonzero(constant & (ends - at >= 5))
        far = self._word(ends[absolute]).view(np.uint64)
        wide = np.flatnonzero(((first & 0xF8) == 0xB8) & (ends - at == 9))
        whole = self._word(ends[wide]).view(np.uint64) << np.uint64(32)
        whole |= self._word(ends[wide] - 4).view(np.uint64) & np.uint64(0xFFFFFFFF)
        places = np.concatenate((relative, absolute, wide))
        values = np.concatenate((near, far, whole))
        fits = (values >= self._low) & (values < self._high)
        return places[fits], values[fits]

    def _absolute(self, offsets: "NDArray[np.int64]") -> "NDArray[np.uint64]":
        return offsets.view(np.uint64) + np.uint64(self._sweep.address)

    def _signed_byte(self, ends: "NDArray[np.int64]") -> "NDArray[np.int64]":
        return self._bytes[ends - 1].view(np.int8).astype(np.int64)

    def _word(self, ends: "NDArray[np.int64]") -> "NDArray[np.int64]":
        """Read the last four bytes of instructions, sign-extended."""
        value = np.zeros(len(ends), np.uint32)
        for byte in range(4):
            value |= self._bytes[ends - 4 + byte].astype(np.uint32) << np.uint32(8 * byte)
        return value.view(np.int32).astype(np.int64)
