"""The `trapline` program: finds the command, and turns errors into one line and a number."""

import importlib
import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import click

from trapline.base.errors import ExitCode, TraplineError
from trapline.base.printable import printable
from trapline.base.scarcity import scarce
from trapline.base.version import __version__
from trapline.cli.command import Group
from trapline.cli.signals import leave, was_interrupted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from click.shell_completion import CompletionItem

#: Each command with what the list of commands says of it, in the order in which a user meets them.
#: No commas in it: fish would show what is before the first.
#: Each is an object `command` in a module of its name below trapline.cli.
COMMANDS = {
    "scan": "List every place where a kernel may trap to its host.",
    "boot": "Run a kernel as a TD without TDX hardware.",
    "run": "Sit at the console of a TD without TDX hardware.",
    "explore": "Inject events at every instruction of a window.",
    "verify": "Hold what the #VE handler emulates against the processor.",
    "contexts": "Prove where no trap may land.",
    "tradeoff": "Count what MMIO costs under three designs.",
    "filter": "Hold a kernel's drivers against an allow list of devices.",
    "diff": "Say what changed between two kernels or results.",
    "gate": "Fail what a policy forbids or a baseline does not have.",
    "label": "Say of findings that they are all right or a concern.",
    "page": "Put results of a kernel on one HTML page.",
    "rules": "Look up what the TDX module does and who says so.",
    "schema": "Print the JSON Schema of a document or input file.",
    "completion": "Print what makes a shell complete trapline's commands.",
    "man": "Print the manual page.",
}


class _Terminated(KeyboardInterrupt):
    """SIGTERM came; whatever cleans up after Ctrl-C must do so then, too."""

    #: Whether it has: what passes through a library's callback comes out as another exception.
    has_come = False


class LazyGroup(Group):
    """A click group that imports a command's module when that command is called.

    Listing the commands, for --help or a shell that completes, must not load a CPU emulator.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order of the table."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; None for an unknown name."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        with _quiet_interrupt():
            module = importlib.import_module(f"trapline.cli.{cmd_name}")
        command: click.Command = module.command
        command.short_help = COMMANDS[cmd_name]
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        """Complete the name of a command, or of an option of trapline itself."""
        from click.shell_completion import CompletionItem  # noqa: PLC0415 - only when completing

        names = [
            CompletionItem(name, help=text)
            for name, text in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)


@click.group(
    cls=LazyGroup,
    examples=(
        "trapline scan deb:linux-image-6.12-cloud-amd64",
        "trapline boot --help",
        "trapline man | man -l -",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
)
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
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _interrupted()
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
        if (short := scarce(error)) is not None:
            return _fail(str(short), short.exit_code)
        if _Terminated.has_come or was_interrupted(error):
            return _interrupted()
        if os.environ.get("TRAPLINE_DEBUG"):
            raise
        kind = type(error).__name__
        return _fail(
            f"internal error ({kind}: {error}); set TRAPLINE_DEBUG=1 and report the traceback.",
            ExitCode.INTERNAL,
        )
    return int(code or 0)


def _interrupted() -> int:
    if _Terminated.has_come:
        return _fail("terminated; nothing was written.", ExitCode.TERMINATED)
    return _fail("interrupted; nothing was written.", ExitCode.INTERRUPTED)


def _fail(message: str, code: ExitCode) -> int:
    click.echo(f"trapline: {printable(message)}", err=True)
    return int(code)


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough, and cleaning up takes a moment
    _Terminated.has_come = True
    raise _Terminated


@contextmanager
def _quiet_interrupt() -> "Iterator[None]":
    """Let Ctrl-C end the program at once, while libraries are imported: some make it an error."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else's program, or not the main thread of one
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    """Console entry point."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = run()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done, and cleaned up
    sys.exit(code)
