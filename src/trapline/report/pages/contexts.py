"""What is said of where a trap may land: a sentence for each gap, and what stands against it."""

from typing import TYPE_CHECKING, Final

from trapline.report.blocks import Code, Gap, Heading, Item, Paragraph, Table
from trapline.report.pages import reach
from trapline.report.words import counted
from trapline.results.contexts import FORBIDDEN_ACCESSES, UNREAD_EDGES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.report.blocks import Block
    from trapline.results.contexts import ContextsResult, GapEdge, GapSite, Place
    from trapline.results.contexts import Gap as EntryGap

_ENTRIES: Final = 4  # named before the rest is counted


def page(result: "ContextsResult", verbosity: int = 0) -> "Iterator[Block]":
    """Yield the report's blocks.

    `verbosity` 1 adds the sites that the rules let pass and all edges, 2 each instruction.
    """
    kernel = result.kernel
    yield Paragraph(
        f"{result.generator}: where a trap may land in Linux {kernel.release or kernel.name}; "
        f"rules of TDX module {result.module_version}."
    )
    if kernel.build_id:
        yield Paragraph(f"build id {kernel.build_id}")
    for missing in result.missing:
        yield Paragraph(f"Not seen: {missing}", hanging=2)
    yield Gap()
    yield from reach.answers(result.reach)
    yield Gap()
    yield from _gaps(result, verbosity)
    yield Gap()
    yield from reach.section(result.reach, verbosity)
    yield Gap()
    yield Heading("What the proofs take for granted")
    for text in result.assumptions:
        yield Item(text, indent=2)


def _gaps(result: "ContextsResult", verbosity: int) -> "Iterator[Block]":
    yield Heading("The gaps of the entry code", 1)
    yield Gap()
    for gap in result.gaps:
        yield Paragraph(_sentence(gap), hanging=4)
    yield Gap()
    yield from _table(result)
    for gap in result.gaps:
        yield from _gap(gap, verbosity)


def _sentence(gap: "EntryGap") -> str:
    """Say what was found, as a mail would quote it."""
    count = counted(len(gap.instructions), "instruction")
    bad = [site for site in gap.sites if site.answer != "no"]
    if bad:
        verb = "site may" if len(bad) == 1 else "sites may"
        return f"{len(bad)} {verb} trap in the {gap.title} gap: {count}, all paths."
    unread = sum(edge.kind in UNREAD_EDGES for edge in gap.edges)
    if unread:
        return (
            f"The {gap.title} gap is not proved: {count}, no site among them, but "
            f"{counted(unread, 'path')} could not be followed."
        )
    if gap.edges:
        return (
            f"No site may trap in the {gap.title} gap: {count}, all paths but what is behind "
            f"{counted(len(gap.edges), 'edge')}."
        )
    return f"No site may trap in the {gap.title} gap: {count}, all paths."


def _table(result: "ContextsResult") -> "Iterator[Block]":
    yield Table(
        ("gap", "entries", "in", "out", "paths", "exits", "user memory", "edges"),
        tuple(
            (
                gap.id,
                len(gap.entries),
                gap.in_,
                gap.out,
                gap.paths,
                sum(not site.reason.startswith("touches") for site in gap.sites),
                sum(gap.accesses.get(kind, 0) for kind in FORBIDDEN_ACCESSES),
                len(gap.edges),
            )
            for gap in result.gaps
        ),
    )


def _gap(gap: "EntryGap", verbosity: int) -> "Iterator[Block]":
    sites = [site for site in gap.sites if verbosity or site.answer != "no"]
    edges = [edge for edge in gap.edges if verbosity or edge.kind in UNREAD_EDGES]
    if not (sites or edges or verbosity):
        return
    yield Gap()
    yield Heading(f"{gap.title} ({gap.id})")
    if verbosity:
        yield from _summary(gap)
    for site in sites:
        yield from _site(site)
    for edge in edges:
        yield from _edge(edge)
    if verbosity > 1:
        yield from _instructions(gap)


def _summary(gap: "EntryGap") -> "Iterator[Block]":
    walked = [entry for entry in gap.entries if entry.like is None]
    names = ", ".join(entry.function for entry in walked[:_ENTRIES])
    more = "" if len(walked) <= _ENTRIES else f" and {len(walked) - _ENTRIES} more"
    copies = len(gap.entries) - len(walked)
    like = f"; {counted(copies, 'other')} the same but for what they call" if copies else ""
    yield Paragraph(f"from {names}{more}{like}; out by {', '.join(gap.leaves) or 'none'}.", 2, 2)
    states = ", ".join(f"{name} {count}" for name, count in gap.by_condition.items())
    yield Paragraph(f"instructions with: {states or 'nothing'}.", 2, 2)
    kinds = ", ".join(f"{name} {count}" for name, count in gap.accesses.items())
    yield Paragraph(f"memory accesses: {kinds or 'none'}.", 2, 2)


def _site(site: "GapSite") -> "Iterator[Block]":
    subject = f" ({site.subject})" if site.subject else ""
    word = {"ve": "TRAPS", "may": "MAY TRAP", "no": "passes"}[site.answer]
    yield Paragraph(
        f"{word}: {site.place.summary()}: {site.instruction}{subject}, "
        f"on the way {' and '.join(site.directions)}: {site.reason}"
        + (f" [{site.rule}]." if site.rule else "."),
        indent=2,
        hanging=2,
    )
    yield Paragraph(f"with {', '.join(site.conditions)}{_line(site.place)}", 4, 2)


def _edge(edge: "GapEdge") -> "Iterator[Block]":
    target = "" if edge.target is None else f" to {edge.target}"
    word = "NOT FOLLOWED" if edge.kind in UNREAD_EDGES else "edge"
    yield Paragraph(f"{word}: {edge.place.summary()}: {edge.kind}{target}: {edge.reason}.", 2, 2)


def _line(place: "Place") -> str:
    if place.file is None:
        return ""
    return f"; {place.file}:{place.line or '?'}"


def _instructions(gap: "EntryGap") -> "Iterator[Block]":
    yield Code(
        tuple(
            f"{each.place.summary():40} {each.instruction:36} "
            f"{'/'.join(each.directions)}: {', '.join(each.conditions)}"
            for each in gap.instructions
        ),
        indent=2,
    )
