"""`trapline contexts`: where a trap may land, over all paths."""

from typing import TYPE_CHECKING

import click

import trapline
from trapline.cli.command import Command
from trapline.cli.options import (
    format_option,
    kernel_argument,
    labels_option,
    module_version_option,
    output_option,
    verbose_option,
)
from trapline.cli.progress import ProgressReport
from trapline.report.output import Destination
from trapline.report.records import CONTEXTS
from trapline.results.findings import exit_code

if TYPE_CHECKING:
    from pathlib import Path


@click.command(
    "contexts",
    cls=Command,
    examples=(
        "trapline contexts vmlinux",
        "trapline contexts vmlinux --from do_idle",
        "trapline contexts vmlinux --labels ours.toml",
        "trapline contexts deb:linux-image-6.12-cloud-amd64 -v",
        "trapline contexts vmlinux --format sarif -o contexts.sarif",
    ),
)
@kernel_argument
@click.option(
    "--from",
    "roots",
    multiple=True,
    metavar="NAME",
    help="Look from this function, in place of the contexts; may be repeated.",
)
@labels_option
@module_version_option
@format_option(CONTEXTS.format_names)
@output_option
@verbose_option
def command(
    kernel: str,
    *,
    roots: tuple[str, ...],
    labels: "Path | None",
    module_version: str,
    format_name: str,
    output: "Path | None",
    verbosity: int,
) -> int:
    """Say where in KERNEL a trap may land: the gaps of its entry code, proved over all paths.

    From SYSCALL, SYSENTER, each gate of the IDT and FRED until stack, GS base, page table and
    VE_INFO are the kernel's, and from there out to IRET, SYSRET and ERETU, all paths are walked:
    both sides of each branch, each alternative in both forms. KERNEL is as for `trapline scan`;
    its vmlinux with symbols is read, nothing is run.

    Exits with 1 when a site in a gap may trap; with 31 when there is none, but a path of one could
    not be followed.
    """
    destination = Destination(output)
    with ProgressReport() as report:
        result = trapline.contexts(
            kernel,
            roots=roots,
            labels=labels,
            module_version=module_version,
            progress=report.advance,
            announce=report.announce,
        )
    destination.write(CONTEXTS.render(result, format_name, verbosity))
    return exit_code(result)
