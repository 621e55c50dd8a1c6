"""`trapline boot`: runs a kernel as a TD on a software TDX module, and says where it trapped."""

import shlex
import sys
from typing import TYPE_CHECKING, Literal, get_args

import click
from click.shell_completion import CompletionItem

import trapline
from trapline.boot import policy
from trapline.boot.run import GdbAt
from trapline.cli.command import Command
from trapline.cli.options import (
    PATH,
    format_option,
    initrd_option,
    kernel_argument,
    labels_option,
    module_version_option,
    modules_option,
    output_option,
)
from trapline.cli.progress import ProgressReport
from trapline.cli.sizes import SECONDS, SIZE
from trapline.machine.devices.console import DEFAULT_LIMIT
from trapline.machine.loader.acpi import BOARD_DEVICES
from trapline.machine.loader.gpamap import DEFAULT_MEMORY
from trapline.machine.qemu.catalogue import CATALOGUE
from trapline.report.output import Destination, standard_output
from trapline.report.records import BOOT
from trapline.report.terminal import Screen, plain
from trapline.results.boot import ComplaintKind
from trapline.results.findings import exit_code
from trapline.results.trapclass import POLICY_CLASSES
from trapline.rules.tables import versions

if TYPE_CHECKING:
    from pathlib import Path


def _devices(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    del context, parameter
    names = (*BOARD_DEVICES, *CATALOGUE)
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _policies(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    del context, parameter
    words = (f"{name}={mode}" for name in POLICY_CLASSES for mode in policy.MODES)
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


@click.command(
    "boot",
    cls=Command,
    groups={
        "What runs": ("run", "modules", "initrd", "insmod", "append", "cmdline"),
        "The machine": (
            "memory",
            "unaccepted",
            "devices",
            "acpi_tables",
            "module_version",
            "compare_module",
        ),
        "What the guest may do": ("allow", "allow_mode", "policies", "on_forbidden"),
        "Watching it": (
            "scan_file",
            "no_scan",
            "trace",
            "gdb",
            "gdb_at",
            "fail_on",
            "timeout",
            "console_limit",
            "quiet",
        ),
        "The result": ("labels", "format_name", "output", "verbosity"),
    },
    examples=(
        "trapline boot deb:linux-image-6.12-cloud-amd64",
        "trapline boot vmlinuz --initrd initrd.img --memory 1G --append 'console=hvc0'",
        "trapline boot vmlinuz --device e1000 --insmod e1000 --trace traps.jsonl",
        "trapline boot vmlinuz --policy mmio=forbid --on-forbidden panic",
        "trapline boot vmlinuz --gdb :1234",
        "trapline boot vmlinuz --run ./test.sh",
    ),
)
@kernel_argument
@click.option(
    "--run",
    type=PATH,
    metavar="FILE",
    help="Run this script or static program in the guest: print what it prints and nothing else, "
    "and exit with its exit code.",
)
@modules_option
@initrd_option
@click.option(
    "--insmod",
    multiple=True,
    metavar="MODULE",
    help="Have the default initramfs load this module and what it depends on; repeatable.",
)
@click.option(
    "--append", multiple=True, metavar="ARGS", help="Add to the kernel's command line; repeatable."
)
@click.option(
    "--cmdline",
    metavar="ARGS",
    help="Replace the kernel's command line; default: that of Debian's cloud images.",
)
@click.option(
    "--memory",
    type=SIZE,
    default=DEFAULT_MEMORY,
    show_default="512M",
    help="Memory of the guest, 3G at most.",
)
@click.option(
    "--unaccepted",
    type=SIZE,
    default=0,
    help="Leave this much of it, at its end, for the guest to accept.",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="D",
    shell_complete=_devices,
    help="Put this on the board as well: ioapic, hpet (brings an IO-APIC with it), mmio-uart (a "
    "second serial port, its registers in memory), or one of "
    f"QEMU's devices: {', '.join(CATALOGUE)}, qemu:STRING; repeatable.",
)
@click.option(
    "--acpi-table",
    "acpi_tables",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Give the guest this ACPI table (AML as iasl writes it): an SSDT beside ours, another in "
    "place of ours; repeatable.",
)
@module_version_option
@click.option(
    "--compare-module",
    type=click.Choice(versions()),
    help="Boot once more on this version of the TDX module, and tell the #VEs side by side.",
)
@click.option(
    "--allow",
    type=PATH,
    metavar="FILE",
    help="Let the guest have only devices of this allow list; built-in: `filter show`.",
)
@click.option(
    "--allow-mode",
    type=click.Choice(["hide", "report"]),
    default="hide",
    show_default=True,
    help="What becomes of devices that are not on it: gone, or reported when they are used.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="CLASS=MODE",
    shell_complete=_policies,
    help=f"What to do about {', '.join(POLICY_CLASSES)}: {', '.join(policy.MODES)}; repeatable.",
)
@click.option(
    "--on-forbidden",
    type=click.Choice(["report", "panic"]),
    default="report",
    show_default=True,
    help="What a forbidden access does once it has been reported.",
)
@click.option(
    "--scan",
    "scan_file",
    type=PATH,
    metavar="FILE",
    help="Look traps up in this scan (JSON); default: scan the kernel, once, into the cache.",
)
@click.option("--no-scan", is_flag=True, help="Do not look traps up in a scan.")
@click.option("--trace", type=PATH, metavar="FILE", help="Write each trap to FILE as JSON Lines.")
@click.option("--gdb", metavar="ADDR", help="Wait for gdb at :PORT or HOST:PORT.")
@click.option(
    "--gdb-at",
    type=click.Choice(get_args(GdbAt)),
    default="kernel",
    show_default=True,
    help="Where: before the first instruction, or at start_kernel(), where symbols have their "
    "places.",
)
@click.option(
    "--fail-on",
    type=click.Choice((*get_args(ComplaintKind), "none")),
    multiple=True,
    metavar="KIND",
    help="Put up with no other complaint of the guest's kernel than this (exit code 32): "
    f"{', '.join(get_args(ComplaintKind))}; none; repeatable; default: all of them.",
)
@click.option(
    "--timeout",
    type=SECONDS,
    default=600,
    show_default=True,
    help="End the run after this much wall-clock time.",
)
@click.option(
    "--console-limit",
    type=SIZE,
    default=DEFAULT_LIMIT,
    show_default="4M",
    help="End the run when the guest has printed more than this.",
)
@click.option("-q", "--quiet", is_flag=True, help="Do not show the guest's console.")
@labels_option
@format_option(BOOT.format_names)
@output_option
@click.option("-v", "--verbose", "verbosity", count=True, help="List every place that trapped.")
def command(
    kernel: str,
    *,
    run: "Path | None",
    modules: "Path | None",
    initrd: "Path | None",
    insmod: tuple[str, ...],
    append: tuple[str, ...],
    cmdline: str | None,
    memory: int,
    unaccepted: int,
    devices: tuple[str, ...],
    acpi_tables: "tuple[Path, ...]",
    module_version: str,
    compare_module: str | None,
    allow: "Path | None",
    allow_mode: Literal["hide", "report"],
    policies: tuple[str, ...],
    on_forbidden: Literal["report", "panic"],
    scan_file: "Path | None",
    no_scan: bool,
    trace: "Path | None",
    gdb: str | None,
    gdb_at: GdbAt,
    fail_on: tuple[str, ...],
    timeout: float,
    console_limit: int,
    quiet: bool,
    labels: "Path | None",
    format_name: str,
    output: "Path | None",
    verbosity: int,
) -> int:
    """Run KERNEL as a TD on a software TDX module, and report every place where it trapped.

    KERNEL is what `trapline scan` takes; its boot image is started through its decompressor. A
    vmlinux is started itself where it is what KERNEL names, or where there is no boot image.
    The guest's console is shown live: on standard output, or on standard error while the
    result goes there in another form than text.

    Exits with 0 when the guest powers off or resets itself, with 32 when its kernel oopsed, warned
    or stalled before it did, with 1 when an access was made that a policy or the allow list
    forbids, else with one code for each way to die: see the table of exit codes.
    """
    destination = Destination(output)
    on_stdout = output is not None or format_name == "text"
    screen = None
    if not quiet and run is None:
        screen = Screen(standard_output() if on_stdout else sys.stderr.buffer)
    is_silent = run is not None and output is None
    with ProgressReport() as report:
        result = trapline.boot(
            kernel,
            run=run,
            modules=modules,
            initrd=initrd,
            insmod=insmod,
            append=append,
            cmdline=cmdline,
            memory=memory,
            unaccepted=unaccepted,
            devices=devices,
            acpi_tables=acpi_tables,
            module_version=module_version,
            compare_module=compare_module,
            allow=allow,
            allow_mode=allow_mode,
            policies=policy.parse(policies),
            on_forbidden=on_forbidden,
            scan=scan_file or not (no_scan or is_silent),
            trace=trace,
            gdb=gdb,
            gdb_at=gdb_at,
            fail_on=fail_on or None,
            timeout=timeout,
            console_limit=console_limit,
            reproduce=shlex.join(["trapline", *sys.argv[1:]]),
            console=screen,
            output=plain(standard_output()),
            errors=plain(sys.stderr.buffer),
            labels=labels,
            progress=report.advance,
            announce=report.announce,
        )
    if screen is not None and on_stdout:
        screen(b"\n")
    code = exit_code(result)
    if not is_silent:
        destination.write(BOOT.render(result, format_name, verbosity))
    elif result.program is not None and code != result.program.exit_code:
        sys.stderr.buffer.writelines(BOOT.render(result, "text", verbosity))
    return code
