"""`trapline man`: the manual page, made from the commands and their help."""

import re
from typing import TYPE_CHECKING, Final

import click

from trapline.base.errors import ExitCode
from trapline.base.version import __version__
from trapline.cli.command import Command
from trapline.cli.main import COMMANDS, cli
from trapline.cli.options import output_option
from trapline.report.output import Destination

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What the page says of an exit code below 10; those above are the documentation's.
_EXITS: Final = (
    ("0", "Nothing was found against the policy."),
    ("1", "Something was found against the policy."),
    ("2", "The command line makes no sense."),
    ("10 and above", "One number for each kind of failure; docs/exit-codes.md lists them."),
)
_ENVIRONMENT: Final = (
    ("TRAPLINE_DEBUG", "If set, a mistake in trapline shows its traceback."),
    ("NO_COLOR", "If set, progress bars have no colours."),
)


@click.command(
    "man",
    cls=Command,
    examples=(
        "trapline man | man -l -",
        "trapline man -o ~/.local/share/man/man1/trapline.1",
    ),
)
@output_option
def command(output: "Path | None") -> int:
    """Print trapline's manual page, for man(1): all commands with their options and examples."""
    destination = Destination(output)
    destination.write(f"{line}\n".encode() for line in page())
    return ExitCode.CLEAN


def page() -> "Iterator[str]":
    """Yield the lines of the page, as troff with the macros of man(7)."""
    context = click.Context(cli, info_name="trapline")
    assert cli.help is not None
    summary = cli.help.rstrip(".")
    yield f'.TH TRAPLINE 1 "" "trapline {__version__}" "User Commands"'
    yield ".SH NAME"
    yield f"trapline \\- {_escaped(summary[:1].lower() + summary[1:])}"
    yield ".SH SYNOPSIS"
    yield ".B trapline"
    yield _escaped("COMMAND [OPTIONS] [ARGUMENTS]")
    yield ".SH COMMANDS"
    for name, text in COMMANDS.items():
        yield from _item(f"trapline {name}", text)
    for name in COMMANDS:
        yield from _command(cli, context, name)
    yield ".SH EXIT STATUS"
    for number, text in _EXITS:
        yield from _item(number, text)
    yield ".SH ENVIRONMENT"
    for number, text in _ENVIRONMENT:
        yield from _item(number, text)


def _command(group: click.Group, parent: click.Context, name: str) -> "Iterator[str]":
    command = group.get_command(parent, name)
    assert command is not None, "the group itself names it"
    context = click.Context(command, info_name=name, parent=parent)
    yield f'.SH "{context.command_path.upper()}"'
    yield f".B {_escaped(context.command_path)}"
    yield _escaped(" ".join(command.collect_usage_pieces(context)))
    for paragraph in (command.help or "").split("\n\n"):
        yield ".PP"
        yield from _paragraph(paragraph)
    if isinstance(command, Command):
        yield from _options(command, context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            yield from _command(command, context, child)


def _options(command: Command, context: click.Context) -> "Iterator[str]":
    for heading, records in command.grouped(context):
        yield f'.SS "{_escaped(heading)}"'
        for names, text in records:
            yield from _item(names, text)
    yield '.SS "Examples"'
    yield ".nf"
    yield from map(_escaped, command.examples)
    yield ".fi"


def _item(name: str, text: str) -> "Iterator[str]":
    yield ".TP"
    yield f"\\fB{_escaped(name)}\\fR"
    yield _escaped(text)


def _paragraph(text: str) -> "Iterator[str]":
    if not text.startswith("\b\n"):
        yield _escaped(" ".join(text.split()))
        return
    yield ".nf"  # \b: click's word for lines that must stay as they are
    yield from map(_escaped, text.splitlines()[1:])
    yield ".fi"


def _escaped(text: str) -> str:
    """Keep troff from taking a backslash, a minus sign, or a first dot or quote as its own."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text)
