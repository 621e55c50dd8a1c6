"""A verification as JSON Lines: what was tried on the first line, then one finding or form a line.

The first line starts with the schema name and version, and holds all that is not a list. Every
other line has a "type": "finding" or "refused".
"""

from typing import TYPE_CHECKING, Literal

import msgspec

from trapline.results.document import Document
from trapline.results.verify import (
    SCHEMA,
    VERSION,
    Finding,
    Refused,
    VerifiedKernel,
    VerifyResult,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


class VerifyHead(Document, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """The first line."""

    schema_: Literal["trapline/verify"] = SCHEMA
    version: Literal[1] = VERSION
    generator: str
    kernel: VerifiedKernel
    module_version: str
    cases: int
    injected: int
    verdicts: dict[str, dict[str, int]]
    scanned: str | None
    digest: str


class FindingLine(
    Finding,
    frozen=True,
    kw_only=True,
    tag_field="type",
    tag="finding",
    rename={"trap": "class"},
):
    """A finding."""


class RefusedLine(
    Refused,
    frozen=True,
    kw_only=True,
    tag_field="type",
    tag="refused",
    rename={"trap": "class"},
):
    """A form that is refused."""


def render(result: VerifyResult) -> "Iterator[bytes]":
    """Yield one JSON object and a newline per line, UTF-8."""
    encoder = msgspec.json.Encoder()
    for line in _lines(result):
        yield encoder.encode(line) + b"\n"


def _lines(result: VerifyResult) -> "Iterator[VerifyHead | FindingLine | RefusedLine]":
    lists = {"schema_", "version", "findings", "refused"}
    fields = msgspec.structs.asdict(result)
    yield VerifyHead(**{name: value for name, value in fields.items() if name not in lists})
    for finding in result.findings:
        yield FindingLine(**msgspec.structs.asdict(finding))
    for form in result.refused:
        yield RefusedLine(**msgspec.structs.asdict(form))
