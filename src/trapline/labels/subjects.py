"""What labels are matched by: the parts of result documents that can have one."""

from functools import singledispatch
from typing import TYPE_CHECKING, NamedTuple

from trapline.results.boot import BootResult, Scream
from trapline.results.explore import ExploreResult
from trapline.results.filter import FilterDriver
from trapline.results.findings import findings
from trapline.results.labels import KnownPlace
from trapline.results.scan import Driver, Mapping, ScanResult, Site
from trapline.results.verify import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.results.document import Document, ResultDocument
    from trapline.results.trapclass import TrapClass


class Subject(NamedTuple):
    """One thing that can have a label; what is not known of it is None or empty.

    `functions` are the names it goes by: the function of the source, and the one that its bytes
    belong to.
    """

    id: str
    functions: tuple[str, ...] = ()
    file: str | None = None
    driver: str | None = None
    subsystem: str | None = None
    trap: "TrapClass | None" = None
    gate: str | None = None
    place: KnownPlace | None = None


def subjects(document: "ResultDocument") -> "Iterator[Subject]":
    """Yield what can have a label: the findings, and of a scan every site and mapping."""
    seen = set()
    if isinstance(document, ScanResult):
        parts: tuple[Site | Mapping, ...] = (*document.sites, *document.mappings)
        for part in parts:
            seen.add(part.id)
            yield subject_of(part)
    for found in findings(document):
        if found.id not in seen:
            seen.add(found.id)
            yield subject_of(found.subject, found.id, document)


def subject_of(
    part: "Document", identity: str | None = None, document: "ResultDocument | None" = None
) -> Subject:
    """Say what is known of a part of a document; sites and mappings have ids of their own."""
    if isinstance(part, Site | Mapping):
        return _of_part(part, part.id)
    assert identity is not None
    if isinstance(document, ExploreResult) and not isinstance(part, ExploreResult):
        # "SCENARIO/EVENTS/FUNCTION:INSTRUCTION#ORDINAL/VERDICT"
        function = identity.split("/")[2].partition(":")[0]
        return Subject(identity, functions=(function,))
    if isinstance(document, BootResult) and isinstance(part, Scream):
        return Subject(
            identity,
            functions=(part.label.partition("+")[0],),
            driver=part.driver,
            trap=part.trap,
        )
    return _of_part(part, identity)


@singledispatch
def _of_part(part: object, identity: str) -> Subject:
    del part
    return Subject(identity)


@_of_part.register
def _site(part: Site, identity: str) -> Subject:
    place = KnownPlace(
        kind=part.trap,
        object=part.object,
        owner=part.owner or part.function,
        spot=part.spot,
        landed=part.landed,
        accessor=part.accessor,
        access=f"{part.access} {part.width}",
        driver=part.driver,
    )
    return Subject(
        identity,
        _names(part),
        part.file,
        part.driver,
        part.subsystem,
        part.trap,
        place=place,
    )


@_of_part.register
def _mapping(part: Mapping, identity: str) -> Subject:
    place = KnownPlace(
        kind="mapping",
        object=part.object,
        owner=part.owner or part.function,
        spot=part.spot,
        landed=part.landed,
        accessor=part.mapper,
        driver=part.driver,
    )
    return Subject(identity, _names(part), part.file, part.driver, part.subsystem, place=place)


def _names(part: Site | Mapping) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in (part.owner, part.function) if name))


@_of_part.register(Driver)
@_of_part.register(FilterDriver)
def _driver(part: Driver | FilterDriver, identity: str) -> Subject:
    return Subject(identity, driver=part.name)


@_of_part.register
def _verified(part: Finding, identity: str) -> Subject:
    return Subject(identity, trap=part.trap)
