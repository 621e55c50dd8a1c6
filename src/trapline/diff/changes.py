"""Two results of one command, compared part by part."""

from collections import Counter
from typing import TYPE_CHECKING

from trapline.base.errors import BadInputFileError
from trapline.base.version import GENERATOR
from trapline.diff.comparable import Part, parts
from trapline.labels.pairing import pair
from trapline.results.diff import Change, DiffResult, Side
from trapline.results.reading import default

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.labels.applied import Labels
    from trapline.results.diff import ChangeKind
    from trapline.results.document import ResultDocument
    from trapline.results.labels import Labelled

_ORDER: "tuple[ChangeKind, ...]" = (
    "new",
    "gone",
    "changed",
    "moved",
    "copied",
    "merged",
    "inlined",
    "outlined",
)


def compare(
    old: "ResultDocument",
    new: "ResultDocument",
    *,
    names: tuple[str, str] = ("old", "new"),
    labels: "Labels | None" = None,
) -> DiffResult:
    """Compare two results of one command; `names` are what reports call them.

    Without `labels` those count that the new document has. Raises BadInputFileError for results of
    two commands, or of one that has nothing to compare.
    """
    if type(old) is not type(new):
        raise BadInputFileError(
            f"{names[0]} is a {_schema(old)} and {names[1]} a {_schema(new)}; compare two results "
            "of one command."
        )
    before, after = _by_id(old), _by_id(new)
    said = _Said(new, labels)
    changes = [*_changed(before, after, said), *_others(before, after, said)]
    changes.sort(
        key=lambda c: (_ORDER.index(c.change), c.driver or c.subsystem or "", c.where, c.id)
    )
    touched = {c.id for c in changes}
    return DiffResult(
        generator=GENERATOR,
        of=_schema(new),
        old=_side(old, names[0], len(before)),
        new=_side(new, names[1], len(after)),
        same=sum(identity in before and identity not in touched for identity in after),
        counts={kind: count for kind in _ORDER if (count := _count(changes, kind))},
        changes=tuple(changes),
    )


class _Said:
    """What people said of the parts of the new document."""

    def __init__(self, document: "ResultDocument", labels: "Labels | None") -> None:
        self._labels = labels
        self._in_document = {label.id: label for label in getattr(document, "labels", ())}

    def of(self, part: Part) -> "Labelled | None":
        if self._labels is not None:
            return self._labels.of(part.subject)
        return self._in_document.get(part.subject.id)


def _changed(before: dict[str, Part], after: dict[str, Part], said: _Said) -> "Iterator[Change]":
    for identity, part in after.items():
        was = before.get(identity)
        if was is not None and was.verdict != part.verdict:
            why = f"{was.verdict} -> {part.verdict}"
            yield _change("changed", part, why, error=True, label=said.of(part))


def _others(before: dict[str, Part], after: dict[str, Part], said: _Said) -> "Iterator[Change]":
    """Explain what has its id in one of the two only."""
    gone = {i: part for i, part in before.items() if i not in after}
    come = {i: part for i, part in after.items() if i not in before}
    # A place of which there are copies in both is no other place.
    for identity in _copies(come, before):
        part = come.pop(identity)
        yield _change(
            "copied", part, "one more copy of a place that was there", label=said.of(part)
        )
    for identity in _copies(gone, after):
        yield _change("merged", gone.pop(identity), "one copy less of a place that is there")
    for pairing in pair((p.subject for p in gone.values()), (p.subject for p in come.values())):
        was, part = gone.pop(pairing.old.id), come.pop(pairing.new.id)
        verdicts = was.verdict != part.verdict
        why = f"{was.verdict} -> {part.verdict}" if verdicts else pairing.how
        kind: ChangeKind = "changed" if verdicts else "moved"
        label = said.of(part)
        yield _change(kind, part, why, error=verdicts, label=label, old_id=pairing.old.id)
    yield from _inlining(gone, come, before, after, said)
    for part in come.values():
        yield _change("new", part, "", error=part.is_news, label=said.of(part))
    for part in gone.values():
        yield _change("gone", part, "")


def _copies(ones: dict[str, Part], others: dict[str, Part]) -> list[str]:
    """List those whose place in the source the other side has, too."""
    known = Counter(place for part in others.values() if (place := _place(part)) is not None)
    return [
        identity
        for identity, part in ones.items()
        if (place := _place(part)) is not None and known[place]
    ]


def _place(part: Part) -> tuple[str | None, ...] | None:
    place = part.subject.place
    if place is None or place.spot is None:
        return None
    if place.accessor is None and place.kind == "mmio":
        # How often memory is read that no accessor stands before, the compiler decides.
        return (place.kind, place.object, place.owner)
    return (place.kind, place.object, place.owner, place.spot, place.accessor, place.access)


def _inlining(
    gone: dict[str, Part],
    come: dict[str, Part],
    before: dict[str, Part],
    after: dict[str, Part],
    said: _Said,
) -> "Iterator[Change]":
    """Tell what is in an inline function that only one of the compilers inlined."""
    for identity, name in _inline(gone, after, before):
        why = f"{name}() is a function of its own now"
        yield _change("outlined", gone.pop(identity), why)
    for identity, name in _inline(come, before, after):
        part = come.pop(identity)
        yield _change("inlined", part, f"{name}() is inlined now", label=said.of(part))
    for identity, name in _own(come, before):
        part = come.pop(identity)
        why = f"{name}() is a function of its own now"
        yield _change("outlined", part, why, label=said.of(part))
    for identity, name in _own(gone, after):
        yield _change("inlined", gone.pop(identity), f"{name}() is inlined now")


def _inline(
    ones: dict[str, Part], others: dict[str, Part], same: dict[str, Part]
) -> list[tuple[str, str]]:
    """List those in an inline function that is one of its own on the other side, and only there."""
    theirs, mine = _outside(others), _outside(same)
    only = theirs - mine
    found: dict[str, str] = {}
    for identity, part in ones.items():
        place = part.subject.place
        names = () if place is None else part.chain
        for name in names:
            if place is not None and (place.object, place.kind, name) in only:
                found.setdefault(identity, name)
    return list(found.items())


def _own(ones: dict[str, Part], others: dict[str, Part]) -> list[tuple[str, str]]:
    """List those in a function of its own that is inlined on the other side."""
    inlined = {
        (place.object, place.kind, name)
        for part in others.values()
        if (place := part.subject.place) is not None
        for name in part.chain
    }
    return [
        (identity, place.owner or "")
        for identity, part in ones.items()
        if (place := part.subject.place) is not None
        and (place.object, place.kind, place.owner) in inlined
    ]


def _outside(ones: dict[str, Part]) -> set[tuple[str | None, str | None, str | None]]:
    """Name the functions of their own that have a part in them, each with object and kind."""
    return {
        (place.object, place.kind, place.owner)
        for part in ones.values()
        if (place := part.subject.place) is not None and not place.landed
    }


def _change(
    kind: "ChangeKind",
    part: Part,
    why: str,
    *,
    error: bool = False,
    label: "Labelled | None" = None,
    old_id: str | None = None,
) -> Change:
    settled = label is not None and label.settles
    return Change(
        change=kind,
        part=part.kind,
        id=part.subject.id,
        old_id=old_id,
        driver=part.subject.driver,
        subsystem=part.subject.subsystem,
        where=part.where,
        what=part.what,
        why=why,
        error=error and not settled,
        label=label,
    )


def _by_id(document: "ResultDocument") -> dict[str, Part]:
    return {part.subject.id: part for part in parts(document)}


def _count(changes: "Iterable[Change]", kind: str) -> int:
    return sum(change.change == kind for change in changes)


def _schema(document: "ResultDocument") -> str:
    schema: str = default(type(document), "schema_")
    return schema


def _side(document: "ResultDocument", name: str, count: int) -> Side:
    kernel = getattr(document, "kernel", None)
    coverage = getattr(document, "coverage", None)
    return Side(
        name=name,
        release=getattr(kernel, "release", None),
        build_id=getattr(kernel, "build_id", None),
        generator=getattr(document, "generator", ""),
        complete=getattr(coverage, "complete", True),
        parts=count,
    )
