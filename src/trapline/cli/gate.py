"""`trapline gate`: what of a kernel fails a policy, for CI."""

from typing import TYPE_CHECKING

import click

import trapline
from trapline.cli.command import Command
from trapline.cli.options import (
    PATH,
    format_option,
    kernel_argument,
    modules_option,
    output_option,
)
from trapline.cli.progress import ProgressReport
from trapline.report.output import Destination
from trapline.report.records import GATE
from trapline.results.findings import exit_code

if TYPE_CHECKING:
    from pathlib import Path


@click.command(
    "gate",
    cls=Command,
    examples=(
        "trapline gate trapline.toml vmlinux --write-baseline",
        "trapline gate trapline.toml vmlinux",
        "trapline gate trapline.toml . --format ktap -o trapline.ktap",
    ),
)
@click.argument("policy", type=PATH, metavar="POLICY")
@kernel_argument
@modules_option
@click.option(
    "--write-baseline",
    is_flag=True,
    help="Write what KERNEL has to the baseline that POLICY names: later kernels may have it too.",
)
@format_option(GATE.format_names)
@output_option
@click.option("-v", "--verbose", "verbosity", count=True, help="List all that fails.")
def command(
    policy: "Path",
    kernel: str,
    *,
    modules: "Path | None",
    write_baseline: bool,
    format_name: str,
    output: "Path | None",
    verbosity: int,
) -> int:
    """Hold KERNEL against POLICY, a TOML file that says what fails.

    What its baseline has already, or a label settles, does not fail. KERNEL is as for `trapline
    scan`; a scan of it that was made before is taken from the cache.

    Exits with 1 when a check fails.
    """
    destination = Destination(output)
    with ProgressReport() as report:
        result = trapline.gate(
            policy,
            kernel,
            modules=modules,
            write_baseline=write_baseline,
            progress=report.advance,
            announce=report.announce,
        )
    destination.write(GATE.render(result, format_name, verbosity))
    return exit_code(result)
