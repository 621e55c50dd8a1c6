"""Every instruction of a code section: where each starts, and which could trap or call.

iced decodes a section once and reports nothing but lengths; the rest is done on the bytes with
numpy, which then names the few instructions that are worth a second, full look. What it names is
a superset: the caller decodes each and decides.
"""

import re
from bisect import bisect_left
from operator import attrgetter
from typing import TYPE_CHECKING, Final

import numpy as np
from iced_x86 import Decoder, Instruction, OpCodeTableKind

from trapline.isa import traps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from iced_x86 import OpCodeInfo
    from numpy.typing import NDArray

_BITS: Final = 64
_LONGEST: Final = 15  # bytes of an instruction
_length = attrgetter("len")
# Legacy prefixes and REX, in any order: a REX that another prefix follows has no effect.
_PREFIXES: Final = (0x66, 0x67, 0xF2, 0xF3, 0xF0, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65)
_REX: Final = range(0x40, 0x50)
_MAX_PREFIXES: Final = _LONGEST - 1
_CHUNK: Final = 1 << 18  # instructions looked at together: a few megabytes of arrays
_RESYNC: Final = 256  # bytes in which two decodings of the same code fall in step
# UD2 and the name of the hypervisor that is to emulate what follows; the name is no code ("n" would
# be OUTSB): arch/x86/include/asm/emulate_prefix.h.
_EMULATE_MARK: Final = re.compile(b"\x0f\x0b(?:xen|kvm)")
_UD2: Final = 2  # bytes
_MARK: Final = 5


class Sweep:
    """The instructions of one section; `data` are its bytes, `address` that of the first.

    `starts` holds the offset of each instruction, shape (n,), sorted.
    """

    def __init__(
        self,
        data: memoryview | bytes,
        address: int,
        entries: "Iterable[int] | NDArray[np.uint64]" = (),
    ) -> None:
        """Decode the section. `entries` are addresses known to start an instruction.

        Constants among the code can put the decoder out of step; it is put back at the entries.
        """
        self.data = bytes(data)
        self.address = address
        #: The same as an array, with some zeros behind.
        self.bytes: NDArray[np.uint8] = np.frombuffer(self.data + bytes(2 * _LONGEST), np.uint8)
        lengths = np.fromiter(map(_length, Decoder(_BITS, self.data, ip=address)), np.uint8)
        ends = np.cumsum(lengths, dtype=np.uint32)
        self.starts: NDArray[np.uint32] = ends - lengths
        known = self._offsets(entries)
        self._realign(known)
        self._skip_marks(known)
        self._holds: Callable[[NDArray[np.uint64]], NDArray[np.bool_]] | None = None
        self._traps: list[int] | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def leave_data(self, holds: "Callable[[NDArray[np.uint64]], NDArray[np.bool_]]") -> "list[int]":
        """Name no more candidates in what is no code: where `holds` says no of an address.

        Returns the addresses of the trap candidates that are left out by this.
        """
        found = np.array(self.trap_candidates(), np.uint64)
        is_code = holds(found)
        self._holds = holds
        self._traps = found[is_code].tolist()
        left_out: list[int] = found[~is_code].tolist()
        return left_out

    def decode(self, address: int) -> Instruction:
        """Return the instruction at an address."""
        offset = address - self.address
        return Decoder(_BITS, self.data[offset : offset + _LONGEST], ip=address).decode()

    def within(self, start: int, end: int) -> "list[int]":
        """Return the addresses of the instructions that start from `start` up to before `end`."""
        bounds = [min(max(at - self.address, 0), len(self.data)) for at in (start, end)]
        # Of the type of `starts`: searchsorted would convert that otherwise, each time.
        low, high = np.searchsorted(self.starts, np.array(bounds, np.uint32))
        return [self.address + offset for offset in self.starts[low:high].tolist()]

    def bytes_of(self, instruction: Instruction) -> bytes:
        """Return the bytes of an instruction."""
        offset = instruction.ip - self.address
        return self.data[offset : offset + instruction.len]

    def trap_candidates(self) -> "list[int]":
        """Return the addresses of all instructions that `traps.classify` may know."""
        if self._traps is None:
            self._traps = self._pick(self._may_trap)
        return self._traps

    def branch_candidates(self, targets: "Iterable[int]") -> "list[int]":
        """Return the addresses of calls, jumps and conditional jumps to one of the targets."""
        wanted = np.unique(np.fromiter(targets, np.uint64))

        def reaches(starts: "NDArray[np.int64]", ends: "NDArray[np.int64]") -> "NDArray[np.intp]":
            lengths = ends - starts
            opcode, before = self.bytes[ends - 5], self.bytes[ends - 6]
            near = ((opcode == 0xE8) | (opcode == 0xE9)) & (lengths >= 5)
            near |= ((opcode & 0xF0) == 0x80) & (before == 0x0F) & (lengths >= 6)
            found = np.flatnonzero(near)
            return found[np.isin(self._relative(ends[found]), wanted)]

        return self._pick(reaches) if len(wanted) else []

    def pointer_candidates(self, start: int, end: int) -> "list[int]":
        """Return the addresses of calls and jumps through a pointer at `start` up to `end`."""

        def inside(pointers: "NDArray[np.uint64]") -> "NDArray[np.bool_]":
            return (pointers >= np.uint64(start)) & (pointers < np.uint64(end))

        def reaches(starts: "NDArray[np.int64]", ends: "NDArray[np.int64]") -> "NDArray[np.intp]":
            lengths = ends - starts
            relative = np.flatnonzero((lengths >= 6) & self._is_indirect(ends - 6, 0x05))
            relative = relative[inside(self._relative(ends[relative]))]
            # With a SIB byte that has neither base nor index: an absolute address.
            absolute = (lengths >= 7) & self._is_indirect(ends - 7, 0x04)
            places = np.flatnonzero(absolute & (self.bytes[ends - 5] == 0x25))
            places = places[inside(self._displacement(ends[places]))]
            return np.sort(np.concatenate((relative, places)))

        return self._pick(reaches)

    def variable_uses(self, targets: "Iterable[int]") -> "list[int]":
        """Return the addresses of MOVs from or to variables: MOV …(%rip), %reg and back."""
        wanted = np.unique(np.fromiter(targets, np.uint64))

        def uses(starts: "NDArray[np.int64]", ends: "NDArray[np.int64]") -> "NDArray[np.intp]":
            opcode, modrm = self.bytes[ends - 6], self.bytes[ends - 5]
            moves = ((opcode == 0x8B) | (opcode == 0x89)) & ((modrm & 0xC7) == 0x05)
            places = np.flatnonzero(moves & (ends - starts >= 6))
            return places[np.isin(self._relative(ends[places]), wanted)]

        return self._pick(uses) if len(wanted) else []

    def pointer_loads(self, targets: "Iterable[int]") -> "list[int]":
        """Return the addresses of instructions that take a target: MOV $…, LEA …(%rip)."""
        wanted = np.unique(np.fromiter(targets, np.uint64))

        def loads(starts: "NDArray[np.int64]", ends: "NDArray[np.int64]") -> "NDArray[np.intp]":
            lengths = ends - starts
            near, far = self.bytes[ends - 5], self.bytes[ends - 6]
            moves = (lengths == 5) & ((near & 0xF8) == 0xB8)
            moves |= (lengths == 7) & (far == 0xC7) & ((near & 0xF8) == 0xC0)
            # To memory, with REX.W: a member of a structure that is handed on.
            first, second = self.bytes[starts], self.bytes[starts + 1]
            moves |= (lengths >= 8) & ((first & 0xF8) == 0x48) & (second == 0xC7)
            constants = np.flatnonzero(moves)
            constants = constants[np.isin(self._displacement(ends[constants]), wanted)]
            places = np.flatnonzero((lengths == 7) & (far == 0x8D) & ((near & 0xC7) == 0x05))
            places = places[np.isin(self._relative(ends[places]), wanted)]
            return np.sort(np.concatenate((constants, places)))

        return self._pick(loads) if len(wanted) else []

    def _pick(
        self, choose: "Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.intp]]"
    ) -> "list[int]":
        """Return the addresses of what `choose` picks of instructions, by their bounds.

        It is given some at a time, so that its temporary arrays stay small.
        """
        found: list[int] = []
        for first in range(0, len(self.starts), _CHUNK):
            bounds = self.starts[first : first + _CHUNK + 1].astype(np.int64)
            starts, ends = bounds[:_CHUNK], bounds[1:]
            if len(ends) < len(starts):
                ends = np.append(ends, len(self.data))
            chosen = starts[choose(starts, ends)].astype(np.uint64) + np.uint64(self.address)
            if self._holds is not None:
                chosen = chosen[self._holds(chosen)]
            found += chosen.tolist()
        return found

    def _may_trap(self, starts: "NDArray[np.int64]", _: "NDArray[np.int64]") -> "NDArray[np.intp]":
        position = self.opcode_positions(starts)
        first = self.bytes[position]
        second = self.bytes[position + 1]
        third = self.bytes[position + 2]
        found = _ONE_BYTE[first] | ((first == 0x0F) & _TWO_BYTES[second])
        found |= (first == 0x0F) & (second == 0x38) & _THREE_BYTES[third]
        return np.flatnonzero(found)

    def _offsets(self, addresses: "Iterable[int] | NDArray[np.uint64]") -> "NDArray[np.uint32]":
        """Return where in the section addresses are, sorted, without those outside of it."""
        if not isinstance(addresses, np.ndarray):
            addresses = np.fromiter(addresses, np.uint64)
        offsets = addresses - np.uint64(self.address)
        return np.unique(offsets[offsets < len(self.data)].astype(np.uint32), sorted=True)

    def _realign(self, offsets: "NDArray[np.uint32]") -> None:
        """Have an instruction start at each of the offsets, which are sorted."""
        places = np.minimum(np.searchsorted(self.starts, offsets), len(self.starts) - 1)
        in_step = self.starts[places] == offsets
        if not in_step.all():
            self._replace_from(offsets.tolist(), in_step.tolist())

    def _replace_from(self, offsets: list[int], in_step: list[bool]) -> None:
        """Decode anew from each offset out of step, and put what is found into `starts` at once.

        Those in step come along: what is decoded from one in front of them may swallow them.
        """
        found: list[int] = []
        bounds: list[tuple[int, int]] = []  # first and last of the starts that make way
        for offset, is_start in zip(offsets, in_step, strict=True):
            if found and found[-1] >= offset:
                index = bisect_left(found, offset)
                if found[index] == offset:
                    continue
                # What was decoded from the offset before is out of step here.
                del found[index:]
                bounds[-1] = (bounds[-1][0], offset - 1)
            if is_start:
                continue
            found += self._decode_until_in_step(offset)
            bounds.append((offset, found[-1]))
        keep = np.ones(len(self.starts), np.bool_)
        edges = np.array(bounds, np.uint32)
        lows = np.searchsorted(self.starts, edges[:, 0]).tolist()
        highs = np.searchsorted(self.starts, edges[:, 1], "right").tolist()
        for low, high in zip(lows, highs, strict=True):
            keep[low:high] = False
        self.starts = _merged(self.starts[keep], np.array(found, np.uint32))

    def _decode_until_in_step(self, offset: int) -> list[int]:
        """Return the instructions from `offset` on, up to one that the sweep has too."""
        found = []
        window = self.data[offset : offset + _RESYNC]
        for instruction in Decoder(_BITS, window, ip=offset):
            place = instruction.ip
            index = int(np.searchsorted(self.starts, np.uint32(place)))
            if index < len(self.starts) and self.starts[index] == place:
                break
            found.append(place)
        return found

    def _skip_marks(self, known: "NDArray[np.uint32]") -> None:
        """Take the names in marks for no instructions; one may start right behind each."""
        marks = np.fromiter((m.start() for m in _EMULATE_MARK.finditer(self.data)), np.uint32)
        marks = marks[np.isin(marks, self.starts)] if len(marks) else marks
        if not len(marks):
            return
        inside = np.ravel(marks[:, None] + np.arange(_UD2, _MARK, dtype=np.uint32))
        self.starts = self.starts[~np.isin(self.starts, inside)]
        behind = marks[marks + _MARK < len(self.data)] + np.uint32(_MARK)
        self._realign(_merged(known[~np.isin(known, inside)], behind))

    def _relative(self, ends: "NDArray[np.int64]") -> "NDArray[np.uint64]":
        """Return what the last four bytes of instructions mean as a distance from their end."""
        here = np.uint64(self.address) + ends.astype(np.uint64)
        reached: NDArray[np.uint64] = here + self._displacement(ends)
        return reached

    def _displacement(self, ends: "NDArray[np.int64]") -> "NDArray[np.uint64]":
        """Read the last four bytes of instructions, sign-extended to 64 bits."""
        value = np.zeros(len(ends), np.uint32)
        for byte in range(4):
            value |= self.bytes[ends - 4 + byte].astype(np.uint32) << np.uint32(8 * byte)
        return value.view(np.int32).astype(np.int64).view(np.uint64)

    def _is_indirect(self, places: "NDArray[np.int64]", rm: int) -> "NDArray[np.bool_]":
        """Whether FF /2 or FF /4 with this r/m field and no register stands at each place."""
        modrm = self.bytes[places + 1]
        found: NDArray[np.bool_] = (modrm == 0x10 | rm) | (modrm == 0x20 | rm)
        found &= self.bytes[places] == 0xFF
        return found

    def opcode_positions(self, starts: "NDArray[np.int64]") -> "NDArray[np.int64]":
        """Return where each instruction's opcode is, behind its prefixes."""
        position = starts.copy()
        pending = np.arange(len(position))
        for _ in range(_MAX_PREFIXES):
            pending = pending[_IS_PREFIX[self.bytes[position[pending]]]]
            if not len(pending):
                break
            position[pending] += 1
        return position


def _merged(one: "NDArray[np.uint32]", other: "NDArray[np.uint32]") -> "NDArray[np.uint32]":
    """Return the union of two arrays, sorted; np.union1d hashes, which takes longer by far."""
    both = np.sort(np.concatenate((one, other)), kind="stable")
    first = np.ones(len(both), np.bool_)
    first[1:] = both[1:] != both[:-1]
    return both[first]


def _flags(values: "Iterable[int]") -> "NDArray[np.bool_]":
    table = np.zeros(256, np.bool_)
    table[list(values)] = True
    return table


def _first_byte(info: "OpCodeInfo") -> int:
    """Return the first opcode byte behind the escape bytes."""
    return info.op_code >> 8 if info.op_code_len == 2 else info.op_code


def _opcodes(kind: int) -> "set[int]":
    probe = Instruction()
    found = set()
    for code in traps.BY_CODE:
        probe.code = code  # type: ignore[assignment]  # iced's enumerations are integers
        info = probe.op_code()
        if info.table == kind:
            found.add(_first_byte(info))
    return found


_IS_PREFIX: Final = _flags([*_PREFIXES, *_REX])
_ONE_BYTE: Final = _flags(_opcodes(OpCodeTableKind.NORMAL))
_TWO_BYTES: Final = _flags(_opcodes(OpCodeTableKind.T0F))
_THREE_BYTES: Final = _flags(_opcodes(OpCodeTableKind.T0F38))
