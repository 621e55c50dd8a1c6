"""`contexts`: everything that is asked of one kernel, as one result document."""

from typing import TYPE_CHECKING, Final

from trapline.base.errors import UsageError
from trapline.base.version import GENERATOR
from trapline.contexts.gaps import ASSUMPTIONS, Gaps
from trapline.contexts.reach import Contexts
from trapline.kernel.binary import Binary
from trapline.kernel.calls.build import build_graph
from trapline.linux.calls import CALL_NAMES
from trapline.results.contexts import ContextsResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from trapline.contexts.closed import Closed
    from trapline.results.contexts import ContextsKernel
    from trapline.results.reach import Reach
    from trapline.results.scan import Site
    from trapline.rules.ruleset import RuleSet

_NO_FUNCTIONS: Final = (
    "Where functions begin is not known, as there are no symbols; no call graph was made."
)


def audit(
    vmlinux: "Path",
    kernel: "ContextsKernel",
    rules: "RuleSet",
    sites: "Iterable[Site]",
    closed: "Closed",
    named: "Sequence[str]" = (),
    progress: "Callable[[int, int], None] | None" = None,
) -> ContextsResult:
    """Walk the gaps of a kernel, and find what each context reaches.

    `sites` are the places in vmlinux that may trap, `closed` says why gates are closed; with
    `named`, only what those functions reach is looked for. `progress` is told (gaps done, gaps in
    all). Raises BadImageError where the vmlinux cannot be read, UsageError where it has no function
    of a name.
    """
    with Binary.open_vmlinux(vmlinux) as binary:
        unknown = set(named) - set(binary.functions.addresses_of(named).values())
        if unknown:
            raise UsageError(f"{vmlinux}: has no function {min(unknown)}.")
        gaps = Gaps(binary, rules)
        total = len(gaps.hardware.groups)
        found = []
        for gap in gaps.all():
            found.append(gap)
            if progress is not None:
                progress(len(found), total)
        missing = gaps.hardware.missing
        reach: tuple[Reach, ...] = ()
        if len(binary.functions.entries):
            graph = build_graph(binary, CALL_NAMES)
            reach = tuple(Contexts(binary, graph, sites, closed).all(named))
        else:
            missing = (*missing, _NO_FUNCTIONS)
        return ContextsResult(
            generator=GENERATOR,
            kernel=kernel,
            module_version=rules.version,
            missing=missing,
            assumptions=ASSUMPTIONS,
            gaps=tuple(found),
            reach=reach,
        )
