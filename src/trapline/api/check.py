"""`check`: what an allow list means for a kernel."""

from typing import TYPE_CHECKING

from trapline.api.allow import allow_list
from trapline.api.kernel import as_kernel
from trapline.api.label import known_labels, with_labels
from trapline.api.scan import scan
from trapline.base.errors import NoDebugInfoError
from trapline.devicefilter import check as devicefilter

if TYPE_CHECKING:
    from trapline.api.allow import AnyAllowList
    from trapline.api.kernel import AnyKernel, AnyPath
    from trapline.api.label import AnyLabels
    from trapline.api.progress import Announce, OnProgress
    from trapline.results.filter import FilterResult


def check(
    kernel: "AnyKernel",
    *,
    modules: "AnyPath | None" = None,
    allow: "AnyAllowList" = None,
    workers: int | None = None,
    labels: "AnyLabels" = None,
    progress: "OnProgress | None" = None,
    announce: "Announce | None" = None,
) -> "FilterResult":
    """Say which drivers of a kernel an allow list lets in, and which bind all the same.

    The kernel is scanned, by `workers` processes, so that each driver comes with the places where
    it touches the host. `labels` are what people said of findings.

    Raises what `scan` raises, and NoDebugInfoError where it is not known which code is whose:
    "nothing found" would be a lie.
    """
    said = known_labels(labels)
    allowed = allow_list(allow)
    opened = as_kernel(kernel, modules, announce)
    found = scan(opened, allow=allowed, workers=workers, progress=progress)
    if opened.files.vmlinux is None or not found.kernel.has_dwarf:
        raise NoDebugInfoError(
            f"{opened.name}: without debug information it is not known which code is which "
            "driver's; name a kernel that has it."
        )
    return with_labels(devicefilter.check(found, allowed), said)
