"""Which label each finding of a document has.

Of several entries that fit one finding the most particular counts: one with its id, then the one
that says most about it. Two that say equally much and disagree are a contradiction, which a person
must resolve.
"""

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

from msgspec.structs import replace

from trapline.base.errors import BadInputFileError
from trapline.labels.labelfile import MATCHERS, matchers
from trapline.labels.subjects import subjects
from trapline.results.labels import Labelled

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trapline.labels.subjects import Subject
    from trapline.results.document import ResultDocument
    from trapline.results.labels import LabelEntry

_D = TypeVar("_D", bound="ResultDocument")


class Labels:
    """Entries of one file, ready to be asked."""

    def __init__(self, entries: "Sequence[LabelEntry]", source: str) -> None:
        #: What messages call the file.
        self.source = source
        self._by_id: dict[str, list[int]] = {}
        self._others: list[int] = []
        self.entries = tuple(entries)
        for number, entry in enumerate(self.entries, 1):
            if entry.id is not None:
                self._by_id.setdefault(entry.id, []).append(number)
            else:
                self._others.append(number)

    def of(self, subject: "Subject") -> Labelled | None:
        """Return the label of one thing, None where nobody gave it one.

        Raises BadInputFileError where two entries contradict each other.
        """
        best = 0
        for number in self.fitting(subject):
            if not best or self._weight(number) > self._weight(best):
                best = number
            elif self._weight(number) == self._weight(best):
                self._check(best, number, subject)
        if not best:
            return None
        entry = self.entries[best - 1]
        return Labelled(
            id=subject.id,
            label=entry.label,
            reason=entry.reason,
            owner=entry.owner,
            date=entry.date.isoformat(),
            entry=best,
            carried=entry.carried,
        )

    def fitting(self, subject: "Subject") -> "Iterator[int]":
        """Yield the number of each entry that fits, from 1 on."""
        for number in (*self._by_id.get(subject.id, ()), *self._others):
            if fits(self.entries[number - 1], subject):
                yield number

    def _weight(self, number: int) -> tuple[bool, bool, int]:
        """Order entries from those that say least: what was carried yields to what was said."""
        entry = self.entries[number - 1]
        said = sum(value is not None for value in matchers(entry))
        return entry.id is not None, entry.carried is None, said

    def _check(self, first: int, second: int, subject: "Subject") -> None:
        one, other = self.entries[first - 1], self.entries[second - 1]
        if one.label != other.label:
            raise BadInputFileError(
                f"{self.source}: labels {first} ({one.label}) and {second} ({other.label}) both "
                f"fit {subject.id} and say equally much of it; say more in one of them."
            )


def fits(entry: "LabelEntry", subject: "Subject") -> bool:
    """Whether a thing fits all that an entry gives."""
    if entry.id not in {None, subject.id} or entry.trap not in {None, subject.trap}:
        return False
    if entry.function is not None and not any(
        fnmatchcase(name, entry.function) for name in subject.functions
    ):
        return False
    return all(
        wanted is None
        or ((known := getattr(subject, name)) is not None and fnmatchcase(known, wanted))
        for name in MATCHERS
        if name not in {"id", "function", "trap"}
        for wanted in (getattr(entry, name),)
    )


def labelled(document: _D, labels: Labels) -> _D:
    """Return a document with what is said of its parts, in the order of the document.

    Raises BadInputFileError where entries contradict each other, or the document takes no labels.
    """
    if "labels" not in document.__struct_fields__:
        raise BadInputFileError(f"A {type(document).__name__} takes no labels.")
    found = [label for subject in subjects(document) if (label := labels.of(subject)) is not None]
    return replace(document, labels=tuple(found))
