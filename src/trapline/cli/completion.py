"""`trapline completion`: what makes a shell complete commands, options and their values."""

from typing import TYPE_CHECKING, Final

import click
from click.shell_completion import get_completion_class

from trapline.base.errors import ExitCode
from trapline.cli.command import Command
from trapline.cli.main import cli
from trapline.cli.options import output_option
from trapline.report.output import Destination

if TYPE_CHECKING:
    from pathlib import Path

_SHELLS: Final = ("bash", "zsh", "fish")
_VARIABLE: Final = "_TRAPLINE_COMPLETE"  # the name that click derives from the program's


@click.command(
    "completion",
    cls=Command,
    examples=(
        'eval "$(trapline completion bash)"  # in ~/.bashrc',
        'eval "$(trapline completion zsh)"  # in ~/.zshrc',
        "trapline completion fish -o ~/.config/fish/completions/trapline.fish",
    ),
)
@click.argument("shell", type=click.Choice(_SHELLS), metavar="SHELL")
@output_option
def command(shell: str, output: "Path | None") -> int:
    """Print a script that makes SHELL complete trapline's commands, options and values.

    SHELL is bash (4.4 or later), zsh or fish.
    """
    destination = Destination(output)
    kind = get_completion_class(shell)
    assert kind is not None, "click has all three"
    destination.write([kind(cli, {}, "trapline", _VARIABLE).source().encode(), b"\n"])
    return ExitCode.CLEAN
