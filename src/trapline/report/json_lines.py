"""A scan as JSON Lines: what was scanned on the first line, then one finding per line.

The first line starts with the schema name and version and holds all that is not a list of
findings. Every other line has a "type": "site", "mapping" or "driver". Sorted as the document
is, so two scans of one kernel compare with `diff`.
"""

from typing import TYPE_CHECKING, Literal

import msgspec

from trapline.results.document import Document
from trapline.results.scan import (
    SCHEMA,
    VERSION,
    AllowedId,
    Coverage,
    Driver,
    Kernel,
    Mapping,
    ScanResult,
    Site,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


class HeadLine(Document, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """The first line."""

    schema_: Literal["trapline/scan"] = SCHEMA
    version: Literal[1] = VERSION
    generator: str
    kernel: Kernel
    allow: tuple[AllowedId, ...]
    coverage: Coverage
    counts: dict[str, int]


class SiteLine(Site, frozen=True, kw_only=True, tag_field="type", tag="site"):
    """A place that may trap."""


class MappingLine(Mapping, frozen=True, kw_only=True, tag_field="type", tag="mapping"):
    """A call that maps device memory."""


class DriverLine(Driver, frozen=True, kw_only=True, tag_field="type", tag="driver"):
    """A driver and what it touches."""


Line = SiteLine | MappingLine | DriverLine


def render(result: ScanResult) -> "Iterator[bytes]":
    """Yield one JSON object and a newline per line, UTF-8."""
    encoder = msgspec.json.Encoder()
    for line in _lines(result):
        yield encoder.encode(line) + b"\n"


def _lines(result: ScanResult) -> "Iterator[HeadLine | Line]":
    yield HeadLine(
        generator=result.generator,
        kernel=result.kernel,
        allow=result.allow,
        coverage=result.coverage,
        counts=result.counts,
    )
    for site in result.sites:
        yield SiteLine(**msgspec.structs.asdict(site))
    for mapping in result.mappings:
        yield MappingLine(**msgspec.structs.asdict(mapping))
    for driver in result.drivers:
        yield DriverLine(**msgspec.structs.asdict(driver))
