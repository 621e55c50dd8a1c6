"""`trapline scan`: finds every place where a compiled kernel traps to its host."""

from typing import TYPE_CHECKING

import click

import trapline
from trapline.cli.command import Command
from trapline.cli.options import (
    allow_option,
    format_option,
    kernel_argument,
    labels_option,
    modules_option,
    output_option,
    verbose_option,
    workers_option,
)
from trapline.cli.progress import ProgressReport
from trapline.report.output import Destination
from trapline.report.records import SCAN
from trapline.results.findings import exit_code

if TYPE_CHECKING:
    from pathlib import Path


@click.command(
    "scan",
    cls=Command,
    examples=(
        "trapline scan vmlinux",
        "trapline scan 'deb:linux-image-6.12-cloud-amd64' -vv -o report.txt",
        "trapline scan /lib/modules/$(uname -r) --allow ours.toml --format sarif -o traps.sarif",
    ),
)
@kernel_argument
@modules_option
@allow_option
@labels_option
@format_option(SCAN.format_names)
@output_option
@verbose_option
@workers_option
def command(
    kernel: str,
    *,
    modules: "Path | None",
    allow: "Path | None",
    labels: "Path | None",
    format_name: str,
    output: "Path | None",
    verbosity: int,
    workers: int | None,
) -> int:
    """List every place where KERNEL and its modules may trap to their host.

    KERNEL is a vmlinux, a vmlinuz, a module, a folder (build tree, unpacked package or
    /lib/modules/RELEASE), a release such as 6.12.117+deb12-cloud-amd64, looked up where
    distributions put kernels and debug files, or deb:PACKAGE, fetched with apt into a cache
    ("deb:A|B" takes the first that apt knows, "deb:A@SUITE" one of that suite of Debian).

    Exits with 1 when the #VE handler cannot emulate a site, or a built-in driver that binds to
    what the host presents and is not on the allow list touches the host; with 31 when there is
    none of that, but a part of the kernel could not be read or was not understood.
    """
    destination = Destination(output)
    with ProgressReport() as report:
        result = trapline.scan(
            kernel,
            modules=modules,
            allow=allow,
            workers=workers,
            labels=labels,
            progress=report.advance,
            announce=report.announce,
        )
    destination.write(SCAN.render(result, format_name, verbosity))
    return exit_code(result)
