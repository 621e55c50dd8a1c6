"""What is said of a running machine held against an allow list."""

from typing import TYPE_CHECKING

from trapline.report.blocks import Gap, Heading, Paragraph, Table
from trapline.report.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.report.blocks import Block
    from trapline.results.filter_live import LiveResult


def page(result: "LiveResult", verbosity: int = 0) -> "Iterator[Block]":
    """Yield the report's blocks."""
    del verbosity
    kind = "a TD" if result.is_td else "no TD"
    yield Paragraph(f'This machine ({kind}) against the allow list "{result.title}".')
    yield Gap()
    rows = tuple((check.name, check.found, check.standing, check.why) for check in result.checks)
    yield Table(("question", "found", "verdict", "why"), rows)
    if result.devices:
        yield Gap()
        yield Heading(counted(len(result.devices), "device"))
        yield Table(
            ("bus", "device", "driver", "listed as"),
            tuple((d.bus, d.name, d.driver or "-", d.allowed or "no") for d in result.devices),
        )
