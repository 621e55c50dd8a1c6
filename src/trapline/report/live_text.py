"""A running machine held against an allow list, as a verdict table of 80 columns."""

from typing import TYPE_CHECKING

from trapline.report.table import counted, paragraph, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.results.filter_live import LiveResult


def render(result: "LiveResult", verbosity: int = 0) -> "Iterator[bytes]":
    """Yield the report line by line, UTF-8 encoded."""
    del verbosity
    for line in _lines(result):
        yield line.encode() + b"\n"


def _lines(result: "LiveResult") -> "Iterator[str]":
    kind = "a TD" if result.is_td else "no TD"
    yield from paragraph(f'This machine ({kind}) against the allow list "{result.title}".')
    yield ""
    rows = [(check.name, check.found, check.standing, check.why) for check in result.checks]
    yield from table(("question", "found", "verdict", "why"), rows)
    if result.devices:
        yield ""
        yield counted(len(result.devices), "device")
        yield from table(
            ("bus", "device", "driver", "listed as"),
            [(d.bus, d.name, d.driver or "-", d.allowed or "no") for d in result.devices],
        )
