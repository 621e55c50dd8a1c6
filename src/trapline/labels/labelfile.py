"""Files of labels: read and checked, added to, and written anew."""

from typing import TYPE_CHECKING, Final

from trapline.base import decode, encode, files
from trapline.base.errors import BadInputFileError
from trapline.results.labels import SCHEMA, VERSION, KnownPlace, LabelEntry, LabelFile

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_MOST: Final = 64 << 20  # bytes
#: What an entry fits findings by.
MATCHERS: Final = ("id", "function", "file", "driver", "subsystem", "trap", "gate")
_HEAD: Final = f'schema = "{SCHEMA}"\nversion = {VERSION}\n'
_FIELDS: Final = ("label", "reason", "owner", "date", *MATCHERS, "kernel", "carried")


def load(path: "Path") -> tuple[LabelEntry, ...]:
    """Read a file of labels.

    Raises BadInputFileError: one sentence with the file, the entry and what is wrong with it.
    """
    return parse(files.read(path, limit=_MOST, what="a file of labels"), str(path))


def parse(data: bytes, source: str) -> tuple[LabelEntry, ...]:
    """Validate the bytes of a file; `source` is what messages call it."""
    document = decode.toml(data, source)
    if document.get("schema") != SCHEMA:
        raise BadInputFileError(
            f'{source}: is no file of labels; one starts with schema = "{SCHEMA}".'
        )
    entries = decode.convert(document, LabelFile, source).label
    seen: dict[tuple[str | None, ...], int] = {}
    for number, entry in enumerate(entries, 1):
        fits = matchers(entry)
        if not any(fits):
            raise BadInputFileError(
                f"{source}: label {number} fits nothing; give it an id, function, file, driver, "
                "subsystem, class or gate."
            )
        first = seen.setdefault(fits, number)
        if first == number:
            continue
        how = "contradicts" if entries[first - 1].label != entry.label else "repeats"
        raise BadInputFileError(f"{source}: label {number} {how} label {first}; take one out.")
    return entries


def matchers(entry: LabelEntry) -> tuple[str | None, ...]:
    """Give what an entry fits findings by, in the order of MATCHERS."""
    return tuple(getattr(entry, name) for name in MATCHERS)


def describe(entry: LabelEntry) -> str:
    """Say in words what an entry fits."""
    names = ("class" if name == "trap" else name for name in MATCHERS)
    said = zip(names, matchers(entry), strict=True)
    return ", ".join(f"{name} {value}" for name, value in said if value is not None)


def write(path: "Path", entries: "Iterable[LabelEntry]") -> None:
    """Write a file of labels, whole or not at all."""
    files.write_whole(path, [_HEAD.encode(), *(text(entry).encode() for entry in entries)])


def append(path: "Path", entries: "Iterable[LabelEntry]") -> None:
    """Add to a file, which keeps its comments and order; it is made if it is not there.

    Raises BadInputFileError, and leaves the file as it was, where the result would be unsound.
    """
    try:
        before = files.read(path, limit=_MOST, what="a file of labels") if path.exists() else b""
    except OSError as error:
        raise BadInputFileError(f"{path}: cannot be read: {files.why(error)}.") from None
    if before:
        parse(before, str(path))
    after = (before.rstrip(b"\n") + b"\n" if before else _HEAD.encode()) + b"".join(
        text(entry).encode() for entry in entries
    )
    parse(after, str(path))
    files.write_whole(path, [after])


def text(entry: LabelEntry) -> str:
    """Write one entry as TOML, a blank line before it."""
    return "\n".join(("", "[[label]]", *_lines(entry), ""))


def _lines(entry: LabelEntry) -> "Iterator[str]":
    for name in _FIELDS:
        value = getattr(entry, name)
        if value is not None:
            yield f"{'class' if name == 'trap' else name} = {_value(value)}"
    if entry.place is not None:
        known = ((name, getattr(entry.place, name)) for name in KnownPlace.__struct_fields__)
        inner = ", ".join(f"{name} = {_value(value)}" for name, value in known if value is not None)
        yield f"place = {{ {inner} }}"


def _value(value: "str | dt.date") -> str:
    if not isinstance(value, str):
        return value.isoformat()
    return encode.toml_text(value)
