"""Every site and mapping of a scan, one by one, for those who want to read the code.

Each starts like a compiler message, `file:line: what`, so that editors can follow it.
"""

from typing import TYPE_CHECKING

from trapline.base.printable import printable_ascii
from trapline.report.classes import CLASSES
from trapline.report.table import WIDTH
from trapline.report.tally import VMLINUX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.results.scan import Frame, Mapping, ScanResult, Site


def listing(result: "ScanResult", *, evidence: bool) -> "Iterator[str]":
    """Yield all sites, then all mappings; `evidence` adds bytes, section, id and reason."""
    yield from _heading(f"All {len(result.sites):,} sites")
    for site in sorted(result.sites, key=_order):
        yield from _site(site)
        if evidence:
            yield from _evidence(site)
    yield from _heading(f"All {len(result.mappings):,} mapping sites")
    for mapping in sorted(result.mappings, key=_order):
        yield from _mapping(mapping)
        if evidence:
            yield from _row(f"{mapping.address} {mapping.section}  id {mapping.id}")


def _heading(text: str) -> "Iterator[str]":
    yield ""
    yield text
    yield "=" * len(text)
    yield ""


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
    yield from _row(f"{_place(site.file, site.line)}: {what}", indent="")
    yield from _chain(site)


def _means(site: "Site") -> str:
    """Say through what the site traps, if not by itself."""
    if site.form == "instruction":
        return f" ({site.accessor})" if site.accessor else ""
    if site.form == "call":
        return f" by {site.accessor}()"
    return f" by {site.accessor or 'pv_ops'}"


def _mapping(mapping: "Mapping") -> "Iterator[str]":
    yield from _row(f"{_place(mapping.file, mapping.line)}: maps with {mapping.mapper}", indent="")
    yield from _chain(mapping)


def _chain(found: "Site | Mapping") -> "Iterator[str]":
    whose = found.driver or found.subsystem
    yield from _row(f"in {found.function} [{found.module}], {whose}")
    for frame in reversed(found.inlined):
        yield from _row(f"inlined {_frame(frame)}")


def _frame(frame: "Frame") -> str:
    return f"{frame.function} {_place(frame.file, frame.line)}"


def _evidence(site: "Site") -> "Iterator[str]":
    yield from _row(f"{site.address} {site.section}  id {site.id}")
    if site.origin:
        yield from _row(f"replaces {site.origin}")
    yield from _row(f"{site.bytes}  {site.instruction}")
    yield from _row(f"{'emulated' if site.emulable else 'refused'}: {site.reason}")


def _place(file: str | None, line: int | None) -> str:
    if not file:
        return "(no line)"
    return f"{file}:{line}" if line else file


def _row(text: str, indent: str = "    ") -> "Iterator[str]":
    """Break only what does not fit, and then anywhere: paths and names have no spaces."""
    text = indent + printable_ascii(text)
    while len(text) > WIDTH:
        cut = text.rfind(" ", len(indent) + 1, WIDTH + 1)
        cut = cut if cut > len(indent) + 8 else WIDTH
        yield text[:cut]
        text = indent + "    " + text[cut:].lstrip(" ")
    yield text
