"""`trapline verify`: what the #VE handler emulates, held against the processor."""

import os
from pathlib import Path

import click

from trapline.allowlist import listfile
from trapline.base.errors import ExitCode, NoDebugInfoError
from trapline.cli.options import (
    format_option,
    jobs_option,
    kernel_argument,
    output_option,
    verbose_option,
)
from trapline.cli.progress import ProgressReport
from trapline.guest.target import TargetSource
from trapline.kernel.elf.file import ElfFile
from trapline.kernel.find.locate import locate
from trapline.report.formats import VERIFY_FORMATS
from trapline.report.output import Destination
from trapline.results.verify import VerifiedKernel
from trapline.rules.tables import DEFAULT_VERSION, versions
from trapline.scan.stored import read_scan, require_same_kernel, scan_once
from trapline.verify.launch import initrd
from trapline.verify.occurs import Occurrences
from trapline.verify.rounds import Options, verify


@click.command("verify", short_help="Hold what the #VE handler emulates against the processor.")
@kernel_argument
@click.option(
    "--scan",
    "scan_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Count sites of each form in this scan (JSON); default: scan vmlinux, once, into the "
    "cache.",
)
@click.option("--no-scan", is_flag=True, help="Do not count sites in a scan.")
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    metavar="N",
    help="Beside one case for each form, run only so many, evenly spread.",
)
@click.option(
    "--module-version",
    type=click.Choice(versions()),
    default=DEFAULT_VERSION,
    show_default=True,
    help="Version of the TDX module whose rules apply.",
)
@jobs_option
@format_option(VERIFY_FORMATS)
@output_option
@verbose_option
def command(
    kernel: str,
    *,
    scan_file: Path | None,
    no_scan: bool,
    limit: int | None,
    module_version: str,
    jobs: int | None,
    format_name: str,
    output: Path | None,
    verbosity: int,
) -> int:
    """Run each instruction form that KERNEL's #VE handler takes upon itself twice, and compare.

    Once natively on plain memory, once as a trap through the kernel's own handler, from the same
    registers. Compared are registers, flags, memory, the accesses that the device sees, and
    every register that the handler passes to the host. KERNEL is as for `trapline scan`; its
    vmlinux with symbols is booted as a TD.

    Exits with 1 when handler and processor do not agree on something.
    """
    destination = Destination(output)
    known = None if scan_file is None else read_scan(scan_file)
    with ProgressReport("verified") as progress:
        files = locate(kernel, announce=progress.announce)
        if files.vmlinux is None:
            raise NoDebugInfoError(
                f"{kernel}: there is no vmlinux with symbols; install the kernel's debug package, "
                "or name one that deb: can fetch."
            )
        vmlinux = files.vmlinux.resolve()
        with ElfFile.open(vmlinux) as elf:
            build_id = elf.build_id
        if known is not None and scan_file is not None:
            require_same_kernel(known, scan_file, build_id)
        if known is None and not no_scan:
            progress.announce("scanning vmlinux, to know which forms it has")
            known = scan_once(files, (), listfile.load(None), build_id)
        source = TargetSource(
            kernel=kernel,
            vmlinux=vmlinux,
            initrd=initrd(),
            release=files.release,
            module_version=module_version,
        )
        result = verify(
            source,
            VerifiedKernel(name=kernel, release=files.release, build_id=build_id),
            Options(workers=jobs or len(os.sched_getaffinity(0)), limit=limit),
            None if known is None else Occurrences(known),
            progress.advance,
        )
    destination.write(VERIFY_FORMATS[format_name](result, verbosity))
    return ExitCode.FINDINGS if result.findings else ExitCode.CLEAN
