"""`contexts`: everything that is asked of one kernel, as one result document."""

from typing import TYPE_CHECKING

from trapline.base.version import GENERATOR
from trapline.contexts.gaps import ASSUMPTIONS, Gaps
from trapline.kernel.binary import Binary
from trapline.results.contexts import ContextsResult

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trapline.results.contexts import ContextsKernel
    from trapline.rules.ruleset import RuleSet


def audit(
    vmlinux: "Path",
    kernel: "ContextsKernel",
    rules: "RuleSet",
    progress: "Callable[[int, int], None] | None" = None,
) -> ContextsResult:
    """Walk the gaps of a kernel; `progress` is told (gaps done, gaps in all).

    Raises BadImageError where the vmlinux cannot be read.
    """
    with Binary.open_vmlinux(vmlinux) as binary:
        gaps = Gaps(binary, rules)
        total = len(gaps.hardware.groups)
        found = []
        for gap in gaps.all():
            found.append(gap)
            if progress is not None:
                progress(len(found), total)
        return ContextsResult(
            generator=GENERATOR,
            kernel=kernel,
            module_version=rules.version,
            missing=gaps.hardware.missing,
            assumptions=ASSUMPTIONS,
            gaps=tuple(found),
        )
