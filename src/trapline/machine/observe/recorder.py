"""What happened in a run: traps counted by kind and place, hashed, and written out if asked.

The recorder is the module's `TrapListener`. It sees each #VE, TDCALL and TDVMCALL before the
guest or the VMM does, with the address it came from; addresses are turned into functions when
the run is over.
"""

import struct
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from hashlib import blake2b
from typing import Final, NamedTuple

from trapline.cpu.engine import Reg, Vcpu
from trapline.machine.observe.trapcontext import TrapContexts
from trapline.tdx.vmm_interface import ExitReason, VeInfo

# Addresses below this may belong to ring 3 as well as to code that runs identity-mapped.
USER_END: Final = 1 << 47
# A hostile guest can trap at any number of addresses; a boot has a few hundred.
MAX_SITES: Final = 100_000
LAST: Final = 64


class TrapKind(IntEnum):
    """What was trapped, as part of the trace hash."""

    VE = 1
    TDCALL = 2
    TDVMCALL = 3


class TrapPlace(NamedTuple):
    """Where and why: `reason` is an exit reason, TDCALL for both kinds of call."""

    reason: int
    rip: int
    is_user: bool


class TrapRecord(NamedTuple):
    """One trap of the ring buffer or the trace; `details` depend on the kind."""

    kind: TrapKind
    cycles: int
    rip: int
    code: int  # exit reason, TDCALL leaf or TDVMCALL leaf
    details: tuple[int, ...]


Sink = Callable[[TrapRecord], None]
VP_VMCALL: Final = 0
HASH_STEP: Final = 1 << 16
# Enumeration members are slow to hash and to compare.
_VE: Final = int(TrapKind.VE)
_TDCALL: Final = int(TrapKind.TDCALL)
_TDVMCALL: Final = int(TrapKind.TDVMCALL)
_REASON_TDCALL: Final = int(ExitReason.TDCALL)
_R11: Final = int(Reg.R11)
_R12: Final = int(Reg.R12)
_RAX: Final = int(Reg.RAX)
_CPUID: Final = int(ExitReason.CPUID)


class TrapRecorder:
    """Counts, hashes and remembers traps; `contexts` says in which contexts they came.

    `sink` is called with each trap, `on_place` with each place at its first trap,
    and `on_double_fault` when the module turns a #VE into #DF.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        sink: Sink | None = None,
        on_place: Callable[[TrapPlace], None] | None = None,
        on_double_fault: Callable[[], None] | None = None,
    ) -> None:
        self._vcpu = vcpu
        self._sink = sink
        self._on_place = on_place
        self._on_double_fault = on_double_fault
        self._hash = blake2b(digest_size=16)
        self._unhashed = bytearray()
        self._pack = struct.Struct("<BQQQ4Q").pack
        # A boot makes 150,000 calls: plain tuples and dictionaries, named when they are read.
        self._sites: dict[tuple[int, int, bool], int] = {}
        self._last: deque[tuple[int, int, int, int, tuple[int, ...]]] = deque(maxlen=LAST)
        self._ve: dict[int, int] = {}
        self._tdcalls: dict[int, int] = {}
        self._tdvmcalls: dict[int, int] = {}
        self.sites_dropped = 0
        self.in_nmi = 0  # #VEs while NMIs were blocked
        self.nested = 0  # #VEs between a #VE and the TDVMCALL by which its handler serves it
        self._is_open = False
        self.contexts = TrapContexts(vcpu)

    @property
    def ve(self) -> dict[int, int]:
        """#VE by exit reason."""
        return dict(self._ve)

    @property
    def tdcalls(self) -> dict[int, int]:
        """TDCALLs by leaf, TDG.VP.VMCALL included."""
        calls = dict(self._tdcalls)
        if self._tdvmcalls:
            calls[VP_VMCALL] = calls.get(VP_VMCALL, 0) + sum(self._tdvmcalls.values())
        return calls

    @property
    def tdvmcalls(self) -> dict[int, int]:
        """TDVMCALLs by sub-function."""
        return dict(self._tdvmcalls)

    @property
    def sites(self) -> dict[TrapPlace, int]:
        """Traps by place."""
        return {TrapPlace(*place): count for place, count in self._sites.items()}

    @property
    def last(self) -> tuple[TrapRecord, ...]:
        """The last traps, oldest first."""
        return tuple(TrapRecord(TrapKind(trap[0]), *trap[1:]) for trap in self._last)

    @property
    def digest(self) -> str:
        """BLAKE2b-128 over all traps, in hexadecimal."""
        whole = self._hash.copy()
        whole.update(self._unhashed)
        return whole.hexdigest()

    # vmm_interface.TrapListener

    def on_ve(self, rip: int, info: VeInfo, *, double_fault: bool) -> None:
        """Note a #VE, or the #DF in its place."""
        reason = int(info[0])
        self._ve[reason] = self._ve.get(reason, 0) + 1
        self.contexts.note(reason, nested=self._is_open, second=double_fault)
        self.nested += self._is_open
        self.in_nmi += self._vcpu.nmi_blocked
        # Linux asks the host for the hypervisor's CPUID leaves only (handle_cpuid, tdx.c).
        self._is_open = reason != _CPUID or self._vcpu.regs[_RAX] >> 28 & 0xF == 4
        self._note(_VE, rip, reason, reason, info[1:5])
        if double_fault and self._on_double_fault is not None:
            self._on_double_fault()

    def on_tdcall(self, rip: int, leaf: int, status: int) -> None:
        """Note a TDCALL other than a TDVMCALL that the VMM serves."""
        self._tdcalls[leaf] = self._tdcalls.get(leaf, 0) + 1
        self._note(_TDCALL, rip, _REASON_TDCALL, leaf, (status, 0, 0, 0))

    def on_tdvmcall(self, rip: int, registers: list[int]) -> None:
        """Note a TDVMCALL."""
        self._is_open = False
        leaf = registers[_R11]
        calls = self._tdvmcalls
        if leaf in calls:
            calls[leaf] += 1
        elif len(calls) < MAX_SITES:
            calls[leaf] = 1
        self._note(_TDVMCALL, rip, _REASON_TDCALL, leaf, tuple(registers[_R12:]))

    def _note(self, kind: int, rip: int, reason: int, code: int, details: tuple[int, ...]) -> None:
        vcpu = self._vcpu
        place = (reason, rip, rip < USER_END and vcpu.cpl == 3)
        sites = self._sites
        is_new = place not in sites
        if not is_new:
            sites[place] += 1
        elif len(sites) < MAX_SITES:
            sites[place] = 1
        else:
            self.sites_dropped += 1
            is_new = False
        cycles = vcpu.cycles
        self._last.append((kind, cycles, rip, code, details))
        unhashed = self._unhashed
        unhashed += self._pack(kind, cycles, rip, code, *details)
        if len(unhashed) > HASH_STEP:
            self._hash.update(unhashed)
            unhashed.clear()
        if self._sink is not None:
            self._sink(TrapRecord(TrapKind(kind), cycles, rip, code, details))
        if is_new and self._on_place is not None:
            self._on_place(TrapPlace(*place))
