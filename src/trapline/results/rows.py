"""Parts of a document as flat rows, for a data frame or a CSV file."""

from typing import TYPE_CHECKING

import msgspec

from trapline.base import encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.results.document import Document

Cell = str | int | float | bool | None
#: A row; the keys are those of the JSON document, those of a part within a part with a dot.
Row = dict[str, Cell]


def rows_of(parts: "Iterable[Document]") -> list[Row]:
    """Return a flat row for each part; all of one type have the same keys in the same order."""
    return [flat(part) for part in parts]


def flat(part: "Document") -> Row:
    """Return a part as one row.

    Lists become texts, joined by "; ". A part within it becomes its `summary()` if it has one,
    else cells of its own; what is left, such as a mapping, is JSON.
    """
    return dict(_cells(part, ""))


def columns_of(kind: "type[Document]", prefix: str = "") -> tuple[str, ...]:
    """Return the keys of the rows that parts of this type give."""
    columns: list[str] = []
    for field in msgspec.structs.fields(kind):
        name = prefix + field.encode_name
        if _has_cells_of_its_own(field.type):
            columns += columns_of(field.type, f"{name}.")
        else:
            columns.append(name)
    return tuple(columns)


def _has_cells_of_its_own(kind: object) -> bool:
    return (
        isinstance(kind, type) and issubclass(kind, msgspec.Struct) and not hasattr(kind, "summary")
    )


def _cells(part: "Document", prefix: str) -> "Iterator[tuple[str, Cell]]":
    for field, written in zip(part.__struct_fields__, part.__struct_encode_fields__, strict=True):
        name, value = prefix + written, getattr(part, field)
        if _has_cells_of_its_own(type(value)):
            yield from _cells(value, f"{name}.")
        elif value is None or isinstance(value, str | int | float):
            yield name, value
        elif isinstance(value, tuple):
            yield name, "; ".join(map(_text, value))
        else:
            yield name, _text(value)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    summary = getattr(value, "summary", None)
    if summary is not None:
        return str(summary())
    return encode.json(value).decode()
