"""`contexts`: where a trap may land, over all paths."""

from typing import TYPE_CHECKING

from trapline.api.allow import allow_list
from trapline.api.kernel import as_kernel
from trapline.api.label import known_labels
from trapline.api.progress import steps
from trapline.contexts.audit import audit
from trapline.contexts.closed import Closed
from trapline.results.contexts import ContextsKernel
from trapline.rules.tables import DEFAULT_VERSION, load
from trapline.scan.stored import scan_once

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trapline.api.kernel import AnyKernel
    from trapline.api.label import AnyLabels
    from trapline.api.progress import Announce, OnProgress
    from trapline.results.contexts import ContextsResult


def contexts(
    kernel: "AnyKernel",
    *,
    roots: "Sequence[str]" = (),
    labels: "AnyLabels" = None,
    module_version: str = DEFAULT_VERSION,
    progress: "OnProgress | None" = None,
    announce: "Announce | None" = None,
) -> "ContextsResult":
    """Say where in a kernel a trap may land.

    The gaps of its entry code are proved, over all paths; what the #VE handler, NMIs, consoles and
    other contexts may reach is listed.

    `roots` are functions to look from in place of trapline's contexts. `labels` are reasons why
    gates are closed, with trapline's own. `module_version` is the TDX module's, whose rules say
    what traps.

    Raises NoDebugInfoError without a vmlinux, BadImageError where it cannot be read, UsageError
    where it has no function of a name in `roots`.
    """
    said = known_labels(labels)
    opened = as_kernel(kernel, announce=announce)
    vmlinux = opened.vmlinux
    scan = scan_once(opened.files, (), allow_list(), opened.build_id, steps("scanned", progress))
    return audit(
        vmlinux,
        ContextsKernel(name=opened.name, release=opened.release, build_id=opened.build_id),
        load(module_version),
        scan.sites,
        Closed(() if said is None else said.entries),
        tuple(roots),
        steps("walked", progress),
    )
