"""`trapline boot`: runs a kernel as a TD on a software TDX module, and says where it trapped."""

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trapline.allowlist import listfile
from trapline.base.errors import ExitCode, UsageError
from trapline.boot.plan import (
    BootOptions,
    make_plan,
    open_symbols,
    parse_devices,
    without_boot_image,
)
from trapline.boot.policy import CLASSES, MODES, Guard
from trapline.boot.policy import parse as parse_policies
from trapline.boot.run import BootRun, trace_header
from trapline.boot.trace import TraceWriter
from trapline.cli.options import format_option, kernel_argument, modules_option, output_option
from trapline.cli.progress import ProgressReport
from trapline.cli.sizes import SECONDS, SIZE
from trapline.kernel.find.locate import locate
from trapline.machine.gdb.server import GdbServer
from trapline.machine.machine import DEFAULT_MEMORY
from trapline.machine.qemu.catalogue import CATALOGUE
from trapline.report.formats import BOOT_FORMATS
from trapline.report.output import Destination
from trapline.report.terminal import Screen
from trapline.rules.tables import DEFAULT_VERSION, versions
from trapline.scan.stored import read_scan, require_same_kernel, scan_once

if TYPE_CHECKING:
    from trapline.boot.plan import BootPlan
    from trapline.results.scan import ScanResult


@click.command("boot", short_help="Run a kernel as a TD without TDX hardware.")
@kernel_argument
@modules_option
@click.option(
    "--initrd",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Boot this initrd; default: a busybox that tests the guest and powers it off.",
)
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
    help="Put this on the board as well: ioapic, hpet (brings an IO-APIC with it), mmio-uart (a "
    "second serial port, its registers in memory), or one of "
    f"QEMU's devices: {', '.join(CATALOGUE)}, qemu:STRING; repeatable.",
)
@click.option(
    "--allow",
    type=click.Path(path_type=Path),
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
    help=f"What to do about {', '.join(CLASSES)}: {', '.join(MODES)}; repeatable.",
)
@click.option(
    "--on-forbidden",
    type=click.Choice(["report", "panic"]),
    default="report",
    show_default=True,
    help="What a forbidden access does once it has been reported.",
)
@click.option(
    "--module-version",
    type=click.Choice(versions()),
    default=DEFAULT_VERSION,
    show_default=True,
    help="Version of the TDX module whose rules apply.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write each trap to FILE as JSON Lines.",
)
@click.option("--gdb", metavar="ADDR", help="Wait for gdb at :PORT or HOST:PORT before the start.")
@click.option(
    "--scan",
    "scan_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Look traps up in this scan (JSON); default: scan the kernel, once, into the cache.",
)
@click.option("--no-scan", is_flag=True, help="Do not look traps up in a scan.")
@click.option(
    "--timeout",
    type=SECONDS,
    default=600,
    show_default=True,
    help="End the run after this much wall-clock time.",
)
@click.option("-q", "--quiet", is_flag=True, help="Do not show the guest's console.")
@format_option(BOOT_FORMATS)
@output_option
@click.option("-v", "--verbose", "verbosity", count=True, help="List every place that trapped.")
def command(
    kernel: str,
    *,
    modules: Path | None,
    initrd: Path | None,
    insmod: tuple[str, ...],
    append: tuple[str, ...],
    cmdline: str | None,
    memory: int,
    unaccepted: int,
    devices: tuple[str, ...],
    allow: Path | None,
    allow_mode: str,
    policies: tuple[str, ...],
    on_forbidden: str,
    module_version: str,
    trace: Path | None,
    gdb: str | None,
    scan_file: Path | None,
    no_scan: bool,
    timeout: float,
    quiet: bool,
    format_name: str,
    output: Path | None,
    verbosity: int,
) -> int:
    """Run KERNEL as a TD on a software TDX module, and report every place where it trapped.

    KERNEL is what `trapline scan` takes; its boot image is started through its decompressor. A
    vmlinux is started itself where it is what KERNEL names, or where there is no boot image.
    The guest's console is shown live: on standard output, or on standard error while the
    result goes there in another form than text.

    Exits with 0 when the guest powers off or resets itself, with 1 when an access was made that
    a policy or the allow list forbids, else with one code for each way to die: see the table of
    exit codes.
    """
    destination = Destination(output)
    board, requests = parse_devices(devices)
    guard = Guard(
        classes=parse_policies(policies),
        allow=None if allow is None else listfile.load(allow),
        hide=allow_mode == "hide",
        panic=on_forbidden == "panic",
    )
    if allow is None and not guard.hide:
        raise UsageError("--allow-mode report is about an allow list; name it with --allow.")
    if guard.panic and "forbid" not in guard.classes.values():
        raise UsageError(
            "--on-forbidden panic needs a class that is forbidden: --policy CLASS=forbid."
        )
    if guard.needs_scan and no_scan:
        raise UsageError("--policy and --allow-mode report need a scan; leave --no-scan out.")
    options = BootOptions(
        initrd=initrd,
        command_line=cmdline,
        append=append,
        insmod=insmod,
        memory=memory,
        unaccepted=unaccepted,
        board=board,
        devices=requests,
        guard=guard,
        module_version=module_version,
        timeout=timeout,
    )
    on_stdout = output is not None or format_name == "text"
    screen = None if quiet else Screen((sys.stdout if on_stdout else sys.stderr).buffer)
    known = None if scan_file is None else read_scan(scan_file)
    with ExitStack() as stack, ProgressReport("scanned") as progress:
        files = without_boot_image(locate(kernel, modules, announce=progress.announce), kernel)
        plan = make_plan(files, options, progress.announce)
        if known is not None and scan_file is not None:
            require_same_kernel(known, scan_file, plan.image.build_id)
        symbols = stack.enter_context(open_symbols(plan))
        writer = (
            None if trace is None else stack.enter_context(TraceWriter(trace, trace_header(plan)))
        )
        if known is None and guard.needs_scan:
            known = _scan(plan, progress)
        run = stack.enter_context(
            BootRun(plan, symbols, reproduce=_reproduce(), echo=screen, sink=writer, scan=known)
        )
        server = None
        if gdb is not None:
            server = stack.enter_context(
                GdbServer(gdb, run.machine.engine, run.debug_target(), progress.announce)
            )
        outcome = run.run(server)
        if known is None and not no_scan:
            known = _scan(plan, progress)
        result = run.result(outcome, known)
    if screen is not None and on_stdout:
        screen(b"\n")
    destination.write(BOOT_FORMATS[format_name](result, verbosity))
    if outcome.is_clean and result.screams:
        return ExitCode.FINDINGS
    return outcome.kind.exit_code


def _scan(plan: "BootPlan", progress: ProgressReport) -> "ScanResult":
    modules = plan.modules if plan.options.initrd is None else ()
    return scan_once(
        plan.files, modules, listfile.load(None), plan.image.build_id, progress.advance
    )


def _reproduce() -> str:
    return shlex.join(["trapline", *sys.argv[1:]])
