"""`trapline verify`: what the #VE handler emulates, held against the processor."""

from typing import TYPE_CHECKING

import click

import trapline
from trapline.cli.command import Command
from trapline.cli.options import (
    PATH,
    format_option,
    kernel_argument,
    labels_option,
    module_version_option,
    output_option,
    verbose_option,
    workers_option,
)
from trapline.cli.progress import ProgressReport
from trapline.report.output import Destination
from trapline.report.records import VERIFY
from trapline.results.findings import exit_code

if TYPE_CHECKING:
    from pathlib import Path


@click.command(
    "verify",
    cls=Command,
    examples=(
        "trapline verify vmlinux",
        "trapline verify vmlinux --limit 1000 --no-scan",
        "trapline verify vmlinux --baseline last-release.json",
        "trapline verify vmlinux --scan scan.json --format jsonl -o forms.jsonl",
    ),
)
@kernel_argument
@click.option(
    "--scan",
    "scan_file",
    type=PATH,
    metavar="FILE",
    help="Count sites of each form in this scan (JSON); default: scan vmlinux, once, into the "
    "cache.",
)
@click.option("--no-scan", is_flag=True, help="Do not count sites in a scan.")
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    metavar="N",
    help="Beside one case for each form, run only so many, evenly spread.",
)
@click.option(
    "--baseline",
    type=PATH,
    metavar="FILE",
    help="Exit with 1 only for what is new or has grown since this earlier result (JSON).",
)
@module_version_option
@workers_option
@labels_option
@format_option(VERIFY.format_names)
@output_option
@verbose_option
def command(
    kernel: str,
    *,
    scan_file: "Path | None",
    no_scan: bool,
    limit: int | None,
    baseline: "Path | None",
    module_version: str,
    workers: int | None,
    labels: "Path | None",
    format_name: str,
    output: "Path | None",
    verbosity: int,
) -> int:
    """Run each instruction form that KERNEL's #VE handler takes upon itself twice, and compare.

    Once natively on plain memory, once as a trap through the kernel's own handler, from the same
    registers. Compared are registers, flags, memory, the accesses that the device sees, and
    every register that the handler passes to the host. KERNEL is as for `trapline scan`; its
    vmlinux with symbols is booted as a TD.

    Exits with 1 when handler and processor do not agree on something; with --baseline, when they
    do on less than before.
    """
    destination = Destination(output)
    with ProgressReport() as report:
        result = trapline.verify(
            kernel,
            scan=scan_file or not no_scan,
            limit=limit,
            module_version=module_version,
            baseline=baseline,
            workers=workers,
            labels=labels,
            progress=report.advance,
            announce=report.announce,
        )
    destination.write(VERIFY.render(result, format_name, verbosity))
    return exit_code(result)
