"""The scan of one object, a vmlinux or a module: what a worker process does."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from trapline.kernel.binary import Binary
from trapline.kernel.modinfo import ModuleInfo, module_info
from trapline.model.scan import Mapping, Site
from trapline.scan.code import Code
from trapline.scan.identity import Key
from trapline.scan.mappings import find_mappings
from trapline.scan.sites import SiteFinder

if TYPE_CHECKING:
    from trapline.scan.context import ScanContext


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One object to scan; `path` and `debug` as in `trapline.kernel.files.ModuleFile`."""

    name: str
    kind: Literal["vmlinux", "vmlinuz", "module"]
    path: str
    debug: str | None = None
    location: str | None = None


class ObjectResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one object has; sites and mappings still lack id, driver and subsystem.

    `site_keys` and `mapping_keys` are what their ids are made from, in the same order. `info` is
    None for a vmlinux. `has_symbols` and `has_dwarf` say how much could be seen.
    """

    name: str
    sites: list[Site]
    site_keys: list[Key]
    mappings: list[Mapping]
    mapping_keys: list[Key]
    info: ModuleInfo | None
    has_symbols: bool
    has_dwarf: bool


def scan_object(task: Task, context: "ScanContext") -> ObjectResult:
    """Scan one object; raises BadImageError or KernelNotFoundError where that cannot be done."""
    with open_object(task) as binary:
        if not binary.is_module and binary.has_dwarf:
            # First, as it takes most memory; what else is needed finds room in what it frees.
            assert binary.symcache is not None
        code = Code(binary, context)
        seen = not binary.is_module or code.may_have_findings()
        found = list(SiteFinder(binary, code, context).sites()) if seen else []
        mapped = list(find_mappings(binary, code)) if seen else []
        return ObjectResult(
            name=task.name,
            sites=[site for site, _ in found],
            site_keys=[key for _, key in found],
            mappings=[mapping for mapping, _ in mapped],
            mapping_keys=[key for _, key in mapped],
            info=module_info(binary.elf, task.name, task.location) if binary.is_module else None,
            has_symbols=len(binary.functions) > 0,
            has_dwarf=binary.has_dwarf,
        )


def open_object(task: Task) -> Binary:
    """Open the object of a task."""
    path = Path(task.path)
    if task.kind == "vmlinux":
        return Binary.open_vmlinux(path)
    if task.kind == "vmlinuz":
        return Binary.open_vmlinuz(path)
    return Binary.open_module(task.name, path, None if task.debug is None else Path(task.debug))
