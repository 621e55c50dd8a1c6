"""A campaign as JSON Lines: what was done on the first line, then one window or run per line.

The first line starts with the schema name and version, and holds all that is not a list. Every
other line has a "type": "window" or "run".
"""

from typing import TYPE_CHECKING, Literal

import msgspec

from trapline.results.document import Document
from trapline.results.explore import SCHEMA, VERSION, ExploreResult, NotOpened, Result, Window

if TYPE_CHECKING:
    from collections.abc import Iterator


class ExploreHead(Document, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """The first line."""

    schema_: Literal["trapline/explore"] = SCHEMA
    version: Literal[1] = VERSION
    generator: str
    injected: int
    kernel: str
    build_id: str | None
    module_version: str
    beyond_rules: bool
    not_opened: tuple[NotOpened, ...]
    counts: dict[str, dict[str, int]]
    worse_than_baseline: tuple[str, ...] | None


class WindowLine(Window, frozen=True, kw_only=True, tag_field="type", tag="window"):
    """A window."""


class RunLine(Result, frozen=True, kw_only=True, tag_field="type", tag="run"):
    """A run."""


def render(result: ExploreResult) -> "Iterator[bytes]":
    """Yield one JSON object and a newline per line, UTF-8."""
    encoder = msgspec.json.Encoder()
    for line in _lines(result):
        yield encoder.encode(line) + b"\n"


def _lines(result: ExploreResult) -> "Iterator[ExploreHead | WindowLine | RunLine]":
    lists = {"schema_", "version", "windows", "results"}
    fields = msgspec.structs.asdict(result)
    yield ExploreHead(**{name: value for name, value in fields.items() if name not in lists})
    for window in result.windows:
        yield WindowLine(**msgspec.structs.asdict(window))
    for one in result.results:
        yield RunLine(**msgspec.structs.asdict(one))
