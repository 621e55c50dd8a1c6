"""`labelled`, `add_label`, `list_labels`, `carry_labels`: what people said of findings."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from trapline.base.version import GENERATOR
from trapline.labels import applied, carried, labelfile
from trapline.labels.applied import Labels
from trapline.labels.subjects import subjects
from trapline.results.findings import findings
from trapline.results.labels import LabelList, ListedLabel
from trapline.results.reading import read_result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trapline.labels.carried import Carried
    from trapline.results.document import ResultDocument
    from trapline.results.labels import LabelEntry

#: Labels, the file of some, or none.
AnyLabels = Labels | str | os.PathLike[str] | None
_D = TypeVar("_D", bound="ResultDocument")


def load_labels(path: "str | os.PathLike[str]") -> Labels:
    """Read a file of labels. Raises BadInputFileError."""
    return Labels(labelfile.load(Path(path)), os.fspath(path))


def known_labels(labels: "AnyLabels") -> Labels | None:
    """Read the file of labels, if it is one. Raises BadInputFileError."""
    return labels if labels is None or isinstance(labels, Labels) else load_labels(labels)


def with_labels(document: _D, labels: Labels | None) -> _D:
    """Return a document with what was said of it, where anything was."""
    return document if labels is None else applied.labelled(document, labels)


def labelled(document: _D, labels: "Labels | str | os.PathLike[str]") -> _D:
    """Return a result document with what people said of its parts.

    What they said is all right is no error any more for `findings`. Raises BadInputFileError where
    the file is unsound or its entries contradict each other.
    """
    return applied.labelled(document, _labels(labels))


def list_labels(
    labels: "Labels | str | os.PathLike[str]",
    document: "ResultDocument | str | os.PathLike[str] | None" = None,
) -> LabelList:
    """List what a file says, and how many parts of a document each entry fits."""
    known = _labels(labels)
    fits: list[int] | None = None
    unlabelled = None
    name = None
    if document is not None:
        name = os.fspath(document) if isinstance(document, str | os.PathLike) else "the document"
        read = as_result(document)
        fits = [0] * len(known.entries)
        for subject in subjects(read):
            for number in known.fitting(subject):
                fits[number - 1] += 1
        marked = applied.labelled(read, known)
        unlabelled = sum(found.level == "error" for found in findings(marked))
    return LabelList(
        generator=GENERATOR,
        file=known.source,
        document=name,
        unlabelled=unlabelled,
        labels=tuple(
            ListedLabel(
                entry=number,
                label=entry.label,
                of=labelfile.describe(entry),
                reason=entry.reason,
                owner=entry.owner,
                date=entry.date.isoformat(),
                carried=entry.carried,
                fits=None if fits is None else fits[number - 1],
            )
            for number, entry in enumerate(known.entries, 1)
        ),
    )


def carry_labels(
    labels: "Labels | str | os.PathLike[str]",
    document: "ResultDocument | str | os.PathLike[str]",
    before: "ResultDocument | str | os.PathLike[str] | None" = None,
) -> "Carried":
    """Carry labels to the kernel of a document: by id, then to what is nearest, marked as carried.

    `before` is the result that their ids are of, for entries that do not say what was known of
    their place. Nothing is written; see `Carried`.
    """
    old = None if before is None else as_result(before)
    return carried.carry(_labels(labels).entries, as_result(document), old)


def add_label(
    path: "str | os.PathLike[str]",
    entry: "LabelEntry",
    document: "ResultDocument | str | os.PathLike[str] | None" = None,
) -> None:
    """Add an entry to a file of labels, which is made if it is not there.

    With a document the entry must fit a part of it, and notes what is known of the place that its
    id names. Raises BadInputFileError, and leaves the file as it was.
    """
    if document is not None:
        name = os.fspath(document) if isinstance(document, str | os.PathLike) else "the document"
        entry = carried.noted(entry, as_result(document), name)
    labelfile.append(Path(path), [entry])


def save_labels(path: "str | os.PathLike[str]", entries: "Sequence[LabelEntry]") -> None:
    """Write a file of labels, whole or not at all."""
    labelfile.write(Path(path), entries)


def as_result(document: "ResultDocument | str | os.PathLike[str]") -> "ResultDocument":
    """Read a result document, if it is not one already. Raises BadInputFileError."""
    if isinstance(document, str | os.PathLike):
        return read_result(Path(document))
    return document


def _labels(labels: "Labels | str | os.PathLike[str]") -> Labels:
    return labels if isinstance(labels, Labels) else load_labels(labels)
