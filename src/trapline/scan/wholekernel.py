"""`scan`: all sites of a kernel and its modules, attributed, as one result document."""

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from trapline.base.errors import BadImageError, KernelNotFoundError
from trapline.base.version import GENERATOR
from trapline.base.workers import how_many
from trapline.kernel.binary import VMLINUX, Binary
from trapline.results.scan import Kernel, Mapping, ScanResult, Site
from trapline.scan.attribution import Attribution, SiteCount
from trapline.scan.coverage import coverage
from trapline.scan.identity import ids
from trapline.scan.kernelfacts import read_context
from trapline.scan.objects import ObjectResult, Task, open_kernel
from trapline.scan.pool import Failure, scan_all, scan_pool

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trapline.allowlist.entries import AllowList
    from trapline.kernel.find.kernelfiles import KernelFiles
    from trapline.results.scan import Driver
    from trapline.scan.found import FoundMapping, FoundSite
    from trapline.scan.kernelfacts import ScanContext
    from trapline.scan.pool import Progress

# Options that decide what the answers mean.
_CONFIG: Final = (
    "CONFIG_INTEL_TDX_GUEST",
    "CONFIG_AMD_MEM_ENCRYPT",
    "CONFIG_PARAVIRT",
    "CONFIG_PARAVIRT_XXL",
    "CONFIG_UNACCEPTED_MEMORY",
    "CONFIG_X86_X2APIC",
    "CONFIG_X86_KERNEL_IBT",
    "CONFIG_X86_FRED",
    "CONFIG_HPET_TIMER",
    "CONFIG_PCI_MMCONFIG",
    "CONFIG_VIRTIO_PCI",
    "CONFIG_VIRTIO_PCI_LEGACY",
    "CONFIG_VIRTIO_MMIO",
    "CONFIG_SERIAL_8250_CONSOLE",
    "CONFIG_MODULE_SIG_FORCE",
)
_BANNER: Final = re.compile(rb"Linux version [ -~]{1,500}")
_MAX_WORKERS: Final = 16  # a worker may need 700 MB


def scan(
    kernel: "KernelFiles",
    allow: "AllowList",
    progress: "Progress | None" = None,
    *,
    workers: int | None = None,
) -> ScanResult:
    """Find every trap site of a kernel and of all its modules.

    `progress` is told (objects done, objects in all). `workers` is the number of processes, by
    default one for each CPU; the result does not depend on it. A module that cannot be scanned
    is named in `ScanResult.coverage`; raises BadImageError where vmlinux cannot, and
    KernelNotFoundError where there is nothing to scan, WorkersLostError where processes are
    killed again and again.
    """
    tasks = _tasks(kernel)
    context, facts = _read_kernel(tasks)
    with scan_pool(context, min(how_many(workers), len(tasks), _MAX_WORKERS)) as pool:
        attribution = Attribution(kernel, allow)
        outcomes = scan_all(pool, sorted(tasks, key=_effort), progress)
    main = outcomes.get(VMLINUX)
    if isinstance(main, Failure):
        raise BadImageError(f"vmlinux could not be scanned: {main.reason.rstrip('.')}.")
    results = [outcome for task in tasks if not isinstance(outcome := outcomes[task.name], Failure)]
    sites, mappings = _attribute(results, attribution)
    return ScanResult(
        generator=GENERATOR,
        kernel=_kernel(kernel, facts, main),
        allow=allow.documents(),
        coverage=coverage(kernel, outcomes, VMLINUX),
        counts=_counts(sites, mappings),
        sites=sites,
        mappings=mappings,
        drivers=_drivers(attribution, sites, results),
    )


def _tasks(kernel: "KernelFiles") -> list[Task]:
    """List the objects in the order of the result: vmlinux, then modules by location."""
    tasks = []
    if kernel.vmlinux is not None:
        tasks.append(Task(name=VMLINUX, kind="vmlinux", path=str(kernel.vmlinux)))
    elif kernel.vmlinuz is not None:
        tasks.append(Task(name=VMLINUX, kind="vmlinuz", path=str(kernel.vmlinuz)))
    tasks.extend(
        Task(
            name=module.name,
            kind="module",
            path=str(module.path),
            debug=None if module.debug is None else str(module.debug),
            location=module.location,
        )
        for module in kernel.modules
    )
    if not tasks:
        raise KernelNotFoundError("There is neither a kernel nor a module to scan.")
    return tasks


def _effort(task: Task) -> tuple[bool, int, str]:
    """Order tasks: vmlinux first, as it takes longest, then modules from the smallest on.

    While vmlinux takes most memory, the others then take little; the largest module takes but a
    fraction of vmlinux's time, so that all processes still end together.
    """
    path = Path(task.debug or task.path)
    try:
        size = path.stat().st_size
    except OSError:
        size = 0  # whoever opens it says what is wrong
    return (task.kind == "module", size, task.name)


class _Facts(msgspec.Struct, frozen=True):
    """What the kernel says of itself."""

    version: str | None = None
    build_id: str | None = None


def _read_kernel(tasks: list[Task]) -> "tuple[ScanContext, _Facts]":
    if tasks[0].name != VMLINUX:
        return read_context(None), _Facts()
    with open_kernel(tasks[0]) as vmlinux:
        return read_context(vmlinux), _Facts(_version(vmlinux), vmlinux.elf.build_id)


def _version(vmlinux: Binary) -> str | None:
    match = _BANNER.search(vmlinux.elf.contents(".rodata"))
    return None if match is None else match[0].decode("ascii")


def _attribute(
    results: "Iterable[ObjectResult]", attribution: Attribution
) -> tuple[tuple[Site, ...], tuple[Mapping, ...]]:
    """Name what was found, in its order."""
    results = list(results)
    sites = [site for result in results for site in result.sites]
    mappings = [mapping for result in results for mapping in result.mappings]
    return (
        tuple(
            site.named(identity, *_owner(site, attribution))
            for site, identity in zip(sites, ids(site.key for site in sites), strict=True)
        ),
        tuple(
            mapping.named(identity, *_owner(mapping, attribution))
            for mapping, identity in zip(mappings, ids(m.key for m in mappings), strict=True)
        ),
    )


def _owner(found: "FoundSite | FoundMapping", attribution: Attribution) -> tuple[str | None, str]:
    """Return the driver and the subsystem."""
    place = found.place
    where = (found.module, place.object, place.file)
    return attribution.driver_of(*where), attribution.subsystem_of(*where, place.function)


def _kernel(kernel: "KernelFiles", facts: _Facts, main: ObjectResult | None) -> Kernel:
    return Kernel(
        release=kernel.release,
        version=facts.version,
        build_id=facts.build_id,
        config={name: kernel.config[name] for name in _CONFIG if name in kernel.config},
        modules=len(kernel.modules),
        has_dwarf=main is not None and main.has_dwarf,
    )


def _counts(sites: tuple[Site, ...], mappings: tuple[Mapping, ...]) -> dict[str, int]:
    """Count sites by class and form ("mmio.instruction"), in all, refused ones, and mappings."""
    counts = Counter(f"{site.trap}.{site.form}" for site in sites)
    return {
        "sites": len(sites),
        "refused": sum(not site.emulable for site in sites),
        "mappings": len(mappings),
        **dict(sorted(counts.items())),
    }


def _drivers(
    attribution: Attribution, sites: tuple[Site, ...], results: list[ObjectResult]
) -> "tuple[Driver, ...]":
    every, mmio, calls = Counter[str](), Counter[str](), Counter[str]()
    for site in sites:
        if site.driver is not None:
            every[site.driver] += 1
            mmio[site.driver] += site.trap == "mmio" and site.form == "instruction"
            calls[site.driver] += site.form == "call"
    counts = {name: SiteCount(every[name], mmio[name], calls[name]) for name in every}
    return attribution.drivers(
        counts, [result.info for result in results if result.info is not None]
    )
