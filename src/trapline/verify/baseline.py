"""Which findings an earlier verification did not have, or had smaller.

A finding is known by its class, kind and cause; or, where something else has changed what its cause
is told from, by the same example that fails in the same way. A regression that fails like a known
finding makes that finding larger: by instruction forms, or by the share of its cases that fail.
"""

from pathlib import Path
from typing import Final

from trapline.base import decode, files
from trapline.results.verify import Finding, VerifyResult, Worse

_MAX_DOCUMENT: Final = 64 << 20
# The cases that are tried depend a little on what the handler accepts.
_TOLERANCE: Final = 0.01


def load(path: Path) -> VerifyResult:
    """Read an earlier result (JSON). Raises BadInputFileError."""
    what = "a result of trapline verify"
    return decode.json(
        files.read(path, limit=_MAX_DOCUMENT, what=what), VerifyResult, str(path), what
    )


def worse(before: VerifyResult, now: VerifyResult) -> tuple[Worse, ...]:
    """List what is new or has grown, in the order of the findings."""
    there = {finding.id for finding in now.findings}
    known = {finding.id: finding for finding in before.findings}
    gone = {_example(each): each for each in before.findings if each.id not in there}
    found = (
        (finding, _why(known.get(finding.id) or gone.get(_example(finding)), finding))
        for finding in now.findings
    )
    return tuple(Worse(id=finding.id, why=why) for finding, why in found if why)


def _example(finding: Finding) -> tuple[str, ...]:
    """Tell findings of one symptom apart, however their cause is told."""
    return (
        finding.trap, finding.kind, finding.bytes, finding.circumstances,
        finding.expected, finding.got,
    )  # fmt: skip


def _why(before: Finding | None, now: Finding) -> str:
    """Say in which way a finding is worse; empty if it is not."""
    if before is None:
        return "new"
    forms = [form for form in now.forms if form not in before.forms]
    if forms:
        return f"fails with {len(forms)} more forms, such as {forms[0]}"
    if now.cases / max(now.tried, 1) > before.cases / max(before.tried, 1) + _TOLERANCE:
        return f"fails {now.cases} of {now.tried} times, not {before.cases} of {before.tried}"
    return ""
