"""`trapline schema`: prints the JSON Schema of what trapline writes and reads."""

from typing import TYPE_CHECKING

import click

from trapline.base.errors import ExitCode
from trapline.cli.command import Command
from trapline.cli.options import output_option
from trapline.report.output import Destination
from trapline.report.schemas import SCHEMAS, render

if TYPE_CHECKING:
    from pathlib import Path


@click.command(
    "schema",
    cls=Command,
    examples=("trapline schema scan", "trapline schema allow-list -o allow-list.schema.json"),
)
@click.argument("name", type=click.Choice(sorted(SCHEMAS)), metavar="NAME")
@output_option
def command(name: str, output: "Path | None") -> int:
    """Print the JSON Schema called NAME, that of a result document or of an input file.

    The error for an unknown NAME lists those there are.
    """
    Destination(output).write([render(name)])
    return ExitCode.CLEAN
