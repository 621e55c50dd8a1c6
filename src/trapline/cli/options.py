"""Arguments and options that several commands share, so that they mean the same everywhere.

Paths are not checked by click: what is wrong with them is said by the code that opens them, with
the exit code that fits.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_F = TypeVar("_F", bound="Callable[..., Any]")
_PATH = click.Path(path_type=Path)

kernel_argument = click.argument("kernel", metavar="KERNEL")

modules_option = click.option(
    "--modules",
    type=_PATH,
    metavar="DIR",
    help="Take the modules from this folder instead of the one that goes with KERNEL.",
)

allow_option = click.option(
    "--allow",
    type=_PATH,
    metavar="FILE",
    help="Allow list (TOML) to hold drivers against; default: the eight ids of the e-mail.",
)

output_option = click.option(
    "-o",
    "--output",
    type=_PATH,
    metavar="FILE",
    help="Write the result to FILE, whole or not at all; default: standard output.",
)

verbose_option = click.option(
    "-v",
    "--verbose",
    "verbosity",
    count=True,
    help="List every site with its source line and inline chain; twice: with its evidence.",
)

jobs_option = click.option(
    "--jobs",
    type=click.IntRange(min=1, max=1024),
    metavar="N",
    help="Worker processes; default: one for each CPU.",
)


def format_option(formats: "Iterable[str]") -> "Callable[[_F], _F]":
    """Make --format with the given names, the first of which is the default."""
    names = tuple(formats)
    return click.option(
        "--format",
        "format_name",
        type=click.Choice(names),
        default=names[0],
        show_default=True,
        help="Form of the result.",
    )
