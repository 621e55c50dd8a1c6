"""`trapline tradeoff`: one workload under the three designs for MMIO, in numbers."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from trapline.allowlist import listfile
from trapline.base.errors import ExitCode
from trapline.cli.options import format_option, kernel_argument, modules_option, output_option
from trapline.cli.progress import ProgressReport
from trapline.kernel.find.locate import locate
from trapline.report.formats import TRADEOFF_FORMATS
from trapline.report.output import Destination
from trapline.scan.stored import scan_once
from trapline.tradeoff.compare import compare

if TYPE_CHECKING:
    from trapline.boot.plan import BootPlan
    from trapline.results.scan import ScanResult


@click.command("tradeoff", short_help="Count what #VE, paravirtualised and forbidden MMIO cost.")
@kernel_argument
@modules_option
@format_option(TRADEOFF_FORMATS)
@output_option
def command(kernel: str, *, modules: Path | None, format_name: str, output: Path | None) -> int:
    """Run one workload on KERNEL as a TD under three designs, and lay the costs side by side.

    The workload boots, reads a disk, fetches a page over the network and writes to a console,
    all through virtio devices that QEMU models. Its results are checked under each design.

    Exits with 1 when a part of the workload failed under a design.
    """
    destination = Destination(output)
    with ProgressReport("done") as progress:

        def scanned(plan: "BootPlan") -> "ScanResult":
            return scan_once(
                plan.files, plan.modules, listfile.load(None), plan.image.build_id, progress.advance
            )

        result = compare(
            locate(kernel, modules, announce=progress.announce),
            scanned,
            announce=progress.announce,
            progress=progress.advance,
        )
    destination.write(TRADEOFF_FORMATS[format_name](result, 0))
    passed = all(step.passed for design in result.designs for step in design.steps)
    return ExitCode.CLEAN if passed else ExitCode.FINDINGS
