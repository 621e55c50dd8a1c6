"""`scan`: every place where a compiled kernel traps to its host."""

from typing import TYPE_CHECKING

from trapline.api.allow import allow_list
from trapline.api.kernel import as_kernel
from trapline.api.label import known_labels, with_labels
from trapline.api.progress import steps
from trapline.scan import wholekernel

if TYPE_CHECKING:
    from trapline.api.allow import AnyAllowList
    from trapline.api.kernel import AnyKernel, AnyPath
    from trapline.api.label import AnyLabels
    from trapline.api.progress import Announce, OnProgress
    from trapline.results.scan import ScanResult


def scan(
    kernel: "AnyKernel",
    *,
    modules: "AnyPath | None" = None,
    allow: "AnyAllowList" = None,
    workers: int | None = None,
    labels: "AnyLabels" = None,
    progress: "OnProgress | None" = None,
    announce: "Announce | None" = None,
) -> "ScanResult":
    """List every place where a kernel and its modules may trap to their host.

    `modules` is as for `open_kernel`. `allow` is the list that drivers are held against. `workers`
    is the number of processes, by default one for each CPU; the result does not depend on it.
    `labels` are what people said of findings.

    Raises BadImageError where vmlinux cannot be scanned, KernelNotFoundError where there is
    nothing to scan; a module that cannot be scanned is named in `ScanResult.coverage`.
    """
    said = known_labels(labels)
    allowed = allow_list(allow)
    files = as_kernel(kernel, modules, announce).files
    result = wholekernel.scan(files, allowed, steps("scanned", progress), workers=workers)
    return with_labels(result, said)
