"""Which boundaries came out worse than in an earlier campaign, across rebuilds of the kernel.

A boundary is known by its function, its instruction (without what moves from build to build)
and how often that instruction came before in the window; offsets are only shown.
"""

from collections import Counter
from pathlib import Path
from typing import Final, NamedTuple

from trapline.base import decode, files
from trapline.explore.store import read_store
from trapline.results.explore import (
    CLEAN,
    SEVERITY,
    ExploreResult,
    NotOpened,
    Result,
    Verdict,
    Window,
)

_SQLITE: Final = b"SQLite format 3\0"
# A campaign of all scenarios, beyond the rules, too, is some ten MiB.
_MAX_DOCUMENT: Final = 512 << 20
_RANK: Final = {verdict: rank for rank, verdict in enumerate(SEVERITY)}


class Place(NamedTuple):
    """A boundary and what is injected there, by names that outlive a rebuild."""

    scenario: str
    event: str
    nested: str
    function: str
    instruction: str
    ordinal: int


class Verdicts(NamedTuple):
    """The worst verdict at each place, and how to show the place."""

    worst: dict[Place, Verdict]
    labels: dict[Place, str]


def load(path: Path) -> tuple[tuple[Window, ...], tuple[Result, ...]]:
    """Read windows and results of a store, or of a JSON result document.

    Raises BadInputFileError.
    """
    if files.read_start(path, len(_SQLITE)) == _SQLITE:
        return read_store(path)
    data = files.read(path, limit=_MAX_DOCUMENT, what="a result of trapline explore")
    document = decode.json(
        data, ExploreResult, str(path), "a campaign store or a result of trapline explore"
    )
    return document.windows, document.results


def verdicts(windows: tuple[Window, ...], results: tuple[Result, ...]) -> Verdicts:
    """Find the worst verdict at each place."""
    places = {window.scenario: _places(window) for window in windows}
    found = Verdicts({}, {})
    for result in results:
        names = places.get(result.scenario, [])
        if not 0 <= result.boundary < len(names):
            continue
        function, instruction, ordinal, label = names[result.boundary]
        nested = result.nested or ""
        place = Place(result.scenario, result.event, nested, function, instruction, ordinal)
        verdict: Verdict = "same" if result.expected else result.verdict
        before = found.worst.get(place, "same")
        found.worst[place] = max(before, verdict, key=_RANK.__getitem__)
        found.labels[place] = label
    return found


def worse(
    before: Verdicts, now: Verdicts, not_opened: tuple[NotOpened, ...] = ()
) -> tuple[str, ...]:
    """List what is worse now, in the order of the windows; a new place counts from "same".

    A window that was tried then and does not open now is worse too.
    """
    tried = {place.scenario for place in before.worst}
    lines = [
        f"{missed.scenario}: was tried, and now {missed.why}"
        for missed in not_opened
        if missed.scenario in tried
    ]
    for place, verdict in now.worst.items():
        old = before.worst.get(place)
        if verdict in CLEAN or _RANK[verdict] <= _RANK[old or "same"]:
            continue
        event = f"{place.event},{place.nested}" if place.nested else place.event
        was = old or "not there"
        lines.append(f"{place.scenario} {event} {now.labels[place]}: {was}, now {verdict}")
    return tuple(lines)


def _places(window: Window) -> list[tuple[str, str, int, str]]:
    """Name each boundary: function, instruction, ordinal among its likes, label to show."""
    seen: Counter[tuple[str, str]] = Counter()
    names = []
    for boundary in window.boundaries:
        key = boundary.function, boundary.instruction
        label = f"{boundary.function}+{boundary.offset:#x} ({boundary.instruction})"
        names.append((*key, seen[key], label))
        seen[key] += 1
    return names
