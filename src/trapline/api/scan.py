"""`scan`: every place where a compiled kernel traps to its host."""

from typing import TYPE_CHECKING

from trapline.api.known_scan import scanned
from trapline.api.label import known_labels, with_labels

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
    `labels` are what people said of findings. A kernel with a build id is scanned once: while its
    files, the allow list and trapline stay the same, the scan is taken from the cache.

    Raises BadImageError where vmlinux cannot be scanned, KernelNotFoundError where there is
    nothing to scan; a module that cannot be scanned is named in `ScanResult.coverage`.
    """
    said = known_labels(labels)
    result = scanned(
        kernel,
        modules=modules,
        allow=allow,
        workers=workers,
        progress=progress,
        announce=announce,
    )
    return with_labels(result, said)
