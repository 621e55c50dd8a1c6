"""Allow lists as TOML files: reading, validating, and the published JSON Schema.

    schema = "trapline/allow-list"
    version = 1
    title = "what our cloud offers"

    [[allow]]
    id = "1af4:1041"
    name = "virtio network card"
    note = "optional: why it is here"

The forms of `id` are described in `trapline.allowlist.entries`.
"""

from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec

from trapline.allowlist.entries import AllowEntry, AllowList, parse_id
from trapline.base import decode, files
from trapline.base.errors import BadInputFileError
from trapline.base.printable import printable
from trapline.results.document import Document

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA: Final = "trapline/allow-list"
VERSION: Final = 1
#: The list that applies when none is given.
DEFAULT: Final = "seed-2021"
# A list of every PCI vendor there is would be smaller than this.
_MAX_BYTES: Final = 1 << 20
_MAX_ENTRIES: Final = 4096
_LONGEST: Final = 300  # characters of a message about what a file holds
_ID_PATTERN: Final = (
    r"^([0-9a-f]{4}:([0-9a-f]{4}|\*)|class:([0-9a-f]{2}){1,3}|virtio:([0-9]{1,5}|\*))$"
)

_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class Entry(Document, frozen=True, kw_only=True):
    """One `[[allow]]` table."""

    id: Annotated[
        str,
        msgspec.Meta(
            max_length=32,
            description="vendor:device, vendor:*, class:CC[SS[PP]] in lower-case hexadecimal, "
            "or virtio:ID in decimal",
            extra_json_schema={"pattern": _ID_PATTERN},
        ),
    ]
    name: Annotated[_Text, msgspec.Meta(description="the device's true name")]
    note: Annotated[_Text | None, msgspec.Meta(description="what the name does not say")] = None


class ListFile(Document, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """A whole file."""

    schema_: Literal["trapline/allow-list"]
    version: Literal[1]
    title: Annotated[_Text, msgspec.Meta(description="what reports call the list")]
    allow: Annotated[tuple[Entry, ...], msgspec.Meta(max_length=_MAX_ENTRIES)]


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of an allow list."""
    document = msgspec.json.schema(ListFile)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "trapline allow list",
        **document,
    }


def document(allow: AllowList) -> ListFile:
    """Return a list as the file that `load` would read."""
    entries = tuple(Entry(id=e.id, name=e.name, note=e.note) for e in allow.entries)
    return ListFile(schema_=SCHEMA, version=VERSION, title=allow.title, allow=entries)


def load(path: "Path | None" = None) -> AllowList:
    """Read an allow list; without a path, the built-in one.

    Raises BadInputFileError: one sentence with the file, the entry and what is wrong with it.
    """
    if path is None:
        return _built_in(DEFAULT)
    return parse(files.read(path, limit=_MAX_BYTES, what="an allow list"), str(path))


@cache
def _built_in(name: str) -> AllowList:
    data = files.shipped("trapline.allowlist", f"lists/{name}.toml")
    return parse(data, f"built-in list {name}")


def parse(data: bytes, source: str) -> AllowList:
    """Validate the bytes of a list; `source` is what messages call it."""
    document = decode.toml(data, source)
    try:
        file = msgspec.convert(document, ListFile)
    except msgspec.ValidationError as error:
        raise BadInputFileError(f"{source}: {_explain(str(error), document)}.") from None
    seen: dict[str, int] = {}
    entries = tuple(
        _entry(entry, number, source, seen) for number, entry in enumerate(file.allow, 1)
    )
    return AllowList(file.title, source, entries)


def _entry(entry: Entry, number: int, source: str, seen: dict[str, int]) -> AllowEntry:
    try:
        pattern = parse_id(entry.id)
    except ValueError as error:
        raise BadInputFileError(f"{source}: entry {number}: id {entry.id!r} {error}.") from None
    if entry.id in seen:
        raise BadInputFileError(
            f"{source}: entry {number}: id {entry.id} is already entry {seen[entry.id]}."
        )
    seen[entry.id] = number
    return AllowEntry(entry.id, entry.name, entry.note, pattern)


def _explain(message: str, document: dict[str, Any]) -> str:
    """Turn msgspec's "Expected `str`, got `int` - at `$.allow[0].id`" into file terms."""
    what, _, where = printable(message)[:_LONGEST].partition(" - at `$")
    what = what.replace("Object missing required", "there is no").replace(
        "Object contains unknown", "there is an unknown"
    )
    where = where.rstrip("`").lstrip(".")
    if "schema" not in document:
        return f'has no schema line; an allow list starts with schema = "{SCHEMA}"'
    what = what[:1].lower() + what[1:]
    place, bracket, rest = where.partition("[")
    if place == "allow" and bracket:
        index, _, field = rest.partition("]")
        entry = f"entry {int(index) + 1}" if index.isdigit() else "an entry"
        return f"{entry}{': ' + field.lstrip('.') if field else ''}: {what}"
    return f"{where}: {what}" if where else what
