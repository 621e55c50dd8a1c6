"""A campaign as KTAP, the kernel's test protocol: a test for each scenario, one for each run.

Source: Documentation/dev-tools/ktap.rst. The plain `#` lines are diagnostics.
"""

from typing import TYPE_CHECKING

from trapline.base.printable import encode_line, printable_ascii
from trapline.report.words import injected
from trapline.results.findings import findings, levels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.results.explore import ExploreResult, Result, Window
    from trapline.results.findings import Level


def render(result: "ExploreResult") -> "Iterator[bytes]":
    """Yield the lines, each with its newline."""
    for line in _lines(result):
        yield encode_line(line)


def _lines(result: "ExploreResult") -> "Iterator[str]":
    level = levels(findings(result))
    yield "KTAP version 1"
    yield f"# {injected(result.injected)}"
    yield f"1..{len(result.windows)}"
    for number, window in enumerate(result.windows, 1):
        runs = [one for one in result.results if one.scenario == window.scenario]
        yield "  KTAP version 1"
        yield f"  # Subtest: {window.scenario}"
        yield f"  1..{len(runs)}"
        for index, one in enumerate(runs, 1):
            yield f"  {_line(index, one, window, level.get(id(one)))}"
        failed = any(level.get(id(one)) == "error" for one in runs)
        yield f"{'not ok' if failed else 'ok'} {number} {window.scenario}"


def _line(index: int, one: "Result", window: "Window", level: "Level | None") -> str:
    boundary = window.boundaries[one.boundary]
    event = one.event if one.nested is None else f"{one.event}+{one.nested_at}:{one.nested}"
    # A "#" would begin a directive.
    name = f"{event}.{one.boundary}.{boundary.function}+{boundary.offset:x}".replace("#", "_")
    outcome = "not ok" if level == "error" else "ok"
    known = " # XFAIL no worse than the baseline" if level == "note" else ""
    return printable_ascii(f"{outcome} {index} {name.replace(' ', '_')} {one.verdict}{known}")
