"""One record for each kind of result: what it is, what its report says, and in which formats.

`trapline.cli` prints through it, `trapline schema` publishes what it names, and tests go through
all of them. A new command adds a document in `trapline.results`, a page in `report/pages`, what
is a finding in `trapline.results.findings`, and its record here.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from trapline.allowlist import listfile
from trapline.allowlist.entries import AllowList
from trapline.report import (
    boot_text,
    explore_text,
    filter_text,
    live_text,
    rules_text,
    text,
    tradeoff_text,
    verify_text,
)
from trapline.report.formats import csv_rows, json_document, ktap, rule_table, sarif
from trapline.report.formats.json_lines import Lines
from trapline.results.boot import BootResult
from trapline.results.explore import ExploreResult
from trapline.results.filter import FilterResult
from trapline.results.filter_live import LiveResult
from trapline.results.rules import RulesCompared, RulesExplained, RulesLinted, RulesShown
from trapline.results.scan import ScanResult
from trapline.results.tradeoff import TradeoffResult
from trapline.results.verify import VerifyResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

D = TypeVar("D")


@dataclass(frozen=True)
class Record(Generic[D]):
    """One kind of result.

    `command` is the command that has it, `document` its type, `schema` the name of its published
    JSON Schema. `page` says what a report of it says, at a verbosity. `lines` are the types of
    its JSON Lines, if it has that format; `formats` are those that not every result has.
    """

    command: str
    document: type[D]
    schema: str
    page: "Callable[[D, int], Iterator[bytes]]"
    lines: Lines | None = None
    formats: "Mapping[str, Callable[[D], Iterator[bytes]]]" = field(default_factory=dict)

    @property
    def format_names(self) -> tuple[str, ...]:
        """Name the formats, the default first."""
        own = (name for name in self.formats if name != "json")
        return ("text", "json", *(("jsonl",) if self.lines else ()), *own)

    def render(self, document: D, format_name: str, verbosity: int = 0) -> "Iterator[bytes]":
        """Yield the report in pieces; only text knows more than one verbosity.

        Raises KeyError for a format that is not among `format_names`.
        """
        if format_name == "text":
            return self.page(document, verbosity)
        if format_name in self.formats:
            return self.formats[format_name](document)
        if format_name == "json":
            return json_document.render(document)
        if format_name == "jsonl" and self.lines is not None:
            return self.lines.render(document)
        raise KeyError(format_name)


SCAN: Final = Record(
    "scan",
    ScanResult,
    "scan",
    text.render,
    Lines(ScanResult, {"sites": "site", "mappings": "mapping", "drivers": "driver"}),
    {"sarif": sarif.render, "csv": csv_rows.render},
)
BOOT: Final = Record("boot", BootResult, "boot", boot_text.render, formats={"csv": csv_rows.render})
EXPLORE: Final = Record(
    "explore",
    ExploreResult,
    "explore",
    explore_text.render,
    Lines(ExploreResult, {"windows": "window", "results": "run"}),
    {"ktap": ktap.render, "csv": csv_rows.render},
)
VERIFY: Final = Record(
    "verify",
    VerifyResult,
    "verify",
    verify_text.render,
    Lines(VerifyResult, {"findings": "finding", "refused": "refused"}),
    {"csv": csv_rows.render},
)
TRADEOFF: Final = Record("tradeoff", TradeoffResult, "tradeoff", tradeoff_text.render)
FILTER_CHECK: Final = Record("filter check", FilterResult, "filter", filter_text.render)
FILTER_LIVE: Final = Record("filter live", LiveResult, "filter-live", live_text.render)
RULES_SHOW: Final = Record(
    "rules show", RulesShown, "rules", rules_text.render_shown, formats={"csv": rule_table.render}
)
RULES_EXPLAIN: Final = Record(
    "rules explain", RulesExplained, "rules-explained", rules_text.render_explained
)
RULES_DIFF: Final = Record("rules diff", RulesCompared, "rules-diff", rules_text.render_compared)
RULES_LINT: Final = Record("rules lint", RulesLinted, "rules-linted", rules_text.render_problems)

#: All results, in the order in which a user meets the commands.
RECORDS: "Final[tuple[Record[Any], ...]]" = (
    SCAN,
    BOOT,
    EXPLORE,
    VERIFY,
    TRADEOFF,
    FILTER_CHECK,
    FILTER_LIVE,
    RULES_SHOW,
    RULES_EXPLAIN,
    RULES_DIFF,
    RULES_LINT,
)


def record_of(document: object) -> Record[Any]:
    """Give the record of a document; KeyError for what is no result."""
    return _BY_TYPE[type(document)]


_BY_TYPE: Final = {record.document: record for record in RECORDS}

#: The allow list is an input, so it has no schema of a result and no findings; it is shown too.
ALLOW_LIST: Final = Record(
    "filter show",
    AllowList,
    "allow-list",
    filter_text.render_list,
    formats={"json": lambda allow: json_document.render(listfile.document(allow))},
)
