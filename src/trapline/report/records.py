"""One record for each kind of result: what it is, what its report says, and in which formats.

`trapline.cli` prints through it, `trapline schema` publishes what it names, and tests go through
all of them. A new command adds a document in `trapline.results`, a page in `report/pages`, what
is a finding in `trapline.results.findings`, and its record here.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from trapline.allowlist import listfile
from trapline.allowlist.entries import AllowList
from trapline.report.formats import (
    csv_rows,
    gate_ktap,
    json_document,
    ktap,
    rule_table,
    sarif,
    sarif_contexts,
    text,
)
from trapline.report.formats.json_lines import Lines
from trapline.report.formats.page import Part, render_page
from trapline.report.pages import (
    allow_list,
    boot,
    contexts,
    diff,
    explore,
    filter_check,
    filter_live,
    gate,
    labels,
    rules_compared,
    rules_explained,
    rules_linted,
    rules_shown,
    scan,
    tradeoff,
    verify,
)
from trapline.results.boot import BootResult
from trapline.results.contexts import ContextsResult
from trapline.results.diff import DiffResult
from trapline.results.document import ResultDocument
from trapline.results.explore import ExploreResult
from trapline.results.filter import FilterResult
from trapline.results.filter_live import LiveResult
from trapline.results.findings import findings
from trapline.results.gate import GateResult
from trapline.results.labels import LabelList
from trapline.results.rules import RulesCompared, RulesExplained, RulesLinted, RulesShown
from trapline.results.scan import ScanResult
from trapline.results.tradeoff import TradeoffResult
from trapline.results.verify import VerifyResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from trapline.report.blocks import Block

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
    page: "Callable[[D, int], Iterator[Block]]"
    lines: Lines | None = None
    formats: "Mapping[str, Callable[[D], Iterator[bytes]]]" = field(default_factory=dict)

    @property
    def format_names(self) -> tuple[str, ...]:
        """Name the formats, the default first."""
        own = (name for name in self.formats if name != "json")
        has_page = issubclass(self.document, ResultDocument)
        return (
            "text",
            "json",
            *(("html",) if has_page else ()),
            *(("jsonl",) if self.lines else ()),
            *own,
        )

    def part(self, document: D, verbosity: int = 0) -> Part:
        """Make a document into a part of an HTML page."""
        assert isinstance(document, ResultDocument)
        blocks = tuple(self.page(document, verbosity))
        return Part(self.command, blocks, document, findings(document))

    def render(self, document: D, format_name: str, verbosity: int = 0) -> "Iterator[bytes]":
        """Yield the report in pieces; only text knows more than one verbosity.

        Raises KeyError for a format that is not among `format_names`.
        """
        if format_name == "text":
            return text.render(self.page(document, verbosity))
        if format_name in self.formats:
            return self.formats[format_name](document)
        if format_name == "json":
            return json_document.render(document)
        if format_name == "html" and isinstance(document, ResultDocument):
            part = self.part(document, verbosity)
            return render_page(part.headline, [part])
        if format_name == "jsonl" and self.lines is not None:
            return self.lines.render(document)
        raise KeyError(format_name)


SCAN: Final = Record(
    "scan",
    ScanResult,
    "scan",
    scan.page,
    Lines(ScanResult, {"sites": "site", "mappings": "mapping", "drivers": "driver"}),
    {"sarif": sarif.render, "csv": csv_rows.render},
)
BOOT: Final = Record("boot", BootResult, "boot", boot.page, formats={"csv": csv_rows.render})
EXPLORE: Final = Record(
    "explore",
    ExploreResult,
    "explore",
    explore.page,
    Lines(ExploreResult, {"windows": "window", "results": "run", "footprints": "footprint"}),
    {"ktap": ktap.render, "csv": csv_rows.render},
)
VERIFY: Final = Record(
    "verify",
    VerifyResult,
    "verify",
    verify.page,
    Lines(VerifyResult, {"findings": "finding", "refused": "refused"}),
    {"csv": csv_rows.render},
)
CONTEXTS: Final = Record(
    "contexts",
    ContextsResult,
    "contexts",
    contexts.page,
    Lines(ContextsResult, {"gaps": "gap", "reach": "reach"}),
    {"sarif": sarif_contexts.render},
)
TRADEOFF: Final = Record("tradeoff", TradeoffResult, "tradeoff", tradeoff.page)
FILTER_CHECK: Final = Record("filter check", FilterResult, "filter", filter_check.page)
FILTER_LIVE: Final = Record("filter live", LiveResult, "filter-live", filter_live.page)
DIFF: Final = Record("diff", DiffResult, "diff", diff.page, formats={"csv": csv_rows.render})
GATE: Final = Record("gate", GateResult, "gate", gate.page, formats={"ktap": gate_ktap.render})
LABELS: Final = Record("label list", LabelList, "label-list", labels.page)
RULES_SHOW: Final = Record(
    "rules show", RulesShown, "rules", rules_shown.page, formats={"csv": rule_table.render}
)
RULES_EXPLAIN: Final = Record(
    "rules explain", RulesExplained, "rules-explained", rules_explained.page
)
RULES_DIFF: Final = Record("rules diff", RulesCompared, "rules-diff", rules_compared.page)
RULES_LINT: Final = Record("rules lint", RulesLinted, "rules-linted", rules_linted.page)

#: All results, in the order in which a user meets the commands.
RECORDS: "Final[tuple[Record[Any], ...]]" = (
    SCAN,
    BOOT,
    EXPLORE,
    VERIFY,
    CONTEXTS,
    TRADEOFF,
    FILTER_CHECK,
    FILTER_LIVE,
    DIFF,
    GATE,
    LABELS,
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
    allow_list.page,
    formats={"json": lambda allow: json_document.render(listfile.document(allow))},
)
