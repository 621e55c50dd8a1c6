"""Who may touch which page: the secure EPT and the shared EPT of one TD.

The guest-physical space has two halves, told apart by the shared bit. The private half is
mapped by the secure EPT, whose entries the module keeps (`SeptState`); the shared half is the
host's own. The host changes both through the methods here, which stand for the TDH.MEM.*
calls; the guest only turns PENDING pages into MAPPED ones, with TDG.MEM.PAGE.ACCEPT.

Each change is pushed to `Memory.set_private` and `Memory.set_shared` as whole ranges. State is
one byte for each 4 KiB page of RAM and one flag for each 2 MiB region that is a single leaf.
GPAs outside RAM are never private and are MMIO in the shared half.

Sources: TDX module 1.5.01, auto_gen/sept_state_lookup.c, sept_manager.h,
tdg_mem_page_accept.c; the conversion of pages is KVM's (Linux, arch/x86/kvm/vmx/tdx.c).
"""

from enum import Enum, IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trapline.cpu.engine import PageState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trapline.cpu.engine import Memory

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
LARGE_SHIFT = 21
LARGE_SIZE = 1 << LARGE_SHIFT
PAGES_PER_LARGE = LARGE_SIZE // PAGE_SIZE
LEVEL_4K = 0
LEVEL_2M = 1

_ZERO_LARGE = bytes(LARGE_SIZE)


class SeptState(IntEnum):
    """State of a private page. The values are this model's; `public` has the module's."""

    FREE = 0  # no entry: TDH.MEM.PAGE.ADD or AUG can fill it
    PENDING = 1  # added by AUG, not yet accepted by the guest
    MAPPED = 2
    BLOCKED = 3  # MAPPED, then TDH.MEM.RANGE.BLOCK
    PENDING_BLOCKED = 4

    @property
    def public(self) -> int:
        """The architectural state number in TD exits (module, sept_state_lookup.c)."""
        return _PUBLIC_STATE[self]


_PUBLIC_STATE = {
    SeptState.FREE: 0,
    SeptState.BLOCKED: 1,
    SeptState.PENDING: 2,
    SeptState.PENDING_BLOCKED: 3,
    SeptState.MAPPED: 4,
}


class SharedState(IntEnum):
    """What the host's own EPT says of a page in the shared half."""

    ABSENT = 0  # suppress #VE is set: an access is a TD exit
    MAPPED = 1
    MMIO = 2  # not present with suppress #VE clear: an access is a #VE


class AcceptResult(Enum):
    """What TDG.MEM.PAGE.ACCEPT found."""

    ACCEPTED = "accepted"
    ALREADY_ACCEPTED = "already accepted"
    SIZE_MISMATCH = "size mismatch"
    VIOLATION = "violation"


class Accept(NamedTuple):
    """Outcome of `Sept.accept`: the level and state of the entry where the walk ended."""

    result: AcceptResult
    level: int
    state: SeptState
    is_leaf: bool


class SeptSnapshot(NamedTuple):
    """The state of every page, as `Sept.save` returns it."""

    private: bytes
    large: bytes
    shared: bytes


class Sept:
    """Private and shared state of every page of a TD.

    `memory_size` is the RAM from GPA 0 in bytes, a multiple of 4 KiB; all of it is FREE at
    first. GPAs given to methods have the shared bit clear. Ranges must be page-aligned and
    inside RAM: callers check what a guest gave them with `in_ram` first.
    """

    def __init__(self, memory: "Memory", memory_size: int) -> None:
        if memory_size <= 0 or memory_size % PAGE_SIZE:
            raise ValueError("memory size must be a positive multiple of 4096")
        pages = memory_size >> PAGE_SHIFT
        self.memory_size = memory_size
        self._memory = memory
        self._private = bytearray(pages)
        self._shared = bytearray(pages)
        self._large = bytearray((memory_size + LARGE_SIZE - 1) >> LARGE_SHIFT)
        self._saved: SeptSnapshot | None = None
        memory.set_private(0, memory_size, PageState.ABSENT)
        memory.set_shared(0, memory_size, PageState.ABSENT)

    # Questions.

    def in_ram(self, gpa: int, size: int) -> bool:
        """Whether [gpa, gpa + size) is page-aligned and inside RAM."""
        return (
            gpa >= 0
            and size > 0
            and not (gpa | size) & (PAGE_SIZE - 1)
            and gpa + size <= self.memory_size
        )

    def private_state(self, gpa: int) -> SeptState:
        """State of the private page at `gpa`; FREE outside RAM."""
        page = gpa >> PAGE_SHIFT
        return SeptState(self._private[page]) if page < len(self._private) else SeptState.FREE

    def shared_state(self, gpa: int) -> SharedState:
        """State of the page at `gpa` in the shared half; MMIO outside RAM."""
        page = gpa >> PAGE_SHIFT
        return SharedState(self._shared[page]) if page < len(self._shared) else SharedState.MMIO

    def not_shared(self, gpa: int, size: int) -> list[int]:
        """GPAs of the pages of a range of RAM that are not mapped in the shared half."""
        first = gpa >> PAGE_SHIFT
        states = self._shared[first : first + (size >> PAGE_SHIFT)]
        if states.count(SharedState.MAPPED) == len(states):
            return []  # by far the most frequent answer
        return [
            (first + index) << PAGE_SHIFT
            for index, state in enumerate(states)
            if state != SharedState.MAPPED
        ]

    def level(self, gpa: int) -> int:
        """Level of the leaf that maps `gpa` privately: LEVEL_4K or LEVEL_2M."""
        region = gpa >> LARGE_SHIFT
        return LEVEL_2M if region < len(self._large) and self._large[region] else LEVEL_4K

    def count(self, state: SeptState) -> int:
        """Count the pages of RAM in `state`."""
        return self._private.count(state)

    # What the host does.

    def add(self, gpa: int, size: int) -> None:
        """TDH.MEM.PAGE.ADD: FREE pages become MAPPED, as part of the initial image."""
        self._fill(gpa, size, {SeptState.FREE: SeptState.MAPPED})

    def aug(self, gpa: int, size: int, level: int = LEVEL_4K) -> None:
        """TDH.MEM.PAGE.AUG: FREE pages become PENDING, as leaves of `level`.

        With LEVEL_2M, those 2 MiB regions that lie wholly in the range and are wholly FREE
        become one leaf each; all else gets 4 KiB leaves.
        """
        if level == LEVEL_2M:
            first = (gpa + LARGE_SIZE - 1) >> LARGE_SHIFT
            last = (gpa + size) >> LARGE_SHIFT
            for region in range(first, last):
                page = region * PAGES_PER_LARGE
                if not any(self._private[page : page + PAGES_PER_LARGE]):
                    self._large[region] = 1
        self._fill(gpa, size, {SeptState.FREE: SeptState.PENDING})

    def block(self, gpa: int, size: int) -> None:
        """TDH.MEM.RANGE.BLOCK: the guest's accesses become TD exits."""
        self._fill(
            gpa,
            size,
            {
                SeptState.MAPPED: SeptState.BLOCKED,
                SeptState.PENDING: SeptState.PENDING_BLOCKED,
            },
        )

    def unblock(self, gpa: int, size: int) -> None:
        """TDH.MEM.RANGE.UNBLOCK."""
        self._fill(
            gpa,
            size,
            {
                SeptState.BLOCKED: SeptState.MAPPED,
                SeptState.PENDING_BLOCKED: SeptState.PENDING,
            },
        )

    def demote(self, gpa: int) -> None:
        """TDH.MEM.PAGE.DEMOTE: split the 2 MiB leaf around `gpa`, if it is one."""
        region = gpa >> LARGE_SHIFT
        if region < len(self._large) and self._large[region]:
            self._large[region] = 0
            self._saved = None

    def remove(self, gpa: int, size: int) -> None:
        """TDH.MEM.PAGE.REMOVE: any page becomes FREE; a leaf cut in two is demoted."""
        self._fill(gpa, size, dict.fromkeys(list(SeptState)[1:], SeptState.FREE))
        first, last = gpa >> LARGE_SHIFT, (gpa + size - 1) >> LARGE_SHIFT
        self._large[first : last + 1] = bytes(last + 1 - first)

    def share(self, gpa: int, size: int) -> None:
        """Back the shared half with fresh, zeroed pages; the private pages are removed.

        Where the two halves of an engine show the same bytes, the zeroing is what keeps the
        host from private data, as the second physical page does on hardware.
        """
        self.remove(gpa, size)
        self._saved = None
        for at, length, state in self._runs(self._shared, gpa, size):
            if state != SharedState.MAPPED:
                self._shared[at >> PAGE_SHIFT : (at + length) >> PAGE_SHIFT] = bytes(
                    [SharedState.MAPPED]
                ) * (length >> PAGE_SHIFT)
                self._zero(self._memory.shared_ram, at, length)
        self._memory.set_shared(gpa, size, PageState.MAPPED)

    def unshare(self, gpa: int, size: int) -> None:
        """Take the pages of the shared half away; the private half stays as it is."""
        self._check(gpa, size)
        self._saved = None
        self._shared[gpa >> PAGE_SHIFT : (gpa + size) >> PAGE_SHIFT] = bytes(size >> PAGE_SHIFT)
        self._memory.set_shared(gpa, size, PageState.ABSENT)

    # What the guest does.

    def accept(self, gpa: int, level: int) -> Accept:
        """Carry out TDG.MEM.PAGE.ACCEPT: PENDING becomes MAPPED, filled with zeros.

        `gpa` is aligned to `level`. The cases are those of `check_tdaccept_failure` in the
        module's tdg_mem_page_accept.c.
        """
        leaf_level = self.level(gpa)
        state = self.private_state(gpa)
        if level == LEVEL_2M and leaf_level == LEVEL_4K:
            page = gpa >> PAGE_SHIFT
            if any(self._private[page : page + PAGES_PER_LARGE]):
                return Accept(AcceptResult.SIZE_MISMATCH, LEVEL_2M, state, is_leaf=False)
            return Accept(AcceptResult.VIOLATION, LEVEL_2M, state, is_leaf=False)
        is_leaf = state != SeptState.FREE
        if state == SeptState.MAPPED:
            return Accept(AcceptResult.ALREADY_ACCEPTED, leaf_level, state, is_leaf)
        if leaf_level != level or state != SeptState.PENDING:
            return Accept(AcceptResult.VIOLATION, leaf_level, state, is_leaf)
        size = LARGE_SIZE if level == LEVEL_2M else PAGE_SIZE
        self._zero(self._memory.ram, gpa, size)
        self._fill(gpa, size, {SeptState.PENDING: SeptState.MAPPED})
        return Accept(AcceptResult.ACCEPTED, level, state, is_leaf)

    # Snapshots.

    def save(self) -> SeptSnapshot:
        """Return the state of every page; cheap while nothing changes."""
        if self._saved is None:
            self._saved = SeptSnapshot(
                bytes(self._private), bytes(self._large), bytes(self._shared)
            )
        return self._saved

    def restore(self, snapshot: SeptSnapshot) -> None:
        """Go back to a saved state and push what differs to the engine."""
        if snapshot is self._saved:
            return
        was_mapped = _is(self._private, SeptState.MAPPED)
        was_shared = _is(self._shared, SharedState.MAPPED)
        self._private[:] = snapshot.private
        self._large[:] = snapshot.large
        self._shared[:] = snapshot.shared
        self._saved = snapshot
        _push(was_mapped, _is(self._private, SeptState.MAPPED), self._memory.set_private)
        _push(was_shared, _is(self._shared, SharedState.MAPPED), self._memory.set_shared)

    # Ranges.

    def _check(self, gpa: int, size: int) -> None:
        if not self.in_ram(gpa, size):
            raise ValueError(f"GPA range {gpa:#x}+{size:#x} is not whole pages of RAM")

    def _fill(self, gpa: int, size: int, change: dict[SeptState, SeptState]) -> None:
        """Apply `change` to each page of the range and push the result to the engine."""
        self._check(gpa, size)
        self._saved = None
        for at, length, old in list(self._runs(self._private, gpa, size)):
            new = change.get(SeptState(old))
            if new is None:
                continue
            first, count = at >> PAGE_SHIFT, length >> PAGE_SHIFT
            self._private[first : first + count] = bytes([new]) * count
            mapped = new == SeptState.MAPPED
            if mapped != (old == SeptState.MAPPED):
                state = PageState.MAPPED if mapped else PageState.ABSENT
                self._memory.set_private(at, length, state)

    @staticmethod
    def _runs(states: bytearray, gpa: int, size: int) -> "Iterator[tuple[int, int, int]]":
        """Yield (GPA, bytes, state) of each run of pages that share a state."""
        first = gpa >> PAGE_SHIFT
        part = np.frombuffer(bytes(states[first : first + (size >> PAGE_SHIFT)]), np.uint8)
        edges = [0, *(np.flatnonzero(part[1:] != part[:-1]) + 1).tolist(), len(part)]
        for start, end in pairwise(edges):
            yield (first + start) << PAGE_SHIFT, (end - start) << PAGE_SHIFT, int(part[start])

    @staticmethod
    def _zero(ram: memoryview, gpa: int, size: int) -> None:
        for at in range(gpa, gpa + size, LARGE_SIZE):
            length = min(LARGE_SIZE, gpa + size - at)
            ram[at : at + length] = _ZERO_LARGE[:length]


def _is(states: bytearray, state: int) -> bytes:
    """Map each page to 1 if it is in `state`, else to 0."""
    table = bytes(int(value == state) for value in range(256))
    return bytes(states.translate(table))


def _push(old: bytes, new: bytes, call: "Callable[[int, int, PageState], None]") -> None:
    """Tell the engine of the runs of pages that differ."""
    before, after = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
    # 0: unchanged, 1: now absent, 2: now mapped
    change = np.where(before == after, 0, after + 1)
    edges = [0, *(np.flatnonzero(change[1:] != change[:-1]) + 1).tolist(), len(change)]
    for start, end in pairwise(edges):
        if change[start]:
            state = PageState.MAPPED if change[start] == 2 else PageState.ABSENT
            call(start << PAGE_SHIFT, (end - start) << PAGE_SHIFT, state)
