"""A result as JSON Lines: all that is no list on the first line, then one part of a list per line.

The first line starts with the schema name and version. Every other line has a "type", which tells
of what list it is. Sorted as the document is, so that two results compare with `diff`.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Final

import msgspec

from trapline.base import encode
from trapline.results.document import Document, element

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Lines:
    """The lines of one kind of document; `lists` maps the fields that are lists to line types.

    The types of the lines are made of those of the document, so that their schema follows.
    """

    def __init__(self, document: type[Document], lists: "Mapping[str, str]") -> None:
        self._document: Final = document
        self._lists: Final = dict(lists)

    @cached_property
    def head(self) -> type[msgspec.Struct]:
        """The type of the first line."""
        fields = [
            (field.name, field.type)
            if field.default is msgspec.NODEFAULT
            else (field.name, field.type, field.default)
            for field in msgspec.structs.fields(self._document)
            if field.name not in self._lists
        ]
        return msgspec.defstruct(
            f"{self._document.__name__}Head",
            fields,
            bases=(Document,),
            namespace={"__doc__": "The first line."},
            rename={"schema_": "schema"},
            frozen=True,
            kw_only=True,
        )

    @cached_property
    def parts(self) -> "dict[str, type[msgspec.Struct]]":
        """The types of all other lines, by field."""
        return {
            name: _line(element(self._document, name), tag) for name, tag in self._lists.items()
        }

    def render(self, document: object) -> "Iterator[bytes]":
        """Yield one JSON object and a newline per line, UTF-8."""
        fields = {name: getattr(document, name) for name in self.head.__struct_fields__}
        yield encode.json(self.head(**fields)) + b"\n"
        for name, line in self.parts.items():
            for part in getattr(document, name):
                yield encode.json(line(**msgspec.structs.asdict(part))) + b"\n"


def _line(part: type[msgspec.Struct], tag: str) -> type[msgspec.Struct]:
    names = {field.name: field.encode_name for field in msgspec.structs.fields(part)}
    return msgspec.defstruct(
        f"{tag.title()}Line",
        [],
        bases=(part,),
        namespace={"__doc__": part.__doc__},
        tag_field="type",
        tag=tag,
        rename={name: written for name, written in names.items() if name != written},
        frozen=True,
        kw_only=True,
    )
