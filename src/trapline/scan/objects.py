"""The scan of one object, a vmlinux or a module: what a worker process does."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec.structs import replace

from trapline.kernel.binary import Binary, debug_elsewhere, has_code, has_dwarf, open_module_files
from trapline.kernel.drivers.modinfo import ModuleInfo, module_info
from trapline.results.scan import Outside, Unrecognised
from trapline.scan.code import Code
from trapline.scan.found import FoundMapping, FoundSite
from trapline.scan.ioremap import find_mappings
from trapline.scan.sites import SiteFinder
from trapline.scan.spots import Spot, spot_of
from trapline.scan.triage import may_have_sites
from trapline.scan.unnamed import Unnamed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trapline.scan.kernelfacts import ScanContext
    from trapline.scan.location import Place


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One object to scan; `path` and `debug` as in `kernel.find.kernelfiles.ModuleFile`."""

    name: str
    kind: Literal["vmlinux", "vmlinuz", "module"]
    path: str
    debug: str | None = None
    location: str | None = None


class ObjectResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one object has.

    `info` is None for a vmlinux. `has_symbols`, `has_dwarf` and `has_code` say how much could be
    seen, `debug_elsewhere` what of the debug information is in other files, `outside` what was not
    taken for code, `unrecognised` what may be an accessor.
    """

    name: str
    info: ModuleInfo | None
    has_symbols: bool
    has_dwarf: bool
    has_code: bool = True
    debug_elsewhere: str | None = None
    outside: tuple[Outside, ...] = ()
    unrecognised: list[Unrecognised] = []
    sites: list[FoundSite] = []
    mappings: list[FoundMapping] = []


def scan_object(task: Task, context: "ScanContext") -> ObjectResult:
    """Scan one object; raises BadImageError or KernelNotFoundError where that cannot be done."""
    if task.kind == "module":
        return _scan_module(task, context)
    with open_kernel(task) as binary:
        if binary.has_dwarf:
            # First, as it takes most memory; what else is needed finds room in what it frees.
            assert binary.symcache is not None
        return _scan(binary, context)


def open_kernel(task: Task) -> Binary:
    """Open the kernel image of a task."""
    if task.kind == "vmlinux":
        return Binary.open_vmlinux(Path(task.path))
    return Binary.open_vmlinuz(Path(task.path))


def _scan_module(task: Task, context: "ScanContext") -> ObjectResult:
    debug = None if task.debug is None else Path(task.debug)
    code, dwarf = open_module_files(Path(task.path), debug)
    with code, dwarf:
        info = module_info(code, task.name, task.location)
        if not may_have_sites(code, dwarf):
            return ObjectResult(
                name=task.name,
                info=info,
                has_symbols=len(code.symbols) > 0,
                has_dwarf=has_dwarf(dwarf),
                has_code=has_code(code),
            )
        return _scan(Binary.of_module(task.name, code, dwarf), context, info)


def _scan(binary: Binary, context: "ScanContext", info: ModuleInfo | None = None) -> ObjectResult:
    code = Code(binary, context)
    sites = list(SiteFinder(binary, code, context).sites())
    mappings = list(find_mappings(binary, code))
    spots = _spots(
        binary, [*(found.place for found in sites), *(found.place for found in mappings)]
    )
    return ObjectResult(
        name=binary.name,
        info=info,
        has_symbols=len(binary.functions) > 0,
        has_dwarf=binary.has_dwarf,
        debug_elsewhere=debug_elsewhere(binary.debug),
        has_code=has_code(binary.elf) if binary.is_module else bool(binary.text),
        outside=code.outside,
        unrecognised=list(Unnamed(binary, code, sites).functions()),
        sites=[replace(site, spot=spots.get(site.place.source)) for site in sites],
        mappings=[replace(found, spot=spots.get(found.place.source)) for found in mappings],
    )


def _spots(binary: Binary, places: "Iterable[Place]") -> dict[int, Spot]:
    """Find where places stand in the source, by the address that is said of."""
    lines = {
        place.source: (place.inlined[0].line if place.inlined else place.line) for place in places
    }
    frames = binary.source_frames(lines)
    return {address: spot_of(found, lines[address]) for address, found in frames.items()}
