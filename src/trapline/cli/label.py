"""`trapline label`: what people said of findings, in a text file of theirs."""

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

import click

import trapline
from trapline.base.errors import ExitCode, UsageError
from trapline.base.printable import printable
from trapline.cli.command import Command, Group
from trapline.cli.options import PATH, format_option, output_option
from trapline.report.output import Destination
from trapline.report.records import LABELS
from trapline.results.findings import exit_code
from trapline.results.labels import Label, LabelEntry
from trapline.results.trapclass import TRAP_CLASSES

if TYPE_CHECKING:
    from trapline.results.trapclass import TrapClass

_FILE: Final = click.argument("file", type=PATH, metavar="FILE")


@click.group(
    "label",
    cls=Group,
    examples=(
        "trapline label list labels.toml scan.json",
        "trapline label carry labels.toml new.json",
    ),
)
def command() -> None:
    """Say of findings that they are all right, or a concern, in a text file for your git."""


@command.command(
    "add",
    cls=Command,
    groups={
        "Which findings": (
            "identity",
            "function",
            "file_name",
            "driver",
            "subsystem",
            "trap",
            "gate",
        ),
        "What is said": ("label", "reason", "owner", "date"),
    },
    examples=(
        "trapline label add ours.toml --driver 'pata_*' --label safe --reason 'no ATA' --owner me",
    ),
)
@_FILE
@click.argument("document", type=PATH, required=False, metavar="[DOCUMENT]")
@click.option("--id", "identity", metavar="ID", help="Finding id; needs DOCUMENT, which has it.")
@click.option("--function", metavar="NAME", help="Function, or a pattern.")
@click.option("--file", "file_name", metavar="NAME", help="Source file, or a pattern.")
@click.option("--driver", metavar="NAME", help="Driver, or a pattern.")
@click.option("--subsystem", metavar="NAME", help="Subsystem, or a pattern.")
@click.option("--class", "trap", type=click.Choice(TRAP_CLASSES), help="Class of trap.")
@click.option("--gate", metavar="NAME", help="Gate of the call graph, or a pattern.")
@click.option(
    "--label", required=True, type=click.Choice(get_args(Label)), help="What is said of them."
)
@click.option("--reason", required=True, metavar="TEXT", help="Why, in a sentence.")
@click.option("--owner", required=True, metavar="NAME", help="Who says so.")
@click.option(
    "--date",
    type=click.DateTime(["%Y-%m-%d"]),
    metavar="DATE",
    help="Since when; default: today.",
)
def add(
    file: Path,
    document: Path | None,
    *,
    identity: str | None,
    function: str | None,
    file_name: str | None,
    driver: str | None,
    subsystem: str | None,
    trap: "TrapClass | None",
    gate: str | None,
    label: Label,
    reason: str,
    owner: str,
    date: dt.datetime | None,
) -> int:
    """Add a label to FILE, which is made if it is not there.

    A finding has it if it fits all that is given. With DOCUMENT, a result as JSON, it must fit
    something there; with --id, what is known of the place is noted, so that the label can be
    carried to other kernels.
    """
    given = (identity, function, file_name, driver, subsystem, trap, gate)
    if not any(given):
        raise UsageError(
            "say which findings, by --id, --function, --file, --driver, --subsystem, --class "
            "or --gate."
        )
    if identity is not None and document is None:
        raise UsageError("--id needs the DOCUMENT that has it, for what is known of its place.")
    entry = LabelEntry(
        label=label,
        reason=reason,
        owner=owner,
        date=(date or dt.datetime.now().astimezone()).date(),
        id=identity,
        function=function,
        file=file_name,
        driver=driver,
        subsystem=subsystem,
        trap=trap,
        gate=gate,
    )
    trapline.add_label(file, entry, document)
    return ExitCode.CLEAN


@command.command(
    "list",
    cls=Command,
    examples=("trapline label list labels.toml", "trapline label list labels.toml scan.json"),
)
@_FILE
@click.argument("document", type=PATH, required=False, metavar="[DOCUMENT]")
@format_option(LABELS.format_names)
@output_option
def list_command(
    file: Path, document: Path | None, *, format_name: str, output: Path | None
) -> int:
    """Print the labels of FILE.

    With DOCUMENT, a result as JSON, say how much of it each fits, and exit with 1 if one fits
    nothing, or was carried from another kernel and not confirmed.
    """
    destination = Destination(output)
    result = trapline.list_labels(file, document)
    destination.write(LABELS.render(result, format_name))
    return exit_code(result)


@command.command(
    "carry",
    cls=Command,
    examples=(
        "trapline label carry labels.toml new.json",
        "trapline label carry labels.toml new.json --from old.json -o new.toml",
    ),
)
@_FILE
@click.argument("document", type=PATH, metavar="DOCUMENT")
@click.option(
    "--from",
    "before",
    type=PATH,
    metavar="OLD",
    help="Result of the kernel that the ids are of, for labels that do not say what was known.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    metavar="NEW",
    help="Write the labels to NEW; default: back to FILE, without its comments.",
)
def carry(file: Path, document: Path, *, before: Path | None, output: Path | None) -> int:
    """Carry the labels of FILE to the kernel of DOCUMENT, a result as JSON.

    By id first; then to the place that is nearest, marked as `carried`: such a label does not
    settle a finding until a person takes that line out. Exits with 1 if a label fits nothing any
    more.
    """
    target = output or file
    Destination(target)
    found = trapline.carry_labels(file, document, before)
    trapline.save_labels(target, found.entries)
    click.echo(
        f"{found.kept:,} kept, {found.near:,} carried to what is nearest (to be confirmed), "
        f"{len(found.lost):,} fit nothing."
    )
    for text in found.lost:
        click.echo(f"  fits nothing: {printable(text)}")
    return ExitCode.FINDINGS if found.lost else ExitCode.CLEAN
