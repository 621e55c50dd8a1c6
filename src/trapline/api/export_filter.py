"""`export_filter`: what enforces an allow list on a stock kernel, as files."""

from pathlib import Path
from typing import TYPE_CHECKING

from trapline.api.allow import allow_list
from trapline.api.check import check
from trapline.api.kernel import as_kernel
from trapline.devicefilter import export
from trapline.kernel.binary import Binary

if TYPE_CHECKING:
    from trapline.api.allow import AnyAllowList
    from trapline.api.kernel import AnyKernel, AnyPath
    from trapline.api.progress import Announce, OnProgress
    from trapline.results.filter import FilterResult


def export_filter(
    folder: "AnyPath",
    *,
    allow: "AnyAllowList" = None,
    kernel: "AnyKernel | None" = None,
    modules: "AnyPath | None" = None,
    workers: int | None = None,
    progress: "OnProgress | None" = None,
    announce: "Announce | None" = None,
) -> tuple[Path, ...]:
    """Write what enforces an allow list to a folder, and return the files.

    With a kernel, the modules and initcalls that the list does not let in are named, too. Raises
    OutputError, and what `check` raises.
    """
    allowed = allow_list(allow)
    checked: FilterResult | None = None
    blocked: tuple[str, ...] = ()
    if kernel is not None:
        opened = as_kernel(kernel, modules, announce)
        checked = check(opened, allow=allowed, workers=workers, progress=progress)
        with Binary.open_vmlinux(opened.vmlinux) as vmlinux:
            blocked = export.initcalls(vmlinux.symbols.names, export.early(checked))
    contents = export.files(allowed, checked, blocked)
    export.write(contents, Path(folder))
    return tuple(Path(folder) / name for name in contents)
