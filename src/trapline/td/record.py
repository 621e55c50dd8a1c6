"""What happened in a run: traps counted by kind and place, hashed, and written out if asked.

The recorder is the module's `TrapListener`. It sees each #VE, TDCALL and TDVMCALL before the
guest or the VMM does, with the address it came from; addresses are turned into functions when
the run is over.
"""

import struct
from collections import Counter, deque
from collections.abc import Callable
from enum import IntEnum
from hashlib import blake2b
from typing import Final, NamedTuple

from trapline.td.engine import Engine, Reg
from trapline.td.module.vmm_interface import ExitReason, VeInfo

# Addresses below this may belong to ring 3 as well as to code that runs identity-mapped.
USER_END: Final = 1 << 47
# A hostile guest can trap at any number of addresses; a boot has a few hundred.
MAX_SITES: Final = 100_000
LAST: Final = 64


class Kind(IntEnum):
    """What was trapped, as part of the trace hash."""

    VE = 1
    TDCALL = 2
    TDVMCALL = 3


class Place(NamedTuple):
    """Where and why: `reason` is an exit reason, TDCALL for both kinds of call."""

    reason: int
    rip: int
    is_user: bool


class Trap(NamedTuple):
    """One trap of the ring buffer or the trace; `details` depend on the kind."""

    kind: Kind
    cycles: int
    rip: int
    code: int  # exit reason, TDCALL leaf or TDVMCALL leaf
    details: tuple[int, ...]


Sink = Callable[[Trap], None]
_PACK: Final = struct.Struct("<BQQQ4Q").pack


class TrapRecorder:
    """Counts, hashes and remembers traps.

    `sink` is called with each trap, `on_place` with each place at its first trap,
    `on_double_fault` when the module turns a #VE into #DF, and `on_trap` after each #VE.
    """

    def __init__(
        self,
        engine: Engine,
        sink: Sink | None = None,
        on_place: Callable[[Place], None] | None = None,
        on_double_fault: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._sink = sink
        self._on_place = on_place
        self._on_double_fault = on_double_fault
        self.on_trap: Callable[[], None] | None = None
        self._hash = blake2b(digest_size=16)
        self.ve: Counter[int] = Counter()  # by exit reason
        self.tdcalls: Counter[int] = Counter()  # by leaf, VP.VMCALL included
        self.tdvmcalls: Counter[int] = Counter()  # by GHCI leaf
        self.sites: Counter[Place] = Counter()
        self.sites_dropped = 0
        self.last: deque[Trap] = deque(maxlen=LAST)

    @property
    def digest(self) -> str:
        """BLAKE2b-128 over all traps, in hexadecimal."""
        return self._hash.hexdigest()

    # vmm_interface.TrapListener

    def on_ve(self, rip: int, info: VeInfo, *, double_fault: bool) -> None:
        """Note a #VE, or the #DF in its place."""
        self.ve[info.reason] += 1
        self._note(Kind.VE, rip, info.reason, info.reason, info[1:5])
        if double_fault and self._on_double_fault is not None:
            self._on_double_fault()
        elif self.on_trap is not None:
            self.on_trap()

    def on_tdcall(self, rip: int, leaf: int, status: int) -> None:
        """Note a TDCALL other than a TDVMCALL."""
        self.tdcalls[leaf] += 1
        self._note(Kind.TDCALL, rip, ExitReason.TDCALL, leaf, (status, 0, 0, 0))

    def on_tdvmcall(self, rip: int, registers: list[int]) -> None:
        """Note a TDVMCALL."""
        leaf = registers[Reg.R11]
        self.tdcalls[0] += 1
        if leaf in self.tdvmcalls or len(self.tdvmcalls) < MAX_SITES:
            self.tdvmcalls[leaf] += 1
        arguments = tuple(registers[Reg.R12 : Reg.R15 + 1])
        self._note(Kind.TDVMCALL, rip, ExitReason.TDCALL, leaf, arguments)

    def _note(self, kind: Kind, rip: int, reason: int, code: int, details: tuple[int, ...]) -> None:
        engine = self._engine
        is_user = rip < USER_END and engine.cpl == 3
        place = Place(reason, rip, is_user)
        sites = self.sites
        is_new = place not in sites
        if not is_new or len(sites) < MAX_SITES:
            sites[place] += 1
        else:
            self.sites_dropped += 1
            is_new = False
        trap = Trap(kind, engine.cycles, rip, code, details)
        self.last.append(trap)
        self._hash.update(_PACK(kind, trap.cycles, rip, code, *details))
        if self._sink is not None:
            self._sink(trap)
        if is_new and self._on_place is not None:
            self._on_place(place)
