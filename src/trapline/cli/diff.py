"""`trapline diff`: what changed between two kernels, or two results of one command."""

from typing import TYPE_CHECKING

import click

import trapline
from trapline.cli.command import Command
from trapline.cli.options import allow_option, format_option, labels_option, output_option
from trapline.cli.progress import ProgressReport
from trapline.report.output import Destination
from trapline.report.records import DIFF
from trapline.results.findings import exit_code

if TYPE_CHECKING:
    from pathlib import Path


@click.command(
    "diff",
    cls=Command,
    examples=(
        "trapline diff last-month.json vmlinux --labels ours.toml",
        "trapline diff deb:linux-image-6.12.107+deb12-cloud-amd64 deb:linux-image-6.12-cloud-amd64",
        "trapline diff old-boot.json new-boot.json",
    ),
)
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@labels_option
@allow_option
@format_option(DIFF.format_names)
@output_option
@click.option("-v", "--verbose", "verbosity", count=True, help="List every change.")
def command(
    old: str,
    new: str,
    *,
    labels: "Path | None",
    allow: "Path | None",
    format_name: str,
    output: "Path | None",
    verbosity: int,
) -> int:
    """Say what is new, gone, moved or has another verdict between OLD and NEW.

    Each is the result of a command as JSON (scan, filter check, boot, explore or verify), or a
    kernel as for `trapline scan`, which is scanned, once. What another compiler made of the same
    source is told apart from what changed in the source.

    Exits with 1 when something is new, or has another verdict, and no label settles it; with 31
    when there is none of that, but a part of one of the two was not seen.
    """
    destination = Destination(output)
    with ProgressReport() as report:
        result = trapline.diff(
            old,
            new,
            labels=labels,
            allow=allow,
            progress=report.advance,
            announce=report.announce,
        )
    destination.write(DIFF.render(result, format_name, verbosity))
    return exit_code(result)
