"""A gate as KTAP, the kernel's test protocol: a test for each check, a line for each that fails.

Source: Documentation/dev-tools/ktap.rst, version 1.
"""

from typing import TYPE_CHECKING

from trapline.base.printable import encode_line, printable_ascii

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.results.gate import GateResult


def render(result: "GateResult") -> "Iterator[bytes]":
    """Yield the lines, each with its newline."""
    for line in _lines(result):
        yield encode_line(line)


def _lines(result: "GateResult") -> "Iterator[str]":
    yield "KTAP version 1"
    yield printable_ascii(f"# {result.generator} {result.release or result.kernel}")
    yield f"1..{len(result.checks)}"
    for number, check in enumerate(result.checks, 1):
        for item in check.items:
            yield printable_ascii(f"# {check.name}: {item.text} {item.id}".rstrip())
        yield f"{'not ok' if check.items else 'ok'} {number} trapline.{check.name}"
