"""Arguments and options that several commands share, so that they mean the same everywhere.

Paths are not checked by click: what is wrong with them is said by the code that opens them, with
the exit code that fits.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from trapline.rules.tables import DEFAULT_VERSION, versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_F = TypeVar("_F", bound="Callable[..., Any]")
PATH: Final = click.Path(path_type=Path)


def _files(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Have the shell complete names of files, which a release or deb:PACKAGE is not kept from."""
    del context, parameter
    return [CompletionItem(incomplete, type="file")]


kernel_argument = click.argument("kernel", metavar="KERNEL", shell_complete=_files)

modules_option = click.option(
    "--modules",
    type=PATH,
    metavar="DIR",
    help="Take the modules from this folder instead of the one that goes with KERNEL.",
)

allow_option = click.option(
    "--allow",
    type=PATH,
    metavar="FILE",
    help="Allow list (TOML) to hold drivers against; default: the eight ids of the e-mail.",
)

initrd_option = click.option(
    "--initrd",
    type=PATH,
    metavar="FILE",
    help="Boot this initrd; default: a busybox that tests the guest and powers it off.",
)

module_version_option = click.option(
    "--module-version",
    type=click.Choice(versions()),
    default=DEFAULT_VERSION,
    show_default=True,
    help="Version of the TDX module whose rules apply.",
)

labels_option = click.option(
    "--labels",
    type=PATH,
    metavar="FILE",
    help="Take what people said of findings from FILE (TOML): what is settled is no finding.",
)

output_option = click.option(
    "-o",
    "--output",
    type=PATH,
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

workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1, max=256),
    metavar="N",
    help="Processes on this machine; default: one for each CPU. The result does not depend on it.",
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
