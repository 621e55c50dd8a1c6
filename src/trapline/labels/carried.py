"""Carrying labels from one kernel to the next: by id, then to what is nearest."""

from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from trapline.base.errors import BadInputFileError
from trapline.labels.applied import fits
from trapline.labels.labelfile import describe
from trapline.labels.pairing import pair
from trapline.labels.subjects import Subject, subjects

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trapline.results.document import ResultDocument
    from trapline.results.labels import LabelEntry


class Carried(NamedTuple):
    """What came of carrying.

    `entries` is the new file's contents: `kept` entries as they were, `near` ones marked as
    carried. `lost` are those that fit nothing any more, in words; they stay in the file.
    """

    entries: "tuple[LabelEntry, ...]"
    kept: int
    near: int
    lost: tuple[str, ...]


def carry(
    entries: "Sequence[LabelEntry]",
    document: "ResultDocument",
    before: "ResultDocument | None" = None,
) -> Carried:
    """Carry entries to the kernel of `document`; `before` is the one their ids are of.

    What an id is known by is in its entry, or is taken from `before`. An entry that has no id
    stays what it is. What two entries would be carried to goes to one of them.
    """
    there = {one.id: one for one in subjects(document)}
    known = {} if before is None else {one.id: one for one in subjects(before)}
    # What the old kernel had under an id of the new one is that, and no candidate.
    claimed = {entry.id for entry in entries if entry.id is not None} | known.keys()
    homeless = {
        entry.id: _subject(entry, known)
        for entry in entries
        if entry.id is not None and entry.id not in there
    }
    free = [one for one in there.values() if one.id not in claimed]
    near = {found.old.id: found for found in pair(homeless.values(), free)}
    release = _release_of(document)
    carried: list[LabelEntry] = []
    lost = []
    kept = 0
    for entry in entries:
        if entry.id is None:
            kept += 1
            carried.append(entry)
        elif entry.id in there:
            kept += 1
            place = there[entry.id].place
            carried.append(replace(entry, kernel=release or entry.kernel, place=place))
        elif entry.id in near:
            found = near[entry.id]
            carried.append(
                replace(
                    entry,
                    id=found.new.id,
                    kernel=release or entry.kernel,
                    place=found.new.place,
                    carried=f"from {entry.id}: {found.how}",
                )
            )
        else:
            lost.append(describe(entry))
            carried.append(entry)
    return Carried(tuple(carried), kept, len(near), tuple(lost))


def noted(entry: "LabelEntry", document: "ResultDocument", source: str) -> "LabelEntry":
    """Take in what is known of the finding that an entry is about.

    Raises BadInputFileError where it fits nothing in the document, which messages call `source`.
    """
    fitting = next((one for one in subjects(document) if fits(entry, one)), None)
    if fitting is None:
        raise BadInputFileError(f"{source}: has nothing that fits {describe(entry)}.")
    if entry.id is None:
        return entry
    return replace(entry, kernel=_release_of(document), place=fitting.place)


def _release_of(document: "ResultDocument") -> str | None:
    """Tell the release of a document's kernel."""
    kernel = getattr(document, "kernel", None)
    release: str | None = getattr(kernel, "release", None)
    return release


def _subject(entry: "LabelEntry", known: dict[str, Subject]) -> Subject:
    """Say what is known of an entry's finding, by itself or the document it comes from."""
    assert entry.id is not None
    if entry.id in known:
        return known[entry.id]
    return Subject(entry.id, trap=entry.trap, place=entry.place)
