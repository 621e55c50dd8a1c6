"""`trapline page`: the results of several commands on one kernel as one HTML page."""

from pathlib import Path

import click

from trapline.cli.command import Command
from trapline.cli.options import output_option
from trapline.report import joined
from trapline.report.output import Destination
from trapline.results.reading import read_result


@click.command(
    "page",
    cls=Command,
    examples=("trapline page scan.json boot.json contexts.json verify.json -o kernel.html",),
)
@click.argument("results", metavar="RESULT...", nargs=-1, required=True, type=click.Path())
@output_option
def command(results: tuple[str, ...], *, output: Path | None) -> int:
    """Put RESULTs on one HTML page.

    Each is the JSON result of a command (scan, filter check, boot, explore, verify, contexts,
    tradeoff, diff), all of one kernel. Sites of the scan say how often the boot came by.
    """
    destination = Destination(output)
    destination.write(joined.render([read_result(Path(result)) for result in results]))
    return 0
