"""Kernel stacks, told by stack pointers alone. Below RSP, and on those not in use, all is dead.

A stack is the mapped memory around a stack pointer, up to an unmapped page (its guard) or the end
of an aligned block of the size that this kernel's task stacks have. Those that the processor
switches to by itself are in the TSS, which tells their ends, too.
"""

import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from trapline.cpu.engine import Vcpu
from trapline.guest.target import KERNEL_HALF, Target
from trapline.linux import names

_PAGE: Final = 4096
_WORD: Final = 8
_COLUMNS: Final = _PAGE // _WORD
_ALL: Final = np.uint64((1 << 64) - 1)
_DEFAULT_SIZE: Final = 16 << 10
_MAX_SIZE: Final = 128 << 10
# RSP0 to RSP2 at 4, IST1 to IST7 at 36 (SDM 3A, 8.7).
_TSS: Final = struct.Struct("<4x3Q8x7Q")

Mask = npt.NDArray[np.uint64]


class _Stack(NamedTuple):
    """GLAs: [low, high)."""

    low: int
    high: int


def size_of_stacks(target: Target) -> int:
    """Return how large a task's stack is, in bytes: a power of two."""
    for first, last in names.INIT_STACK:
        start, end = target.address(first), target.address(last)
        if start is not None and end is not None and _PAGE <= end - start <= _MAX_SIZE:
            return 1 << (end - start - 1).bit_length()
    return _DEFAULT_SIZE


class Stacks:
    """The stacks that are known, at the compare point, where the processor is when this is made."""

    def __init__(self, vcpu: Vcpu, size: int, rsp: int, cpl: int) -> None:
        self._vcpu = vcpu
        self._size = size
        self._rsp = rsp if cpl == 0 else None
        self._stacks: list[_Stack] = []
        self._pages: dict[int, tuple[int, _Stack]] = {}  # GPA -> GLA, and the stack
        for top in self._tops():
            self._keep(_Stack(self._bottom(top), top))

    def copy(self) -> "Stacks":
        """Return the same, to be added to."""
        other = object.__new__(Stacks)
        vars(other).update(vars(self))
        other._stacks, other._pages = self._stacks.copy(), self._pages.copy()
        return other

    def add(self, pointers: Iterable[int]) -> None:
        """Note the stacks that these stack pointers are in."""
        for rsp in pointers:
            at = rsp - _WORD  # an empty stack's RSP is one past its end
            if rsp >= KERNEL_HALF and not any(s.low <= at < s.high for s in self._stacks):
                self._keep(_Stack(self._bottom(rsp), self._top(rsp)))

    def holding(self, pointers: Iterable[int]) -> tuple[range, ...]:
        """Return the known stacks that these stack pointers are in."""
        found = {s: None for rsp in pointers for s in self._stacks if s.low <= rsp - _WORD < s.high}
        return tuple(range(s.low, s.high + 1) for s in found)

    def is_dead(self, gpa: int) -> bool:
        """Whether a word is on a stack, and not in use."""
        found = self._pages.get(gpa & -_PAGE)
        if found is None:
            return False
        gla, stack = found
        return stack is not self._in_use() or gla + gpa % _PAGE < (self._rsp or 0)

    def is_in_use(self, gpa: int) -> bool:
        """Whether a word is on the stack in use, above RSP."""
        return gpa & -_PAGE in self._pages and not self.is_dead(gpa)

    def compared(self, page: int) -> Mask | None:
        """Return the bits of each word of a page that are not dead; None if none is."""
        if page not in self._pages:
            return None
        alive = [not self.is_dead(page + _WORD * column) for column in range(_COLUMNS)]
        return np.where(alive, _ALL, np.uint64(0))

    def _in_use(self) -> _Stack | None:
        rsp = self._rsp
        if rsp is None:
            return None
        return next((s for s in self._stacks if s.low <= rsp - _WORD < s.high), None)

    def _keep(self, stack: _Stack) -> None:
        if stack.low >= stack.high:
            return
        self._stacks.append(stack)
        for page in range(stack.low & -_PAGE, stack.high, _PAGE):
            gpa = self._translate(page)
            if gpa is not None:
                self._pages.setdefault(gpa, (page, stack))

    def _tops(self) -> list[int]:
        """Return the ends of the stacks that the TSS names."""
        data = self._vcpu.read(self._vcpu.segment("tr").base, _TSS.size)
        return [] if data is None else [top for top in _TSS.unpack(data) if top >= KERNEL_HALF]

    def _bottom(self, rsp: int) -> int:
        page = rsp - _WORD & -_PAGE
        while page > (rsp - _WORD & -self._size) and self._translate(page - _PAGE) is not None:
            page -= _PAGE
        return page if self._translate(page) is not None else rsp

    def _top(self, rsp: int) -> int:
        page, end = (rsp - _WORD & -_PAGE) + _PAGE, (rsp - _WORD & -self._size) + self._size
        while page < end and self._translate(page) is not None:
            page += _PAGE
        # Another stack may begin where this one ends.
        return min([page, *(s.low for s in self._stacks if rsp <= s.low)])

    def _translate(self, gla: int) -> int | None:
        gpa = self._vcpu.translate(gla)
        return None if gpa is None else gpa & ~self._vcpu.memory.shared_bit
