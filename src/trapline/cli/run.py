"""`trapline run`: a guest to sit at."""

import os
import shlex
import sys
import termios
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

import trapline
from trapline.boot.session import CONSOLE_LIMIT, Session
from trapline.cli.command import Command
from trapline.cli.options import (
    PATH,
    format_option,
    kernel_argument,
    module_version_option,
    modules_option,
    output_option,
)
from trapline.cli.progress import ProgressReport
from trapline.cli.sizes import SECONDS, SIZE
from trapline.report.output import Destination, standard_output
from trapline.report.records import BOOT
from trapline.results.findings import exit_code

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MEMORY = 1 << 30


@click.command(
    "run",
    cls=Command,
    groups={
        "What runs": ("disk", "initrd", "insmod", "modules", "append", "cmdline"),
        "The machine": ("memory", "net", "share", "devices", "module_version"),
        "The result": ("timeout", "format_name", "output", "verbosity"),
    },
    examples=(
        "trapline run deb:linux-image-6.12-cloud-amd64",
        "trapline run deb:linux-image-6.12-cloud-amd64 --disk debian.img --net",
        "trapline run vmlinuz --initrd my.cpio.gz --memory 2G",
    ),
)
@kernel_argument
@click.option(
    "--disk",
    type=PATH,
    metavar="IMAGE",
    help="Boot from this disk image, which the guest writes to; default: a shell of busybox.",
)
@click.option("--initrd", type=PATH, metavar="FILE", help="Boot this initrd.")
@click.option("--insmod", multiple=True, metavar="MODULE", help="Load this module; repeatable.")
@modules_option
@click.option(
    "--append", multiple=True, metavar="ARGS", help="Add to the command line; repeatable."
)
@click.option("--cmdline", metavar="ARGS", help="Replace the kernel's command line.")
@click.option(
    "--memory",
    type=SIZE,
    default=_MEMORY,
    show_default="1G",
    help="Memory of the guest, 3G at most.",
)
@click.option("--net", is_flag=True, help="Give the guest a network (QEMU's user mode).")
@click.option(
    "--share", type=PATH, metavar="DIR", help="Share this folder with the guest, by 9P; tag: share."
)
@click.option("--device", "devices", multiple=True, metavar="D", help="As for `boot`; repeatable.")
@module_version_option
@click.option("--timeout", type=SECONDS, help="End the run after this much wall-clock time.")
@format_option(BOOT.format_names)
@output_option
@click.option("-v", "--verbose", "verbosity", count=True, help="List every place that trapped.")
def command(
    kernel: str,
    *,
    disk: "Path | None",
    initrd: "Path | None",
    insmod: tuple[str, ...],
    modules: "Path | None",
    append: tuple[str, ...],
    cmdline: str | None,
    memory: int,
    net: bool,
    share: "Path | None",
    devices: tuple[str, ...],
    module_version: str,
    timeout: float | None,
    format_name: str,
    output: "Path | None",
    verbosity: int,
) -> int:
    """Run KERNEL as a TD, and sit at its console.

    What you type goes to the guest, Ctrl-C too; Ctrl-] leaves. The report of `trapline boot` comes
    at the end. The guest's console drives your terminal as it pleases.
    """
    destination = Destination(output)
    screen = standard_output()
    wanted = [*devices, "ioapic"]
    if disk is not None:
        file = str(disk).replace(",", ",,")
        wanted.append(f"blk,file={file},write=on")
    if net:
        wanted.append("net")
    if share is not None:
        folder = str(share).replace(",", ",,")
        wanted.append(f"9p,share={folder},tag=share,write=on")
    keyboard = sys.stdin.fileno()

    def show(data: bytes) -> None:
        screen.write(data)
        screen.flush()

    with ProgressReport() as report:
        report.announce("Ctrl-] leaves the guest")
        with _raw(keyboard):
            result = trapline.boot(
                kernel,
                modules=modules,
                initrd=initrd,
                insmod=(*insmod, *(("virtio_net",) if net and initrd is None else ())),
                append=append,
                cmdline=cmdline,
                memory=memory,
                devices=wanted,
                module_version=module_version,
                scan=False,
                timeout=timeout,
                console_limit=CONSOLE_LIMIT,
                reproduce=shlex.join(["trapline", *sys.argv[1:]]),
                session=None if initrd is not None else _session(disk),
                keyboard=keyboard,
                console=show,
                announce=report.announce,
            )
    show(b"\n")
    destination.write(BOOT.render(result, format_name, verbosity))
    return exit_code(result)


def _session(disk: "Path | None") -> Session:
    term = os.environ.get("TERM", "vt100")
    if not sys.stdin.isatty():
        return Session(has_disk=disk is not None, term="dumb")
    columns, rows = os.get_terminal_size(sys.stdin.fileno())
    return Session(rows=rows or 24, columns=columns or 80, term=term, has_disk=disk is not None)


@contextmanager
def _raw(descriptor: int) -> "Iterator[None]":
    """Have a terminal pass on each key as it is, and be as it was afterwards."""
    if not os.isatty(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)
