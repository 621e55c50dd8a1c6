"""`contexts`: where a trap may land, over all paths."""

from typing import TYPE_CHECKING

from trapline.api.kernel import as_kernel
from trapline.api.progress import steps
from trapline.contexts.audit import audit
from trapline.results.contexts import ContextsKernel
from trapline.rules.tables import DEFAULT_VERSION, load

if TYPE_CHECKING:
    from trapline.api.kernel import AnyKernel
    from trapline.api.progress import Announce, OnProgress
    from trapline.results.contexts import ContextsResult


def contexts(
    kernel: "AnyKernel",
    *,
    module_version: str = DEFAULT_VERSION,
    progress: "OnProgress | None" = None,
    announce: "Announce | None" = None,
) -> "ContextsResult":
    """Prove the gaps of a kernel's entry code: from where no trap may come, over all paths.

    `module_version` is the TDX module's, whose rules say what traps.

    Raises NoDebugInfoError without a vmlinux, BadImageError where it cannot be read.
    """
    opened = as_kernel(kernel, announce=announce)
    vmlinux = opened.vmlinux
    return audit(
        vmlinux,
        ContextsKernel(name=opened.name, release=opened.release, build_id=opened.build_id),
        load(module_version),
        steps("walked", progress),
    )
