"""`trapline tradeoff`: one workload under the three designs for MMIO, in numbers."""

from typing import TYPE_CHECKING

import click

import trapline
from trapline.cli.command import Command
from trapline.cli.options import (
    format_option,
    kernel_argument,
    module_version_option,
    modules_option,
    output_option,
)
from trapline.cli.progress import ProgressReport
from trapline.report.output import Destination
from trapline.report.records import TRADEOFF
from trapline.results.findings import exit_code

if TYPE_CHECKING:
    from pathlib import Path


@click.command(
    "tradeoff",
    cls=Command,
    examples=(
        "trapline tradeoff deb:linux-image-6.12-cloud-amd64",
        "trapline tradeoff vmlinuz --modules lib/modules/6.12.0 --format json -o designs.json",
    ),
)
@kernel_argument
@modules_option
@module_version_option
@format_option(TRADEOFF.format_names)
@output_option
def command(
    kernel: str,
    *,
    modules: "Path | None",
    module_version: str,
    format_name: str,
    output: "Path | None",
) -> int:
    """Run one workload on KERNEL as a TD under three designs, and lay the costs side by side.

    The workload boots, reads a disk, fetches a page over the network and writes to a console,
    all through virtio devices that QEMU models. Its results are checked under each design.

    Exits with 1 when a part of the workload failed under a design.
    """
    destination = Destination(output)
    with ProgressReport() as report:
        result = trapline.tradeoff(
            kernel,
            modules=modules,
            module_version=module_version,
            progress=report.advance,
            announce=report.announce,
        )
    destination.write(TRADEOFF.render(result, format_name))
    return exit_code(result)
