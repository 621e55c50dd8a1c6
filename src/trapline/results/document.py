"""The base of every result document."""

from typing import ClassVar, Final

import msgspec

from trapline.results.rows import Row, rows_of

_ENCODER: Final = msgspec.json.Encoder()


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
        name = self.lists[0] if of is None else of
        if name not in self.lists:
            raise ValueError(f"no list {name!r}; there are {', '.join(self.lists)}")
        return self.parts(name)

    def parts(self, name: str) -> list[Row]:
        """Return the rows of the list of this name; for documents whose rows need more."""
        return rows_of(getattr(self, name))


def encode(value: object) -> bytes:
    r"""Return a document, or part of one, as JSON.

    Names of files and command lines may hold bytes that are not UTF-8, which Python keeps as lone
    surrogates and JSON cannot have: they are written as "\\udcff".
    """
    try:
        return _ENCODER.encode(value)
    except UnicodeEncodeError:
        return _ENCODER.encode(_legible(msgspec.to_builtins(value)))


def _legible(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_legible(key): _legible(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_legible(each) for each in value]
    return value
