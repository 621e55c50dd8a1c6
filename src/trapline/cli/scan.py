"""`trapline scan`: finds every place where a compiled kernel traps to its host."""

from typing import TYPE_CHECKING

import click

from trapline.allowlist import listfile
from trapline.base.errors import ExitCode
from trapline.cli.options import (
    allow_option,
    format_option,
    jobs_option,
    kernel_argument,
    modules_option,
    output_option,
    verbose_option,
)
from trapline.cli.progress import ProgressReport
from trapline.kernel.find.locate import locate
from trapline.report.findings import findings
from trapline.report.formats import SCAN_FORMATS
from trapline.report.output import Destination
from trapline.scan.wholekernel import scan

if TYPE_CHECKING:
    from pathlib import Path


@click.command("scan", short_help="List every place where a kernel may trap to its host.")
@kernel_argument
@modules_option
@allow_option
@format_option(SCAN_FORMATS)
@output_option
@verbose_option
@jobs_option
def command(
    kernel: str,
    modules: "Path | None",
    allow: "Path | None",
    format_name: str,
    output: "Path | None",
    verbosity: int,
    jobs: int | None,
) -> int:
    """List every place where KERNEL and its modules may trap to their host.

    KERNEL is a vmlinux, a vmlinuz, a module, a folder (build tree, unpacked package or
    /lib/modules/RELEASE), a release such as 6.12.117+deb12-cloud-amd64, looked up where
    distributions put kernels and debug files, or deb:PACKAGE, fetched with apt into a cache
    ("deb:A|B" takes the first that apt knows).

    Exits with 1 when the #VE handler cannot emulate a site, or a built-in driver that binds to
    what the host presents and is not on the allow list touches the host.
    """
    destination = Destination(output)
    allow_list = listfile.load(allow)
    with ProgressReport("scanned") as progress:
        files = locate(kernel, modules, announce=progress.announce)
        result = scan(files, allow_list, progress.advance, workers=jobs)
    destination.write(SCAN_FORMATS[format_name](result, verbosity))
    return ExitCode.FINDINGS if findings(result) else ExitCode.CLEAN
