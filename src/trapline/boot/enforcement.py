"""A boot's policies at work: what the enforcer finds, turned into the result's own words."""

from typing import TYPE_CHECKING, Final

from trapline.boot.enforcer import Access, Enforcer
from trapline.machine.outcome import OutcomeKind
from trapline.machine.qemu.catalogue import CATALOGUE
from trapline.results.boot import BootDevice, BootPolicy, Scream

if TYPE_CHECKING:
    from collections.abc import Callable

    from trapline.boot.accounting import SiteIndex
    from trapline.boot.policy import Guard
    from trapline.kernel.live.devices import PciDevice
    from trapline.machine.machine import Machine
    from trapline.machine.observe.symbols import GuestSymbols
    from trapline.machine.qemu.pci import Function
    from trapline.results.scan import Site
    from trapline.results.splat import Splat
    from trapline.results.trapclass import TrapClass

# A splat has the whole back trace; a forbidden class screams from dozens of places.
MAX_SPLATS: Final = 16
_NAMES: Final = {model.pci_id: model.title for model in CATALOGUE.values()}
_WHAT: Final = {"mmio": "MMIO at", "pio": "port", "msr": "MSR", "cpuid": "CPUID leaf"}


class BootGuard:
    """Watches one run for `guard`. `splat` takes down the guest's state under a banner."""

    def __init__(
        self,
        guard: "Guard",
        machine: "Machine",
        symbols: "GuestSymbols",
        index: "SiteIndex",
        splat: "Callable[[str], Splat]",
    ) -> None:
        self._guard = guard
        self._machine = machine
        self._symbols = symbols
        self._index = index
        self._splat = splat
        self._screams: list[tuple[Access, str | None, Site | None, Splat | None]] = []
        self._functions = () if machine.devices is None else machine.devices.functions
        unlisted = {f.devfn for f in self._functions if guard.is_allowed(f) is False}
        if machine.devices is not None and guard.hide:
            for function in self._functions:
                if function.devfn in unlisted:
                    machine.devices.backend.hide(function)
            unlisted = set()
        self._hidden = guard.hide
        self.enforcer: Enforcer | None = None
        if guard.classes or unlisted:
            self.enforcer = Enforcer(
                machine, guard.classes, self._find_site, self._on_scream, frozenset(unlisted)
            )

    def _find_site(self, rip: int, trap: "TrapClass") -> "Site | None":
        location = self._symbols.locate(rip)
        return self._index.find(location, self._symbols, trap)

    def _on_scream(self, access: Access) -> None:
        site = self._find_site(access.rip, access.trap)
        driver = self._driver(access, site)
        splat = None
        if len(self._screams) < MAX_SPLATS:
            splat = self._splat(self._banner(access, driver, site))
        self._screams.append((access, driver, site, splat))
        if self._guard.panic and access.reason == "forbidden":
            label = self._symbols.locate(access.rip).label
            self._machine.host.end(
                OutcomeKind.FORBIDDEN,
                f"{_describe(access)} is forbidden; {label} made the access.",
            )

    def _driver(self, access: Access, site: "Site | None") -> str | None:
        function = access.function
        if function is not None:
            for device in self._symbols.pci_devices():
                if device.devfn == function.devfn and device.drivers:
                    return " + ".join(device.drivers)
        if site is None:
            return None
        return site.driver or site.subsystem

    def _banner(self, access: Access, driver: str | None, site: "Site | None") -> str:
        about = [f"device {access.function.slot} {access.function.id}"] if access.function else []
        about.append(f"driver {driver or 'unknown'}")
        about.append(f"scan {site.id}" if site else "not in the scan")
        what = "is forbidden" if access.reason == "forbidden" else "is not on the allow list"
        return f"trapline: {_describe(access)} {what} ({', '.join(about)})"

    # The result.

    def devices(self, bound: "tuple[PciDevice, ...]") -> tuple[BootDevice, ...]:
        """Describe the devices; `bound` is what the kernel says of them."""
        drivers = {device.devfn: device.drivers for device in bound}
        return tuple(self._device(function, drivers) for function in self._functions)

    def _device(self, function: "Function", drivers: "dict[int, tuple[str, ...]]") -> BootDevice:
        allowed = self._guard.is_allowed(function)
        return BootDevice(
            slot=function.slot,
            id=function.id,
            name=_NAMES.get(function.id, "a QEMU device"),
            allowed=allowed,
            hidden=self._hidden and allowed is False,
            drivers=drivers.get(function.devfn, ()),
        )

    @property
    def places(self) -> int:
        """How many places made an access without a #VE."""
        return 0 if self.enforcer is None else self.enforcer.places

    @property
    def policy(self) -> BootPolicy:
        """What was done."""
        if self.enforcer is None:
            return BootPolicy(classes=dict(self._guard.classes))
        tally = self.enforcer.tally
        return BootPolicy(
            classes=dict(self._guard.classes),
            paravirtualised=dict(tally.paravirtualised),
            missed=dict(tally.missed),
        )

    @property
    def screams_dropped(self) -> int:
        """How many accesses came from places beyond those that are kept."""
        return 0 if self.enforcer is None else self.enforcer.tally.screams_dropped

    @property
    def screams(self) -> tuple[Scream, ...]:
        """All screams, in the order in which they came up."""
        return tuple(
            Scream(
                reason=access.reason,
                trap=access.trap,
                count=access.count,
                address=f"{access.address:#x}",
                label=self._symbols.locate(access.rip).label,
                device=None if access.function is None else access.function.slot,
                driver=driver,
                scan_id=None if site is None else site.id,
                splat=splat,
            )
            for access, driver, site, splat in self._screams
        )


def _describe(access: Access) -> str:
    return f"{_WHAT[access.trap]} {access.address:#x}"
