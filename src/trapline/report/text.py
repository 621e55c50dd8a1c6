"""A scan as plain text, 80 columns, ready to be pasted into a mail.

First the answers to the questions trapline comes from, then tables, then, if asked, every site.
It is ASCII without escape sequences wherever it goes.
"""

from collections import Counter
from typing import TYPE_CHECKING

from trapline.report.answers import answers
from trapline.report.listing import listing
from trapline.report.overview import tables
from trapline.report.table import counted, paragraph
from trapline.report.tally import VMLINUX, is_mmio
from trapline.results.findings import findings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.results.scan import Kernel, ScanResult


def render(result: "ScanResult", verbosity: int = 0) -> "Iterator[bytes]":
    """Yield the report line by line. `verbosity` 1 adds every site, 2 its evidence."""
    for line in lines(result, verbosity):
        yield line.encode("ascii") + b"\n"


def lines(result: "ScanResult", verbosity: int = 0) -> "Iterator[str]":
    """Yield the report's lines, none longer than 80 characters."""
    yield from _head(result)
    yield from answers(result)
    yield from tables(result)
    if verbosity > 0:
        yield from listing(result, evidence=verbosity > 1)
    yield from _verdict(result)


def _head(result: "ScanResult") -> "Iterator[str]":
    kernel = result.kernel
    yield from paragraph(f"{result.generator}: scan of Linux {kernel.release or '(no release)'}")
    if kernel.build_id:
        yield from paragraph(f"build id {kernel.build_id}")
    yield from paragraph(f"{_vmlinux(kernel)}, {counted(kernel.modules, 'module')}")
    yield ""
    if not result.coverage.complete:
        yield from paragraph(
            'INCOMPLETE: every number is a lower bound, and every "no" may be a "not seen": '
            'see "What this scan did not see".'
        )
        yield ""
    mmio = [site for site in result.sites if is_mmio(site)]
    builtin = sum(site.module == VMLINUX for site in mmio)
    forms = {
        form: sum(site.form == form for site in result.sites)
        for form in ("instruction", "paravirt", "call")
    }
    yield from paragraph(
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


def _verdict(result: "ScanResult") -> "Iterator[str]":
    found = Counter(finding.kind for finding in findings(result))
    yield ""
    if not found:
        seen = "" if result.coverage.complete else " in what was seen"
        yield from paragraph(f"Policy: nothing found against it{seen}.")
        return
    yield from paragraph(
        f"Policy: {counted(found['refused-site'], 'site')} the #VE handler cannot emulate, "
        f"{counted(found['driver-not-allowed'], 'built-in driver')} outside the allow list that "
        "touch the host."
    )
