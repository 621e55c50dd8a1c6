"""What is said of a gate."""

from typing import TYPE_CHECKING, Final

from trapline.report.blocks import Gap, Heading, Paragraph
from trapline.report.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.report.blocks import Block
    from trapline.results.gate import GateCheck, GateItem, GateResult

_TOP: Final = 20


def page(result: "GateResult", verbosity: int = 0) -> "Iterator[Block]":
    """Yield the report's blocks; `verbosity` 1 lists all that fails."""
    release = result.release or "(no release)"
    yield Paragraph(f"{result.generator}: gate {result.policy} for Linux {release}")
    if result.build_id:
        yield Paragraph(f"build id {result.build_id}")
    if result.baseline is not None:
        yield Paragraph(f"baseline: {result.baseline}")
    yield Gap()
    for check in result.checks:
        yield Paragraph(f"{_outcome(check)}  {check.name}: {check.asks}{_known(check)}", hanging=8)
    for check in result.checks:
        if check.items:
            yield from _failed(check, verbosity)
    yield Gap()
    failed = sum(bool(check.items) for check in result.checks)
    if failed:
        yield Paragraph(f"FAILED: {failed} of {counted(len(result.checks), 'check')}.")
    else:
        yield Paragraph(f"Passed: {counted(len(result.checks), 'check')}.")


def _outcome(check: "GateCheck") -> str:
    return "failed" if check.items else "passed"


def _known(check: "GateCheck") -> str:
    said = []
    if check.known:
        said.append(f"{check.known:,} known")
    if check.settled:
        said.append(f"{check.settled:,} settled by labels")
    return f" ({', '.join(said)})" if said else ""


def _failed(check: "GateCheck", verbosity: int) -> "Iterator[Block]":
    yield Gap()
    yield Heading(f"{check.name}: {len(check.items):,}", 1)
    yield Gap()
    most = len(check.items) if verbosity else _TOP
    for item in check.items[:most]:
        yield Paragraph(_line(item), hanging=4)
    if most < len(check.items):
        yield Paragraph(f"{len(check.items) - most:,} more: -v lists all.")


def _line(item: "GateItem") -> str:
    whose = f" [{item.driver}]" if item.driver else ""
    label = "" if item.label is None else f" ({item.label.label}: {item.label.reason})"
    identity = f" id {item.id}" if item.id else ""
    return f"{item.text}{whose}{label}{identity}"
