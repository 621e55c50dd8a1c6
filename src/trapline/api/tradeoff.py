"""`tradeoff`: one workload under the three designs for MMIO, in numbers."""

from typing import TYPE_CHECKING

from trapline.api.allow import allow_list
from trapline.api.kernel import as_kernel
from trapline.api.progress import steps
from trapline.rules.tables import DEFAULT_VERSION
from trapline.scan.stored import scan_once
from trapline.tradeoff.compare import compare

if TYPE_CHECKING:
    from trapline.api.kernel import AnyKernel, AnyPath
    from trapline.api.progress import Announce, OnProgress
    from trapline.boot.plan import BootPlan
    from trapline.results.scan import ScanResult
    from trapline.results.tradeoff import TradeoffResult


def tradeoff(
    kernel: "AnyKernel",
    *,
    modules: "AnyPath | None" = None,
    module_version: str = DEFAULT_VERSION,
    progress: "OnProgress | None" = None,
    announce: "Announce | None" = None,
) -> "TradeoffResult":
    """Run one workload on a kernel as a TD under three designs: trap, paravirt, forbid.

    `modules` is as for `open_kernel`, `module_version` the TDX module's.

    Raises ToolMissingError without QEMU, and what `boot` raises.
    """

    def scanned(plan: "BootPlan") -> "ScanResult":
        advance = steps("scanned", progress)
        return scan_once(plan.files, plan.modules, allow_list(), plan.image.build_id, advance)

    return compare(
        as_kernel(kernel, modules, announce).files,
        scanned,
        module_version=module_version,
        announce=announce,
        progress=steps("done", progress),
    )
