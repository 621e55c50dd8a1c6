"""A verification as plain text, 80 columns: what was tried, what is wrong, what is refused."""

from typing import TYPE_CHECKING, Final

from trapline.report.table import counted, paragraph, table
from trapline.results.verify import SEVERITY

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def render(result: "VerifyResult", verbosity: int = 0) -> "Iterator[bytes]":
    """Yield the report line by line. `verbosity` 1 adds all forms and all that is refused."""
    for line in _lines(result, verbosity):
        yield line.encode("ascii") + b"\n"


def _lines(result: "VerifyResult", verbosity: int) -> "Iterator[str]":
    yield from _head(result)
    yield from _tally(result)
    yield from _findings(result, verbosity)
    yield from _refused(result, verbosity)
    yield ""
    if result.findings:
        yield from paragraph(
            f"{counted(len(result.findings), 'cause')} for which the #VE handler and the "
            "processor do not agree."
        )
    else:
        yield from paragraph("The #VE handler does what the processor does, or refuses.")


def _head(result: "VerifyResult") -> "Iterator[str]":
    kernel = result.kernel
    yield from paragraph(
        f"{result.generator}: the #VE handler of Linux {kernel.release or kernel.name}; "
        f"{counted(result.injected, 'injected event')}."
    )
    if kernel.build_id:
        yield from paragraph(f"build id {kernel.build_id}")
    yield from paragraph(
        f"{counted(result.cases, 'case')}, each run natively and as a trap; rules of TDX module "
        f"{result.module_version}; digest {result.digest}."
    )
    if result.injected:
        yield from paragraph(
            "Injected: #VEs made by hand for instructions that the engine cannot execute."
        )
    yield ""


def _tally(result: "VerifyResult") -> "Iterator[str]":
    rows: list[tuple[str | int, ...]] = [
        (trap, *(counts.get(verdict, 0) for verdict in _VERDICTS))
        for trap, counts in result.verdicts.items()
    ]
    yield from table(("class", *_VERDICTS), rows)
    yield ""
    for verdict, text in _LEGEND:
        yield from paragraph(f"{verdict:15}{text}", indent="  ", hanging=" " * 17)


def _findings(result: "VerifyResult", verbosity: int) -> "Iterator[str]":
    number = 0
    for kind in SEVERITY:
        group = [finding for finding in result.findings if finding.kind == kind]
        if group:
            yield ""
            yield from paragraph(f"{kind.upper()}: {_MEANINGS[kind]}")
        for finding in group:
            number += 1
            yield ""
            yield from _finding(number, finding, verbosity)


def _finding(number: int, finding: "Finding", verbosity: int) -> "Iterator[str]":
    yield from paragraph(f"{number:2}. {finding.trap}: {finding.cause}", hanging="    ")
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
    yield from _field("seen", counted(finding.cases, "case") + occurs)


def _field(name: str, text: str) -> "Iterator[str]":
    yield from paragraph(f"{name:9}{text}", indent="    ", hanging=" " * 13)


def _refused(result: "VerifyResult", verbosity: int) -> "Iterator[str]":
    if not result.refused:
        return
    occurring = [form for form in result.refused if form.occurs]
    yield ""
    yield from paragraph(
        f"{counted(len(result.refused), 'form')} that the handler refuses always"
        + (f", {len(occurring)} of which the kernel has sites of." if result.scanned else ".")
    )
    if result.scanned:
        yield from paragraph(f"Sites are from a scan of {result.scanned}.")
    shown = result.refused if verbosity else result.refused[:0]
    rows = [(form.trap, form.form, form.instruction, form.occurs or 0) for form in shown]
    if rows:
        yield ""
        yield from table(("class", "form", "example", "sites"), rows)
    elif not verbosity:
        yield from paragraph("-v lists them.")
