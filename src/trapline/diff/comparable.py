"""What of each kind of result is compared: its parts, each with an id and a verdict."""

from collections import Counter
from functools import singledispatch
from typing import TYPE_CHECKING, NamedTuple

from trapline.base.errors import BadInputFileError
from trapline.labels.subjects import Subject, subject_of
from trapline.results.boot import BootResult
from trapline.results.explore import ExploreResult
from trapline.results.filter import FilterResult
from trapline.results.filter_live import LiveResult
from trapline.results.findings import driver_id, findings
from trapline.results.scan import Mapping, ScanResult, Site
from trapline.results.verify import VerifyResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.results.document import ResultDocument
    from trapline.results.scan import Driver


class Part(NamedTuple):
    """One part: `verdict` is compared between two of one id, `chain` names the inlined functions.

    `is_news` is whether it matters that there is one more of it.
    """

    subject: Subject
    kind: str
    where: str
    what: str
    verdict: str
    chain: tuple[str, ...] = ()
    is_news: bool = True


@singledispatch
def parts(document: "ResultDocument") -> "Iterator[Part]":
    """Yield the parts of a document. Raises BadInputFileError for what cannot be compared."""
    raise BadInputFileError(
        f"A {type(document).__name__} cannot be compared; give results of scan, filter check, "
        "boot, explore or verify."
    )


@parts.register(ScanResult)
def _scan(document: ScanResult) -> "Iterator[Part]":
    for site in document.sites:
        verdict = "emulated" if site.emulable else f"refused: {site.reason}"
        yield Part(subject_of(site), "site", _where(site), _what(site), verdict, _chain(site))
    for mapping in document.mappings:
        yield Part(
            subject_of(mapping),
            "mapping",
            _where(mapping),
            f"maps with {mapping.mapper}()",
            "",
            _chain(mapping),
        )
    for driver in document.drivers:
        if driver.allowed or driver.sites:
            yield _driver(driver)


def _driver(driver: "Driver") -> Part:
    standing = "let in" if driver.allowed else "not on the list"
    kind = "built in" if driver.builtin else "a module"
    subject = Subject(driver_id(driver), driver=driver.name)
    what = f"{driver.bus or 'no'} bus, touches the host"
    return Part(subject, "driver", driver.name, what, f"{standing}, {kind}")


def _what(site: Site) -> str:
    width = f" {8 * site.width} bit" if site.width else ""
    access = "" if site.access == "execute" else f" {site.access}"
    return f"{site.trap}{access}{width}" + (f" ({site.accessor})" if site.accessor else "")


def _where(found: Site | Mapping) -> str:
    line = f", {found.file}:{found.line or '?'}" if found.file else ""
    owner = found.owner or found.function
    inside = "" if owner == found.function else f" in {found.function}()"
    return f"{owner}(){inside}{line}"


def _chain(found: Site | Mapping) -> tuple[str, ...]:
    return tuple(frame.function for frame in found.inlined)


@parts.register(FilterResult)
def _filter(document: FilterResult) -> "Iterator[Part]":
    for driver in document.drivers:
        subject = Subject(driver_id(driver), driver=driver.name)
        kind = "built in" if driver.builtin else "a module"
        reach = f"{driver.reach.total:,} places of its own"
        yield Part(
            subject,
            "driver",
            driver.name,
            f"{driver.bus or 'no'} bus, {reach}",
            f"{driver.verdict}, {kind}",
            is_news=driver.verdict != "outside" or driver.reach.total > 0,
        )


@parts.register(BootResult)
def _boot(document: BootResult) -> "Iterator[Part]":
    seen: Counter[str] = Counter()
    for site in document.sites:
        function = site.function or site.label.partition("+")[0]
        name = site.scan_id or f"{site.image}:{site.trap}:{function}"
        seen[name] += 1
        if seen[name] > 1 and site.scan_id:
            continue  # other instructions of one site of the scan
        identity = name if seen[name] == 1 else f"{name}/{seen[name]}"
        line = f", {site.file}:{site.line or '?'}" if site.file else ""
        subject = Subject(identity, functions=(function,), file=site.file, trap=site.trap)
        yield Part(subject, "trap", f"{function}(){line}", site.trap, site.standing)
    yield from _of_findings(document)


@parts.register(ExploreResult)
@parts.register(VerifyResult)
@parts.register(LiveResult)
def _of_findings(document: "ResultDocument") -> "Iterator[Part]":
    for found in findings(document):
        subject = subject_of(found.subject, found.id, document)
        where = ", ".join((*subject.functions, *filter(None, (subject.trap, subject.driver))))
        yield Part(subject, found.kind, where, found.text, _verdict(found.subject))


def _verdict(subject: object) -> str:
    for name in ("verdict", "standing", "kind"):
        value = getattr(subject, name, None)
        if isinstance(value, str):
            return value
    return ""
