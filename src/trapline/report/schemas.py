"""The published JSON Schemas (draft 2020-12) of everything trapline writes and reads.

They are generated from the types that do the reading and writing; docs/schemas holds them as
files, and a test checks that those are current.
"""

import inspect
from typing import TYPE_CHECKING, Any, Final

import msgspec

from trapline.allowlist import listfile
from trapline.report.explore_lines import ExploreHead, RunLine, WindowLine
from trapline.report.json_lines import DriverLine, HeadLine, MappingLine, SiteLine
from trapline.report.verify_lines import FindingLine, RefusedLine, VerifyHead
from trapline.results.boot import BootResult
from trapline.results.explore import ExploreResult
from trapline.results.filter import FilterResult
from trapline.results.filter_live import LiveResult
from trapline.results.rules import RulesCompared, RulesExplained, RulesShown
from trapline.results.scan import ScanResult
from trapline.results.tradeoff import TradeoffResult
from trapline.results.verify import VerifyResult

if TYPE_CHECKING:
    from collections.abc import Callable

Schema = dict[str, Any]

_DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"


def _boot() -> Schema:
    return {
        "$schema": _DRAFT,
        "title": "trapline boot --format json",
        **msgspec.json.schema(BootResult),
    }


def _explore() -> Schema:
    return {
        "$schema": _DRAFT,
        "title": "trapline explore --format json",
        **msgspec.json.schema(ExploreResult),
    }


def _explore_lines() -> Schema:
    lines = (ExploreHead, WindowLine, RunLine)
    any_of, components = msgspec.json.schema_components(lines, ref_template="#/$defs/{name}")
    return {
        "$schema": _DRAFT,
        "title": "one line of trapline explore --format jsonl",
        "anyOf": list(any_of),
        "$defs": components,
    }


def _filter() -> Schema:
    return {
        "$schema": _DRAFT,
        "title": "trapline filter check --format json",
        **msgspec.json.schema(FilterResult),
    }


def _tradeoff() -> Schema:
    return {
        "$schema": _DRAFT,
        "title": "trapline tradeoff --format json",
        **msgspec.json.schema(TradeoffResult),
    }


def _live() -> Schema:
    return {
        "$schema": _DRAFT,
        "title": "trapline filter live --format json",
        **msgspec.json.schema(LiveResult),
    }


def _rules() -> Schema:
    return {
        "$schema": _DRAFT,
        "title": "trapline rules show --format json",
        **msgspec.json.schema(RulesShown),
    }


def _rules_diff() -> Schema:
    return {
        "$schema": _DRAFT,
        "title": "trapline rules diff --format json",
        **msgspec.json.schema(RulesCompared),
    }


def _rules_explained() -> Schema:
    return {
        "$schema": _DRAFT,
        "title": "trapline rules explain --format json",
        **msgspec.json.schema(RulesExplained),
    }


def _scan() -> Schema:
    return {
        "$schema": _DRAFT,
        "title": "trapline scan --format json",
        **msgspec.json.schema(ScanResult),
    }


def _scan_lines() -> Schema:
    lines = (HeadLine, SiteLine, MappingLine, DriverLine)
    any_of, components = msgspec.json.schema_components(lines, ref_template="#/$defs/{name}")
    return {
        "$schema": _DRAFT,
        "title": "one line of trapline scan --format jsonl",
        "anyOf": list(any_of),
        "$defs": components,
    }


def _verify() -> Schema:
    return {
        "$schema": _DRAFT,
        "title": "trapline verify --format json",
        **msgspec.json.schema(VerifyResult),
    }


def _verify_lines() -> Schema:
    lines = (VerifyHead, FindingLine, RefusedLine)
    any_of, components = msgspec.json.schema_components(lines, ref_template="#/$defs/{name}")
    return {
        "$schema": _DRAFT,
        "title": "one line of trapline verify --format jsonl",
        "anyOf": list(any_of),
        "$defs": components,
    }


#: Name -> what builds the schema.
SCHEMAS: "Final[dict[str, Callable[[], Schema]]]" = {
    "allow-list": listfile.schema,
    "boot": _boot,
    "explore": _explore,
    "explore-lines": _explore_lines,
    "filter": _filter,
    "filter-live": _live,
    "tradeoff": _tradeoff,
    "rules": _rules,
    "rules-diff": _rules_diff,
    "rules-explained": _rules_explained,
    "scan": _scan,
    "scan-lines": _scan_lines,
    "verify": _verify,
    "verify-lines": _verify_lines,
}


def render(name: str) -> bytes:
    """Give the schema of that name as indented UTF-8 with a final newline; KeyError if unknown."""
    schema = _told(SCHEMAS[name]())
    return msgspec.json.format(msgspec.json.encode(schema), indent=2) + b"\n"


def _told(node: Any) -> Any:  # noqa: ANN401 - any part of a schema
    """Take the indentation off descriptions, which are docstrings; Python 3.13 has done so."""
    if isinstance(node, list | tuple):
        return [_told(item) for item in node]
    if isinstance(node, dict):
        return {
            key: inspect.cleandoc(value)
            if key == "description" and isinstance(value, str)
            else _told(value)
            for key, value in node.items()
        }
    return node
