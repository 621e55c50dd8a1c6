"""What is said of a scan.

First the answers to the questions trapline comes from, then tables, then, if asked, every site.
"""

from collections import Counter
from typing import TYPE_CHECKING

from trapline.report.blocks import Gap, Paragraph
from trapline.report.pages.said import said
from trapline.report.pages.scan_answers import answers
from trapline.report.pages.scan_listing import listing
from trapline.report.pages.scan_tables import tables
from trapline.report.pages.tally import VMLINUX, is_mmio
from trapline.report.words import counted
from trapline.results.findings import findings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.report.blocks import Block
    from trapline.results.scan import Kernel, ScanResult


def page(result: "ScanResult", verbosity: int = 0) -> "Iterator[Block]":
    """Yield the report's blocks. `verbosity` 1 adds every site, 2 its evidence."""
    yield from _head(result)
    yield from answers(result)
    yield from tables(result)
    if verbosity > 0:
        yield from listing(result, evidence=verbosity > 1)
    yield from _verdict(result)


def _head(result: "ScanResult") -> "Iterator[Block]":
    kernel = result.kernel
    yield Paragraph(f"{result.generator}: scan of Linux {kernel.release or '(no release)'}")
    if kernel.build_id:
        yield Paragraph(f"build id {kernel.build_id}")
    yield Paragraph(f"{_vmlinux(kernel)}, {counted(kernel.modules, 'module')}")
    yield Gap()
    if not result.coverage.complete:
        yield Paragraph(
            'INCOMPLETE: every number is a lower bound, and every "no" may be a "not seen": '
            'see "What this scan did not see".'
        )
        yield Gap()
    mmio = [site for site in result.sites if is_mmio(site)]
    builtin = sum(site.module == VMLINUX for site in mmio)
    forms = {
        form: sum(site.form == form for site in result.sites)
        for form in ("instruction", "paravirt", "call")
    }
    yield Paragraph(
        f"{counted(len(result.sites), 'place')} may trap to the host when this kernel runs as a "
        f"TD: {counted(forms['instruction'], 'instruction')}, "
        f"{counted(forms['paravirt'], 'paravirt call')} that hide one, "
        f"{counted(forms['call'], 'call')} of out-of-line accessors. MMIO: "
        f"{counted(builtin, 'instruction')} in vmlinux, {len(mmio) - builtin:,} in modules."
    )


def _vmlinux(kernel: "Kernel") -> str:
    if kernel.version is None and kernel.build_id is None:
        return "no vmlinux"
    return f"vmlinux {'with' if kernel.has_dwarf else 'without'} debug information"


def _verdict(result: "ScanResult") -> "Iterator[Block]":
    found = Counter(finding.kind for finding in findings(result) if not finding.settled)
    yield Gap()
    yield from said(result, result.labels)
    if not found:
        seen = "" if result.coverage.complete else " in what was seen"
        yield Paragraph(f"Policy: nothing found against it{seen}.")
        return
    yield Paragraph(
        f"Policy: {counted(found['refused-site'], 'site')} the #VE handler cannot emulate, "
        f"{counted(found['driver-not-allowed'], 'built-in driver')} outside the allow list that "
        "touch the host."
    )
