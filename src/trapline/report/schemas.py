"""The published JSON Schemas (draft 2020-12) of everything trapline writes and reads.

They are generated from the types that do the reading and writing; docs/schemas holds them as
files, and a test checks that those are current.
"""

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from trapline.allowlist import listfile
from trapline.base import encode
from trapline.report.records import RECORDS
from trapline.results import gate, labels

if TYPE_CHECKING:
    from collections.abc import Callable

    from trapline.report.formats.json_lines import Lines
    from trapline.report.records import Record

Schema = dict[str, Any]

_DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"


def _document(record: "Record[Any]") -> Schema:
    return {
        "$schema": _DRAFT,
        "title": f"trapline {record.command} --format json",
        **msgspec.json.schema(record.document),
    }


def _lines(record: "Record[Any]", lines: "Lines") -> Schema:
    types = (lines.head, *lines.parts.values())
    any_of, components = msgspec.json.schema_components(types, ref_template="#/$defs/{name}")
    return {
        "$schema": _DRAFT,
        "title": f"one line of trapline {record.command} --format jsonl",
        "anyOf": list(any_of),
        "$defs": components,
    }


def _builders() -> "dict[str, Callable[[], Schema]]":
    builders: dict[str, Callable[[], Schema]] = {
        "allow-list": listfile.schema,
        "gate-policy": gate.schema,
        "labels": labels.schema,
    }
    for record in RECORDS:
        builders[record.schema] = partial(_document, record)
        if record.lines is not None:
            builders[f"{record.schema}-lines"] = partial(_lines, record, record.lines)
    return builders


#: Name -> what builds the schema.
SCHEMAS: Final = _builders()


def render(name: str) -> bytes:
    """Give the schema of that name as indented UTF-8 with a final newline; KeyError if unknown."""
    schema = _told(SCHEMAS[name]())
    return msgspec.json.format(encode.json(schema), indent=2) + b"\n"


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
