"""The base of every result document."""

from typing import ClassVar, get_args

import msgspec

from trapline.results.rows import Row, columns_of, rows_of


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of everything that is written out: immutable, and strict when read back."""


class ResultDocument(Document, frozen=True, kw_only=True):
    """What one command found out; the only contract between finding out and showing.

    `lists` names the fields whose parts make rows, the one that `rows()` gives by itself first.
    """

    lists: ClassVar[tuple[str, ...]]

    def rows(self, of: str | None = None) -> list[Row]:
        """Return one of the document's lists as flat rows, as a data frame or CSV takes them.

        The keys are those of the JSON document; see `trapline.results.rows.flat`. Raises
        ValueError for a list that is not among `lists`.
        """
        return self.parts(self._checked(of))

    def columns(self, of: str | None = None) -> tuple[str, ...]:
        """Return the keys of the rows, which are known even where there is no row."""
        name = self._checked(of)
        rows = self.parts(name)
        return tuple(rows[0]) if rows else columns_of(element(type(self), name))

    def parts(self, name: str) -> list[Row]:
        """Return the rows of the list of this name; for documents whose rows need more."""
        return rows_of(getattr(self, name))

    def _checked(self, name: str | None) -> str:
        if name is None:
            return self.lists[0]
        if name not in self.lists:
            raise ValueError(f"no list {name!r}; there are {', '.join(self.lists)}")
        return name


def element(document: type[Document], name: str) -> type[Document]:
    """Return the type of what a document's list of this name holds."""
    (field,) = (field for field in msgspec.structs.fields(document) if field.name == name)
    kind: type[Document] = get_args(field.type)[0]
    return kind
