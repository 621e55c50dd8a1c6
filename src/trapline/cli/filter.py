"""`trapline filter`: allow lists, and what they mean for a kernel."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trapline.allowlist import listfile
from trapline.base.errors import ExitCode, NoDebugInfoError
from trapline.cli.options import (
    allow_option,
    format_option,
    jobs_option,
    kernel_argument,
    modules_option,
    output_option,
)
from trapline.cli.progress import ProgressReport
from trapline.devicefilter import export, live
from trapline.devicefilter.check import check
from trapline.kernel.binary import Binary
from trapline.kernel.find.locate import locate
from trapline.report import filter_text, json_document, live_text
from trapline.report.output import Destination
from trapline.scan.wholekernel import scan

if TYPE_CHECKING:
    from trapline.allowlist.entries import AllowList
    from trapline.results.filter import FilterResult

_FORMATS = ("text", "json")


@click.group("filter")
def command() -> None:
    """Show device allow lists, and hold a kernel's drivers against one."""


@command.command("show")
@allow_option
@format_option(_FORMATS)
@output_option
def show(allow: Path | None, format_name: str, output: Path | None) -> int:
    """Print an allow list with what each id lets in.

    The JSON form is that of the list itself (schema trapline/allow-list).
    """
    destination = Destination(output)
    destination.write(_list(listfile.load(allow), format_name))
    return ExitCode.CLEAN


@command.command("check")
@kernel_argument
@modules_option
@allow_option
@format_option(_FORMATS)
@output_option
@jobs_option
def check_command(
    kernel: str,
    modules: Path | None,
    allow: Path | None,
    format_name: str,
    output: Path | None,
    jobs: int | None,
) -> int:
    """Say which drivers of KERNEL an allow list lets in, and which bind all the same.

    A filter in user space acts after the drivers that are built in have probed. KERNEL is
    scanned first, so that each driver comes with the places where it touches the host.

    Exits with 1 when a built-in driver that the list does not let in touches the host.
    """
    destination = Destination(output)
    allow_list = listfile.load(allow)
    _, result = _checked(kernel, modules, allow_list, jobs)
    destination.write(_result(result, format_name))
    return ExitCode.FINDINGS if result.findings else ExitCode.CLEAN


@command.command("export")
@click.argument("folder", type=click.Path(path_type=Path), metavar="FOLDER")
@allow_option
@click.option(
    "--kernel",
    metavar="KERNEL",
    help="Also name the modules and initcalls of KERNEL that the list does not let in.",
)
@modules_option
@jobs_option
def export_command(
    folder: Path, allow: Path | None, kernel: str | None, modules: Path | None, jobs: int | None
) -> int:
    """Write to FOLDER what enforces an allow list on a stock kernel.

    A script that turns automatic probing off and binds listed devices only, with the initramfs
    hook and the udev rules that run it, a configuration of modprobe, a kernel command line and
    QEMU arguments. FOLDER must be empty or not exist.
    """
    allow_list = listfile.load(allow)
    checked: FilterResult | None = None
    blocked: tuple[str, ...] = ()
    if kernel is not None:
        path, checked = _checked(kernel, modules, allow_list, jobs)
        with Binary.open_vmlinux(path) as vmlinux:
            blocked = export.initcalls(vmlinux.symbols.names, export.early(checked))
    contents = export.files(allow_list, checked, blocked)
    export.write(contents, folder)
    for name in contents:
        click.echo(str(folder / name))
    return ExitCode.CLEAN


def _checked(
    kernel: str, modules: Path | None, allow_list: "AllowList", jobs: int | None
) -> "tuple[Path, FilterResult]":
    """Scan a kernel and judge a list by it; gives the vmlinux, too."""
    with ProgressReport("scanned") as progress:
        files = locate(kernel, modules, announce=progress.announce)
        result = check(scan(files, allow_list, progress.advance, workers=jobs), allow_list)
    if files.vmlinux is None or not result.kernel.has_dwarf:
        # "Nothing found" would be a lie, and the root disk's driver kept from loading.
        raise NoDebugInfoError(
            f"{kernel}: without debug information it is not known which code is which driver's; "
            "name a kernel that has it."
        )
    return files.vmlinux, result


@command.command("live")
@allow_option
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    default="/",
    metavar="FOLDER",
    help="Where the machine's proc and sys are; default: this machine's.",
)
@format_option(_FORMATS)
@output_option
def live_command(allow: Path | None, root: Path, format_name: str, output: Path | None) -> int:
    """Hold the machine this runs on against an allow list.

    Says whether it is a TD, which drivers have devices that are not on the list, and which other
    ways to the host it has: IO-APIC, HPET, ACPI tables, clock source, shared memory.

    Exits with 1 when something is found against the list.
    """
    destination = Destination(output)
    result = live.inspect(root, listfile.load(allow))
    text = format_name == "text"
    destination.write(live_text.render(result) if text else json_document.render(result))
    found = any(item.standing == "finding" for item in result.checks)
    return ExitCode.FINDINGS if found else ExitCode.CLEAN


def _list(allow: "AllowList", format_name: str) -> Iterator[bytes]:
    if format_name == "text":
        return filter_text.render_list(allow)
    return json_document.render(listfile.document(allow))


def _result(result: "FilterResult", format_name: str) -> Iterator[bytes]:
    return filter_text.render(result) if format_name == "text" else json_document.render(result)
