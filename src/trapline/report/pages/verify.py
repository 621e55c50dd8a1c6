"""What is said of a verification: what was tried, what is wrong, what is refused."""

from typing import TYPE_CHECKING, Final

from trapline.report.blocks import Gap, Paragraph, Table, Term
from trapline.report.pages.said import said
from trapline.report.words import counted
from trapline.results.findings import findings
from trapline.results.verify import SEVERITY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.report.blocks import Block
    from trapline.results.verify import Finding, Kind, VerifyResult

_VERDICTS: Final = (
    "same",
    "flags",
    "different",
    "refused",
    "same-fault",
    "no-trap",
    "not-comparable",
)
_LEGEND: Final = (
    ("same", "the handler leaves what the processor leaves, and tells the host nothing more"),
    ("flags", "all is the same but a flag in RFLAGS"),
    ("different", "something else is not the same"),
    ("refused", "the handler gives up, with no effect and no call to the host"),
    ("same-fault", "the instruction faults, with and without a trap"),
    ("no-trap", "the CPU or the TDX module did it without a #VE"),
    ("not-comparable", "the engine cannot execute it; the handler refused it where it was asked"),
)
_MEANINGS: "Final[dict[Kind, str]]" = {
    "crash": "the guest does not survive it",
    "hang": "the guest does not come back from it",
    "not-refused": "the handler emulates what it cannot",
    "wrong-memory": "other memory contents than the processor leaves",
    "wrong-access": "another access to the device or host than the processor makes",
    "wrong-register": "another register value than the processor leaves",
    "stale-bits": "register bits that should have changed keep their old value",
    "from-host": "bits that the host must not choose come from it",
    "leak-to-host": "the host is given what is no operand",
    "wrong-exception": "another exception than the processor raises",
    "refused": "the handler refuses what it should emulate",
    "wrong-flags": "another flag in RFLAGS than the processor leaves",
}
_FORMS: Final = 6  # named in a finding before the rest is counted


def page(result: "VerifyResult", verbosity: int = 0) -> "Iterator[Block]":
    """Yield the report's blocks. `verbosity` 1 adds all forms and all that is refused."""
    yield from _head(result)
    yield from _tally(result)
    yield from _findings(result, verbosity)
    yield from _refused(result, verbosity)
    yield Gap()
    yield from _worse(result)
    found = [each for each in findings(result) if not each.settled]
    yield from said(result, result.labels)
    if found:
        yield Paragraph(
            f"{counted(len(found), 'cause')} for which the #VE handler and the "
            "processor do not agree."
        )
    else:
        yield Paragraph("The #VE handler does what the processor does, or refuses.")


def _worse(result: "VerifyResult") -> "Iterator[Block]":
    """Say what the baseline did not have."""
    worse = result.worse_than_baseline
    if worse is None:
        return
    if not worse:
        yield Paragraph("Nothing is worse than in the baseline.")
    by_id = {finding.id: finding for finding in result.findings}
    for each in worse:
        found = by_id[each.id]
        yield Paragraph(
            f"Worse than the baseline: {found.trap}, {found.kind}, {found.cause}: {each.why}.",
            hanging=4,
        )
    yield Gap()


def _head(result: "VerifyResult") -> "Iterator[Block]":
    kernel = result.kernel
    yield Paragraph(
        f"{result.generator}: the #VE handler of Linux {kernel.release or kernel.name}; "
        f"{counted(result.injected, 'injected event')}."
    )
    if kernel.build_id:
        yield Paragraph(f"build id {kernel.build_id}")
    yield Paragraph(
        f"{counted(result.cases, 'case')}, each run natively and as a trap; rules of TDX module "
        f"{result.module_version}; digest {result.digest}."
    )
    if result.injected:
        yield Paragraph(
            "Injected: #VEs made by hand for instructions that the engine cannot execute."
        )
    yield Gap()


def _tally(result: "VerifyResult") -> "Iterator[Block]":
    rows: tuple[tuple[str | int, ...], ...] = tuple(
        (trap, *(counts.get(verdict, 0) for verdict in _VERDICTS))
        for trap, counts in result.verdicts.items()
    )
    yield Table(("class", *_VERDICTS), rows)
    yield Gap()
    for verdict, text in _LEGEND:
        yield Term(verdict, text, indent=2, width=15)


def _findings(result: "VerifyResult", verbosity: int) -> "Iterator[Block]":
    number = 0
    for kind in SEVERITY:
        group = [finding for finding in result.findings if finding.kind == kind]
        if group:
            yield Gap()
            yield Paragraph(f"{kind.upper()}: {_MEANINGS[kind]}")
        for finding in group:
            number += 1
            yield Gap()
            yield from _finding(number, finding, verbosity)


def _finding(number: int, finding: "Finding", verbosity: int) -> "Iterator[Block]":
    yield Paragraph(f"{number:2}. {finding.trap}: {finding.cause}", hanging=4)
    names = finding.forms if verbosity else finding.forms[:_FORMS]
    more = len(finding.forms) - len(names)
    text = "; ".join(names) + (f"; and {more} more" if more else "")
    yield from _field("forms", text)
    yield from _field("example", f"{finding.instruction}   [{finding.bytes}]")
    if finding.circumstances:
        yield from _field("with", finding.circumstances)
    yield from _field("expected", finding.expected)
    yield from _field("got", finding.got)
    occurs = ""
    if finding.occurs is not None:
        occurs = f"; {counted(finding.occurs, 'site')} of the scan of this form"
    yield from _field("seen", f"{finding.cases:,} of {counted(finding.tried, 'case')}{occurs}")


def _field(name: str, text: str) -> "Iterator[Block]":
    yield Term(name, text, indent=4, width=9)


def _refused(result: "VerifyResult", verbosity: int) -> "Iterator[Block]":
    if not result.refused:
        return
    occurring = [form for form in result.refused if form.occurs]
    yield Gap()
    yield Paragraph(
        f"{counted(len(result.refused), 'form')} that the handler refuses always"
        + (f", {len(occurring)} of which the kernel has sites of." if result.scanned else ".")
    )
    if result.scanned:
        yield Paragraph(f"Sites are from a scan of {result.scanned}.")
    shown = result.refused if verbosity else result.refused[:0]
    rows = [(form.trap, form.form, form.instruction, form.occurs or 0) for form in shown]
    if rows:
        yield Gap()
        yield Table(("class", "form", "example", "sites"), tuple(rows))
    elif not verbosity:
        yield Paragraph("-v lists them.")
