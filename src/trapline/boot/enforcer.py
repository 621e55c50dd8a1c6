"""Looks at each #VE before it is one, and carries the user's policies out.

The same look at each access finds devices that are used without being on an allow list.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from trapline.boot.paravirt import ParavirtCalls
from trapline.cpu.engine import Reg
from trapline.tdx.vmm_interface import ExitReason, trap_class

if TYPE_CHECKING:
    from trapline.boot.policy import Mode
    from trapline.machine.machine import Machine
    from trapline.machine.qemu.pci import Function
    from trapline.results.scan import Site
    from trapline.results.trapclass import TrapClass
    from trapline.tdx.vmm_interface import VeInfo

Reason = Literal["forbidden", "not-allowed"]
PORT_SHIFT: Final = 16
# A guest can access the host from any number of places.
MAX_PLACES: Final = 4096


@dataclass(slots=True)
class Access:
    """Accesses of one reason, class and place; `address` is the first one's."""

    reason: Reason
    trap: "TrapClass"
    rip: int
    address: int
    function: "Function | None"
    count: int = 0


@dataclass(slots=True)
class Tally:
    """What happened under the policies: counts by class, and screams by place."""

    paravirtualised: dict[str, int] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    screams: dict[tuple[Reason, str, int, int], Access] = field(default_factory=dict)
    screams_dropped: int = 0


FindSite = Callable[[int, "TrapClass"], "Site | None"]


class Enforcer:
    """Looks at each #VE before it is one (`TdxModule.divert`).

    `find_site` gives the scan's site at a run-time address. `on_scream` is called at the first
    access of each kind from each place. `unlisted` are the functions, by devfn, that no entry
    of the allow list lets in.
    """

    def __init__(
        self,
        machine: "Machine",
        policies: "dict[str, Mode]",
        find_site: FindSite,
        on_scream: Callable[[Access], None],
        unlisted: frozenset[int] = frozenset(),
    ) -> None:
        self.tally = Tally()
        self._machine = machine
        self._policies = policies
        self._find_site = find_site
        self._on_scream = on_scream
        self._unlisted = unlisted
        self._known: dict[tuple[int, str], bool] = {}
        self._used: set[tuple[int, str]] = set()
        self._calls = ParavirtCalls(machine.vcpu, machine.host)
        machine.module.divert(self.look)

    def look(self, info: "VeInfo") -> bool:
        """Decide about one access; True when it was carried out without a #VE."""
        trap = trap_class(info.reason)
        mode = self._policies.get(trap, "trap")
        if self._unlisted:
            self._look_at_device(trap, info)
        if mode == "trap":
            return False
        if trap == "mmio" and not info.gpa & self._machine.memory.shared_bit:
            return False  # a page that waits to be accepted
        if mode == "forbid":
            self._scream("forbidden", trap, info, self._function(trap, info))
            return False
        rip = self._machine.vcpu.regs[Reg.RIP]
        if self._is_known(rip, trap) and self._calls.carry_out(info):
            counts = self.tally.paravirtualised
            self._used.add((rip, trap))
            counts[trap] = counts.get(trap, 0) + 1
            return True
        self.tally.missed[trap] = self.tally.missed.get(trap, 0) + 1
        return False

    def _is_known(self, rip: int, trap: "TrapClass") -> bool:
        key = (rip, trap)
        known = self._known.get(key)
        if known is None:
            known = self._find_site(rip, trap) is not None
            # Until the kernel has been found in memory, nothing is known, and that changes.
            if known or len(self._known) < MAX_PLACES:
                self._known[key] = known
        return known

    @property
    def places(self) -> int:
        """How many places made an access without a #VE."""
        return len(self._used)

    def forget(self) -> None:
        """Look all places up again: more of the guest is known now."""
        self._known.clear()

    def _look_at_device(self, trap: "TrapClass", info: "VeInfo") -> None:
        function = self._function(trap, info)
        if function is not None and function.devfn in self._unlisted:
            self._scream("not-allowed", trap, info, function)

    def _function(self, trap: "TrapClass", info: "VeInfo") -> "Function | None":
        devices = self._machine.devices
        if devices is None or trap not in ("mmio", "pio"):
            return None
        return devices.function_at("io" if trap == "pio" else "memory", self._address(info))

    def _address(self, info: "VeInfo") -> int:
        if info.reason == ExitReason.IO_INSTRUCTION:
            return info.qualification >> PORT_SHIFT & 0xFFFF
        if info.reason == ExitReason.EPT_VIOLATION:
            return info.gpa & ~self._machine.memory.shared_bit
        register = Reg.RAX if info.reason == ExitReason.CPUID else Reg.RCX
        return self._machine.vcpu.regs[register] & 0xFFFF_FFFF

    def _scream(
        self, reason: Reason, trap: "TrapClass", info: "VeInfo", function: "Function | None"
    ) -> None:
        rip = self._machine.vcpu.regs[Reg.RIP]
        key = (reason, trap, rip, -1 if function is None else function.devfn)
        access = self.tally.screams.get(key)
        if access is None:
            if len(self.tally.screams) >= MAX_PLACES:
                self.tally.screams_dropped += 1
                return
            access = Access(reason, trap, rip, self._address(info), function)
            self.tally.screams[key] = access
        access.count += 1
        if access.count == 1:
            self._on_scream(access)
