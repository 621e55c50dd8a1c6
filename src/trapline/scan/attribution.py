"""Whose code a site is: the driver it belongs to, or the subsystem of the kernel proper.

A driver is a Kbuild module, loadable or built in. Code below drivers/ that is always built in is
a driver too, unless `trapline.linux.subsystems` says that it is part of the kernel proper and it
registers no driver of its file's name (drivers/char/hpet.c does, and binds to PNP0103).
"""

import posixpath
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from trapline.kernel.drivers import binding, devicetables
from trapline.kernel.drivers.kbuild import UnitMap, debug_descriptors, initcall_files
from trapline.kernel.drivers.modinfo import ModuleInfo, read_builtin
from trapline.kernel.elf.file import ElfFile
from trapline.linux import subsystems
from trapline.results.scan import Driver

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trapline.allowlist.entries import AllowList
    from trapline.kernel.find.kernelfiles import KernelFiles

#: What `Site.module` holds for built-in code.
VMLINUX: Final = "vmlinux"


class SiteCount(NamedTuple):
    """How many sites a driver has: all, MMIO instructions, calls of out-of-line accessors."""

    sites: int = 0
    mmio: int = 0
    calls: int = 0


class Attribution:
    """Attributes sites of one kernel, and judges its drivers by an allow list.

    Opening reads symbols and types of vmlinux, some 0.6 s; raises BadImageError where it is not
    sound. The answers are cached by source file.
    """

    def __init__(self, kernel: "KernelFiles", allow: "AllowList") -> None:
        self._allow = allow
        self._builtin = tuple(read_builtin(kernel))
        known: dict[str, str] = {}
        initcalls: set[tuple[str, str]] = set()
        self._tables: dict[str, tuple[str, ...]] = {}
        if kernel.vmlinux is not None:
            with ElfFile.open(kernel.vmlinux) as elf:
                known, initcalls = debug_descriptors(elf), initcall_files(elf)
                tables = devicetables.read(elf, [module.name for module in self._builtin])
                self._tables = devicetables.aliases_by_module(tables)
        locations = [module.location for module in self._builtin if module.location]
        self._units = UnitMap(locations, known, initcalls)
        self._locations = {
            module.name: module.location.removeprefix("kernel/") for module in kernel.modules
        }
        self._builtin_driver = lru_cache(maxsize=8192)(self._find_builtin_driver)

    def driver_of(self, module: str, object_path: str | None, file: str | None) -> str | None:
        """Name the driver that code belongs to, None for the kernel proper.

        `module` is as in `Site.module` ("vmlinux" for built-in code); `object_path` the
        compilation unit's source or object below the top of the tree, `file` the source file of
        the site, for where the unit is not known.
        """
        if module != VMLINUX:
            location = self._locations.get(module, "")
            return module if _is_driver_path(location) or not location else None
        unit = _unit(object_path, file)
        return None if unit is None else self._builtin_driver(unit)

    def subsystem_of(
        self, module: str, object_path: str | None, file: str | None, function: str
    ) -> str:
        """Name the subsystem of code; never empty. Arguments are as for `driver_of`."""
        unit = _unit(object_path, file)
        if unit is None and module != VMLINUX:
            unit = self._locations.get(module)
        return subsystems.subsystem(unit, function)

    def drivers(
        self, counts: "Mapping[str, SiteCount]", modules: "Iterable[ModuleInfo]" = ()
    ) -> tuple[Driver, ...]:
        """List the drivers of the kernel, sorted by name, with their sites and verdicts.

        `counts` is by driver name, as `driver_of` gives it; `modules` are the loadable modules
        (see `trapline.kernel.drivers.modinfo.module_info`).
        """
        found = {
            driver.name: driver
            for driver in binding.collect((*self._builtin, *modules), self._tables)
        }
        for name in counts:
            # Code that is always built in, or a module that was not handed over.
            found.setdefault(
                name,
                binding.KernelDriver(name, name not in self._locations, None, "", (), (), ()),
            )
        verdicts = binding.admit(found.values(), self._allow)
        return tuple(
            _document(found[name], verdicts[name], counts.get(name, SiteCount()))
            for name in sorted(found)
        )

    def _find_builtin_driver(self, unit: str) -> str | None:
        unit = posixpath.normpath(unit)
        if module := self._units.module_of(unit):
            return module if _is_driver_path(unit) else None
        rule = subsystems.path_rule(unit)
        name = posixpath.splitext(posixpath.basename(unit))[0].replace("-", "_")
        is_core = rule is not None and rule.core and name not in self._tables
        return name if _is_driver_path(unit) and not is_core else None


def _unit(object_path: str | None, file: str | None) -> str | None:
    """Choose the path that tells whose code it is: a header says nothing."""
    paths = [path for path in (object_path, file) if path and "/" in path]
    return next((path for path in paths if not path.endswith(".h")), None) or next(
        iter(paths), None
    )


def _is_driver_path(path: str) -> bool:
    return path.startswith(("drivers/", "sound/"))


def _document(driver: binding.KernelDriver, verdict: binding.Admission, count: SiteCount) -> Driver:
    return Driver(
        name=driver.name,
        bus=driver.bus,
        module=VMLINUX if driver.builtin else driver.name,
        builtin=driver.builtin,
        aliases=driver.aliases,
        allowed=verdict.allowed,
        via=verdict.via,
        reaches=verdict.reaches,
        sites=count.sites,
        mmio=count.mmio,
        calls=count.calls,
    )
