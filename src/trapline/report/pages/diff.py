"""What is said of two results that were compared: what a mail would say of it."""

from collections import defaultdict
from typing import TYPE_CHECKING, Final

from trapline.report.blocks import Gap, Heading, Paragraph
from trapline.report.words import counted
from trapline.results.diff import COMPILED
from trapline.results.findings import findings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trapline.report.blocks import Block
    from trapline.results.diff import Change, DiffResult, Side

_TITLES: Final = {
    "new": "New",
    "gone": "Gone",
    "changed": "Another verdict",
    "moved": "Moved: the same under another id",
}
_COMPILED: Final = "What the compiler made otherwise of the same source"
_TOP: Final = 40  # changes of a kind that are listed without -v


def page(result: "DiffResult", verbosity: int = 0) -> "Iterator[Block]":
    """Yield the report's blocks; `verbosity` 1 lists every change."""
    yield Paragraph(f"{result.generator}: {result.of.rpartition('/')[2]}, compared")
    yield from _side("-", result.old)
    yield from _side("+", result.new)
    yield Gap()
    yield Paragraph(_summary(result))
    for kind, title in _TITLES.items():
        shown = [change for change in result.changes if change.change == kind]
        most = _TOP if kind != "moved" else 0
        yield from _section(title, shown, len(shown) if verbosity else most)
    compiled = [change for change in result.changes if change.change in COMPILED]
    yield from _section(_COMPILED, compiled, len(compiled) if verbosity else 0)
    yield Gap()
    yield from _verdict(result)


def _side(sign: str, side: "Side") -> "Iterator[Block]":
    release = side.release or "(no release)"
    build = f", build id {side.build_id}" if side.build_id else ""
    yield Paragraph(
        f"{sign} {side.name}: {release}{build}, {counted(side.parts, 'part')}", hanging=4
    )
    if not side.complete:
        yield Paragraph(
            "INCOMPLETE: a part of it was not seen; what is new or gone may be no change.", indent=2
        )


def _summary(result: "DiffResult") -> str:
    counts = result.counts
    compiled = sum(counts.get(kind, 0) for kind in COMPILED)
    if not result.changes:
        return f"Nothing changed: {counted(result.same, 'part')} are the same."
    source = [f"{counts[kind]:,} {kind}" for kind in _TITLES if counts.get(kind)]
    said = ", ".join(source) if source else "nothing changed in the source"
    by_compiler = f"; {compiled:,} made otherwise by the compiler" if compiled else ""
    return f"{counted(result.same, 'part')} the same; {said}{by_compiler}."


def _section(title: str, changes: "Sequence[Change]", most: int) -> "Iterator[Block]":
    if not changes:
        return
    yield Gap()
    yield Heading(f"{title}: {len(changes):,}", 1)
    yield Gap()
    groups: defaultdict[str, list[Change]] = defaultdict(list)
    for change in changes:
        groups[change.driver or change.subsystem or change.part].append(change)
    shown = 0
    for name in sorted(groups, key=lambda name: (-len(groups[name]), name)):
        listed = groups[name][: max(0, most - shown)]
        shown += len(listed)
        if listed or most == 0:
            yield Paragraph(f"{name}: {len(groups[name]):,}", hanging=4)
        for change in listed:
            yield Paragraph(_line(change), indent=2, hanging=4)
    if 0 < most < len(changes):
        yield Paragraph(f"{len(changes) - most:,} more: -v lists all.")


def _line(change: "Change") -> str:
    sign = {"new": "+", "gone": "-"}.get(change.change, "~")
    why = f": {change.why}" if change.why else ""
    label = "" if change.label is None else f" [{_label(change)}]"
    return f"{sign} {change.where}: {change.what}{why}{label}"


def _label(change: "Change") -> str:
    assert change.label is not None
    carried = ", carried" if change.label.carried is not None else ""
    return f"{change.label.label}{carried}: {change.label.reason} ({change.label.owner})"


def _verdict(result: "DiffResult") -> "Iterator[Block]":
    found = len(findings(result))
    labelled = sum(change.label is not None and change.label.settles for change in result.changes)
    settled = f"; labels settle {labelled:,} more" if labelled else ""
    if found:
        yield Paragraph(
            f"Policy: {counted(found, 'change')} new or of another verdict, and not settled by a "
            f"label{settled}."
        )
    else:
        yield Paragraph(f"Policy: nothing new that no label settles{settled}.")
