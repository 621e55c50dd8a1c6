"""Every site and mapping of a scan, one by one, for those who want to read the code.

Each starts like a compiler message, `file:line: what`, so that editors can follow it.
"""

from typing import TYPE_CHECKING, Final

from trapline.report.blocks import Code, Gap, Heading
from trapline.report.classes import CLASSES
from trapline.report.pages.tally import VMLINUX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.report.blocks import Block
    from trapline.results.labels import Labelled
    from trapline.results.scan import Frame, Mapping, ScanResult, Site

_MARGIN: Final = " " * 4


def listing(result: "ScanResult", *, evidence: bool) -> "Iterator[Block]":
    """Yield all sites, then all mappings; `evidence` adds bytes, section, id and reason."""
    yield from _heading(f"All {len(result.sites):,} sites")
    said = {label.id: label for label in result.labels}
    for site in sorted(result.sites, key=_order):
        lines = (*_site(site), *_label(said.get(site.id)))
        if evidence:
            lines += tuple(_evidence(site))
        yield Code(lines, long="wrap")
    yield from _heading(f"All {len(result.mappings):,} mapping sites")
    for mapping in sorted(result.mappings, key=_order):
        lines = (*_mapping(mapping), *_label(said.get(mapping.id)))
        if evidence:
            lines += (f"{_MARGIN}{mapping.address} {mapping.section}  id {mapping.id}",)
        yield Code(lines, long="wrap")


def _heading(text: str) -> "Iterator[Block]":
    yield Gap()
    yield Heading(text, 1)
    yield Gap()


def _order(found: "Site | Mapping") -> tuple[bool, str, str, int, str]:
    return (
        found.module != VMLINUX,
        found.module,
        found.file or "",
        found.line or 0,
        found.address,
    )


def _site(site: "Site") -> "Iterator[str]":
    what = CLASSES[site.trap].title
    if site.access != "execute":
        what += f" {site.access}"
    if site.width:
        what += f" {8 * site.width} bit"
    what += _means(site)
    if not site.emulable:
        what += ", not emulable"
    yield f"{_place(site.file, site.line)}: {what}"
    yield from _chain(site)


def _means(site: "Site") -> str:
    """Say through what the site traps, if not by itself."""
    if site.mapped_by is not None:
        through = f"by {site.accessor}() " if site.accessor else ""
        return f" {through}through what {site.mapped_by}() returned"
    if site.form == "instruction":
        return f" ({site.accessor})" if site.accessor else ""
    if site.form == "call":
        return f" by {site.accessor}()"
    return f" by {site.accessor or 'pv_ops'}"


def _mapping(mapping: "Mapping") -> "Iterator[str]":
    yield f"{_place(mapping.file, mapping.line)}: maps with {mapping.mapper}"
    yield from _chain(mapping)


def _label(label: "Labelled | None") -> "Iterator[str]":
    if label is not None:
        carried = " (carried, to be confirmed)" if label.carried is not None else ""
        yield f"{_MARGIN}{label.label}{carried}: {label.reason} ({label.owner}, {label.date})"


def _chain(found: "Site | Mapping") -> "Iterator[str]":
    whose = found.driver or found.subsystem
    yield f"{_MARGIN}in {found.function} [{found.module}], {whose}"
    for frame in reversed(found.inlined):
        yield f"{_MARGIN}inlined {_frame(frame)}"


def _frame(frame: "Frame") -> str:
    return f"{frame.function} {_place(frame.file, frame.line)}"


def _evidence(site: "Site") -> "Iterator[str]":
    yield f"{_MARGIN}{site.address} {site.section}  id {site.id}"
    if site.origin:
        yield f"{_MARGIN}replaces {site.origin}"
    yield f"{_MARGIN}{site.bytes}  {site.instruction}"
    yield f"{_MARGIN}{'emulated' if site.emulable else 'refused'}: {site.reason}"


def _place(file: str | None, line: int | None) -> str:
    if not file:
        return "(no line)"
    return f"{file}:{line}" if line else file
