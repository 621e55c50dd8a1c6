"""The `trapline` program: finds the command, and turns errors into one line and a number."""

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

import click

from trapline import __version__
from trapline.base.errors import ExitCode, TraplineError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Command name -> module below trapline.cli with an object `command`. Commands are imported
# when they are called: `trapline --help` must not load a CPU emulator.
COMMANDS = {
    "scan": "scan",
    "explore": "explore",
    "schema": "schema",
    "filter": "filter",
    "rules": "rules",
    "boot": "boot",
    "verify": "verify",
    "tradeoff": "tradeoff",
}


class _Terminated(KeyboardInterrupt):
    """SIGTERM came; whatever cleans up after Ctrl-C must do so then, too."""


class LazyGroup(click.Group):
    """A click group that imports a command's module on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order of the table."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command, or answer None so that click reports an unknown name."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"trapline.cli.{COMMANDS[cmd_name]}")
        command: click.Command = module.command
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trapline")
def cli() -> None:
    """Show every place where a Linux kernel traps to its untrusted host."""


def run(arguments: "Sequence[str] | None" = None) -> int:
    """Run one command line and return the exit code; never raises for what a user can cause."""
    try:
        code = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name="trapline",
            standalone_mode=False,
        )
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__ or error, _Terminated):
            return _fail("terminated; nothing was written.", ExitCode.TERMINATED)
        return _fail("interrupted; nothing was written.", ExitCode.INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return ExitCode.USAGE
    except click.ClickException as error:
        return _fail(error.format_message(), ExitCode.USAGE)
    except TraplineError as error:
        return _fail(str(error), error.exit_code)
    except SystemExit:
        # What click makes of a pipe whose reader went away (`trapline --help | head`).
        return ExitCode.CLEAN
    except Exception as error:  # the last line of defence against a traceback
        if os.environ.get("TRAPLINE_DEBUG"):
            raise
        kind = type(error).__name__
        return _fail(
            f"internal error ({kind}: {error}); set TRAPLINE_DEBUG=1 and report the traceback.",
            ExitCode.INTERNAL,
        )
    return int(code or 0)


def _fail(message: str, code: ExitCode) -> int:
    click.echo(f"trapline: {message}", err=True)
    return int(code)


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough, and cleaning up takes a moment
    raise _Terminated


def main() -> None:
    """Console entry point."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run())
