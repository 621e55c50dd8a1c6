"""`trapline filter`: allow lists, and what they mean for a kernel."""

from typing import TYPE_CHECKING

import click

import trapline
from trapline.base.errors import ExitCode
from trapline.base.printable import printable
from trapline.cli.command import Command, Group
from trapline.cli.options import (
    PATH,
    allow_option,
    format_option,
    kernel_argument,
    labels_option,
    modules_option,
    output_option,
    workers_option,
)
from trapline.cli.progress import ProgressReport
from trapline.report.output import Destination
from trapline.report.records import ALLOW_LIST, FILTER_CHECK, FILTER_LIVE
from trapline.results.findings import exit_code

if TYPE_CHECKING:
    from pathlib import Path


@click.group(
    "filter",
    cls=Group,
    examples=("trapline filter show", "trapline filter check vmlinux", "trapline filter live"),
)
def command() -> None:
    """Show device allow lists, and hold a kernel's drivers against one."""


@command.command(
    "show",
    cls=Command,
    examples=("trapline filter show", "trapline filter show --allow ours.toml --format json"),
)
@allow_option
@format_option(ALLOW_LIST.format_names)
@output_option
def show(allow: "Path | None", format_name: str, output: "Path | None") -> int:
    """Print an allow list with what each id lets in.

    The JSON form is that of the list itself (schema trapline/allow-list).
    """
    destination = Destination(output)
    destination.write(ALLOW_LIST.render(trapline.allow_list(allow), format_name))
    return ExitCode.CLEAN


@command.command(
    "check",
    cls=Command,
    examples=(
        "trapline filter check deb:linux-image-6.12-cloud-amd64",
        "trapline filter check vmlinux --modules lib/modules/6.12.0 --allow ours.toml",
    ),
)
@kernel_argument
@modules_option
@allow_option
@labels_option
@format_option(FILTER_CHECK.format_names)
@output_option
@workers_option
def check_command(
    kernel: str,
    *,
    modules: "Path | None",
    allow: "Path | None",
    labels: "Path | None",
    format_name: str,
    output: "Path | None",
    workers: int | None,
) -> int:
    """Say which drivers of KERNEL an allow list lets in, and which bind all the same.

    A filter in user space acts after the drivers that are built in have probed. KERNEL is
    scanned first, so that each driver comes with the places where it touches the host.

    Exits with 1 when a built-in driver that the list does not let in touches the host.
    """
    destination = Destination(output)
    with ProgressReport() as report:
        result = trapline.check(
            kernel,
            modules=modules,
            allow=allow,
            workers=workers,
            labels=labels,
            progress=report.advance,
            announce=report.announce,
        )
    destination.write(FILTER_CHECK.render(result, format_name))
    return exit_code(result)


@command.command(
    "export",
    cls=Command,
    examples=(
        "trapline filter export filter/",
        "trapline filter export filter/ --allow ours.toml --kernel /lib/modules/$(uname -r)",
    ),
)
@click.argument("folder", type=PATH, metavar="FOLDER")
@allow_option
@click.option(
    "--kernel",
    metavar="KERNEL",
    help="Also name the modules and initcalls of KERNEL that the list does not let in.",
)
@modules_option
@workers_option
def export_command(
    folder: "Path",
    *,
    allow: "Path | None",
    kernel: str | None,
    modules: "Path | None",
    workers: int | None,
) -> int:
    """Write to FOLDER what enforces an allow list on a stock kernel.

    A script that turns automatic probing off and binds listed devices only, with the initramfs
    hook and the udev rules that run it, a configuration of modprobe, a kernel command line and
    QEMU arguments. FOLDER must be empty or not exist.
    """
    with ProgressReport() as report:
        written = trapline.export_filter(
            folder,
            allow=allow,
            kernel=kernel,
            modules=modules,
            workers=workers,
            progress=report.advance,
            announce=report.announce,
        )
    for path in written:
        click.echo(printable(str(path)))
    return ExitCode.CLEAN


@command.command(
    "live",
    cls=Command,
    examples=("trapline filter live", "trapline filter live --allow ours.toml --format json"),
)
@allow_option
@click.option(
    "--root",
    type=PATH,
    default="/",
    metavar="FOLDER",
    help="Where the machine's proc and sys are; default: this machine's.",
)
@format_option(FILTER_LIVE.format_names)
@output_option
def live_command(
    allow: "Path | None", root: "Path", format_name: str, output: "Path | None"
) -> int:
    """Hold the machine this runs on against an allow list.

    Says whether it is a TD, which drivers have devices that are not on the list, and which other
    ways to the host it has: IO-APIC, HPET, ACPI tables, clock source, shared memory.

    Exits with 1 when something is found against the list.
    """
    destination = Destination(output)
    result = trapline.check_machine(root=root, allow=allow)
    destination.write(FILTER_LIVE.render(result, format_name))
    return exit_code(result)
