"""`trapline filter`: allow lists, and what they mean for a kernel."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from trapline.cli.options import (
    allow_option,
    format_option,
    jobs_option,
    kernel_argument,
    modules_option,
    output_option,
)
from trapline.cli.progress import ProgressReport
from trapline.devicefilter import listfile
from trapline.devicefilter.check import check
from trapline.kernel.locate import locate
from trapline.model.errors import ExitCode
from trapline.report import filter_text, json_document
from trapline.report.output import Destination
from trapline.scan.engine import scan

if TYPE_CHECKING:
    from pathlib import Path

    from trapline.model.allow import AllowList
    from trapline.model.filter import FilterResult

_FORMATS = ("text", "json")


@click.group("filter")
def command() -> None:
    """Show device allow lists, and hold a kernel's drivers against one."""


@command.command("show")
@allow_option
@format_option(_FORMATS)
@output_option
def show(allow: "Path | None", format_name: str, output: "Path | None") -> int:
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
    modules: "Path | None",
    allow: "Path | None",
    format_name: str,
    output: "Path | None",
    jobs: int | None,
) -> int:
    """Say which drivers of KERNEL an allow list lets in, and which bind all the same.

    A filter in user space acts after the drivers that are built in have probed. KERNEL is
    scanned first, so that each driver comes with the places where it touches the host.

    Exits with 1 when a built-in driver that the list does not let in touches the host.
    """
    destination = Destination(output)
    allow_list = listfile.load(allow)
    with ProgressReport("scanned") as progress:
        files = locate(kernel, modules, announce=progress.announce)
        result = check(scan(files, allow_list, progress.advance, workers=jobs), allow_list)
    destination.write(_result(result, format_name))
    return ExitCode.FINDINGS if result.findings else ExitCode.CLEAN


def _list(allow: "AllowList", format_name: str) -> Iterator[bytes]:
    if format_name == "text":
        return filter_text.render_list(allow)
    return json_document.render(listfile.document(allow))


def _result(result: "FilterResult", format_name: str) -> Iterator[bytes]:
    return filter_text.render(result) if format_name == "text" else json_document.render(result)
