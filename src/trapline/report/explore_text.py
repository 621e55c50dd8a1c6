"""A campaign as plain text: the matrix, a strip along each window, and the worst findings.

The first line says how many events trapline injected. A strip has one character for each
instruction of the window, the function's name beneath its first instruction.
"""

from collections import Counter
from typing import TYPE_CHECKING, Final

from trapline.base.printable import printable_ascii
from trapline.report.splat import render_splat
from trapline.report.table import WIDTH, counted, paragraph, table
from trapline.results.explore import CLEAN, SEVERITY, Result
from trapline.results.findings import findings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trapline.results.explore import Boundary, ExploreResult, Verdict, Window

#: What a strip shows for each verdict; a boundary that was not tried is a space.
MARKS: "Final[dict[Verdict, str]]" = {
    "same": ".",
    "handled": ":",
    "held": "-",
    "oops": "o",
    "panic": "p",
    "td-exit": "x",
    "double-fault": "D",
    "triple-fault": "T",
    "hang": "H",
    "corrupt": "C",
    "privilege": "!",
}
# Headers of the matrix, so that all of them fit into a line.
_SHORT: "Final[dict[Verdict, str]]" = {verdict: verdict for verdict in SEVERITY} | {
    "td-exit": "exit",
    "double-fault": "#DF",
    "triple-fault": "triple",
    "privilege": "priv",
}
_LABEL: Final = 18
_RANK: Final = {verdict: rank for rank, verdict in enumerate(SEVERITY)}
_STRIP: Final = 64
_LONG: Final = 3  # strip lines that are alike and clean are folded from here on
_GROUPS: Final = 8
_EXAMPLES: Final = 3


def render(result: "ExploreResult", verbosity: int = 0) -> "Iterator[bytes]":
    """Yield the report line by line. `verbosity` 1 folds no strip and shows every splat."""
    for line in lines(result, verbosity):
        yield line.encode("ascii") + b"\n"


def lines(result: "ExploreResult", verbosity: int = 0) -> "Iterator[str]":
    """Yield the report's lines; all but those of splats fit into 80 characters."""
    yield from _head(result)
    yield ""
    yield from _matrix(result)
    for window in result.windows:
        yield from _strips(window, result.results, fold=verbosity == 0)
    yield from _findings(result, everything=verbosity > 0)
    yield from _verdict(result)


def announcement(result: "ExploreResult") -> str:
    """Say that events were injected; the first line of whatever is written of a campaign."""
    verb = "was" if result.injected == 1 else "were"
    return f"{counted(result.injected, 'event')} {verb} injected by trapline."


def _head(result: "ExploreResult") -> "Iterator[str]":
    yield from paragraph(announcement(result))
    rules = "and beyond its rules" if result.beyond_rules else "by its rules"
    yield from paragraph(
        f"{result.generator}: Linux {result.kernel} as a TD, TDX module {result.module_version}, "
        f"{rules}."
    )
    if result.build_id:
        yield from paragraph(f"build id {result.build_id}")
    for missed in result.not_opened:
        yield from paragraph(f"NOT TRIED: {missed.scenario}: {missed.why}.", hanging="  ")


def _matrix(result: "ExploreResult") -> "Iterator[str]":
    counts: dict[tuple[str, str], Counter[str]] = {}
    for one in result.results:
        counts.setdefault((one.scenario, _event(one)), Counter())[one.verdict] += 1
    present = [v for v in SEVERITY if any(count[v] for count in counts.values())]
    widths = [
        max(len(_SHORT[v]), *(len(f"{count[v]:,}") for count in counts.values())) for v in present
    ]
    cells = [_SHORT[v].rjust(width) for v, width in zip(present, widths, strict=True)]
    yield " ".join((" " * _LABEL, *cells))
    shown = None
    for (scenario, event), count in counts.items():
        if scenario != shown:
            yield printable_ascii(scenario)
            shown = scenario
        cells = [f"{count[v]:{width},}" for v, width in zip(present, widths, strict=True)]
        yield " ".join((printable_ascii(f"  {event}").ljust(_LABEL), *cells))
    expected = Counter(
        (one.scenario, _event(one), one.verdict) for one in result.results if one.expected
    )
    for (scenario, event, verdict), runs in expected.items():
        yield from paragraph(
            f"{scenario}: {verdict} is what {event} is meant to lead to ({counted(runs, 'run')}).",
            hanging="  ",
        )
    forbidden: list[list[str | int]] = [
        [window.scenario, part.event, part.boundaries, part.rule]
        for window in result.windows
        for part in window.forbidden
    ]
    if forbidden:
        yield ""
        yield "Not tried, as the rules do not allow it (--beyond-rules tries it all the same):"
        yield from table(["scenario", "event", "instructions", "rule"], forbidden)


# Strips.


def _strips(window: "Window", results: "Sequence[Result]", *, fold: bool) -> "Iterator[str]":
    events: dict[str, dict[int, Verdict]] = {}
    for one in results:
        if one.scenario == window.scenario:
            strip = events.setdefault(_event(one), {})
            before = strip.get(one.boundary, "same")
            strip[one.boundary] = max(before, one.verdict, key=_RANK.__getitem__)
    if not events:
        return
    yield ""
    yield from paragraph(f"{window.scenario}: {window.title}")
    used = {MARKS[verdict]: verdict for strip in events.values() for verdict in strip.values()}
    yield from paragraph(
        ", ".join(f"{mark} {verdict}" for mark, verdict in sorted(used.items())), indent="  "
    )
    for event, strip in events.items():
        yield f"  {event}, {counted(window.instructions, 'instruction')}:"
        marks = "".join(MARKS[strip[i]] if i in strip else " " for i in range(window.instructions))
        yield from _strip(marks, window.boundaries, fold=fold)


def _strip(marks: str, boundaries: "Sequence[Boundary]", *, fold: bool) -> "Iterator[str]":
    rows = [range(at, min(at + _STRIP, len(marks))) for at in range(0, len(marks), _STRIP)]
    clean = {MARKS[verdict] for verdict in CLEAN} | {" "}
    folded: list[range] = []
    for row in rows:
        if not marks[row.start : row.stop].strip():
            continue
        if fold and set(marks[row.start : row.stop]) <= clean and len(rows) > _LONG:
            folded.append(row)
            continue
        yield from _fold(folded, marks, boundaries)
        folded = []
        yield from _row(row, marks, boundaries)
    yield from _fold(folded, marks, boundaries)


def _fold(folded: "list[range]", marks: str, boundaries: "Sequence[Boundary]") -> "Iterator[str]":
    """Show the first of several clean rows, and how many more there are."""
    if not folded:
        return
    yield from _row(folded[0], marks, boundaries)
    if len(folded) > 1:
        rest = range(folded[1].start, folded[-1].stop)
        counts = Counter(marks[rest.start : rest.stop])
        names = {mark: verdict for verdict, mark in MARKS.items()}
        said = ", ".join(
            f"{count:,} {names.get(mark, 'not tried')}" for mark, count in counts.most_common()
        )
        yield from paragraph(f"{rest.start:6}-{rest.stop - 1}: {said}", hanging=" " * 8)


def _row(row: range, marks: str, boundaries: "Sequence[Boundary]") -> "Iterator[str]":
    yield f"{row.start:6}  {marks[row.start : row.stop]}"
    names = " " * 8
    for index in row:
        function = boundaries[index].function
        if index != row.start and function == boundaries[index - 1].function:
            continue
        column = 8 + index - row.start
        if len(names) <= column:
            names = names.ljust(column) + printable_ascii(function) + " "
    yield names.rstrip()[:WIDTH]


# Findings.


def _findings(result: "ExploreResult", *, everything: bool) -> "Iterator[str]":
    groups: dict[tuple[str, str, str, str], list[Result]] = {}
    functions = {window.scenario: window.boundaries for window in result.windows}
    for one in _wrong(result):
        function = functions[one.scenario][one.boundary].function
        groups.setdefault((one.scenario, _event(one), one.verdict, function), []).append(one)
    worst = sorted(groups.items(), key=lambda item: (-_RANK[item[1][0].verdict], item[0]))
    for (scenario, event, verdict, function), found in worst if everything else worst[:_GROUPS]:
        yield ""
        yield from paragraph(
            f"{verdict.upper()}: {scenario}, {event} in {function}(), "
            f"{counted(len(found), 'run')}: {found[0].detail}",
            hanging="  ",
        )
        for text in found[0].differs[:_EXAMPLES]:
            yield from paragraph(f"- {text}", indent="  ", hanging="    ")
        yield from _evidence(found[0], everything=everything)
    if len(worst) > _GROUPS and not everything:
        yield ""
        yield from paragraph(f"{len(worst) - _GROUPS} more kinds of findings: -v shows all.")


def _evidence(one: "Result", *, everything: bool) -> "Iterator[str]":
    if one.last:
        yield "  Last instructions:"
        for text in one.last if everything else one.last[-4:]:
            yield printable_ascii(f"    {text}")[:WIDTH]
    if one.splat is not None and everything:
        for line in render_splat(one.splat):
            yield f"  {line}"
    else:
        yield "  To reproduce:"
        yield printable_ascii(f"    {one.reproduce}")


def _verdict(result: "ExploreResult") -> "Iterator[str]":
    yield ""
    found = len(_wrong(result))
    if result.worse_than_baseline is not None:
        worse = result.worse_than_baseline
        yield from paragraph(
            f"Worse than the baseline: {counted(len(worse), 'boundary')}.".replace(
                "boundarys", "boundaries"
            )
        )
        for text in worse:
            yield from paragraph(text, indent="  ", hanging="    ")
    elif found:
        yield from paragraph(f"{counted(found, 'run')} went wrong.")
    else:
        yield from paragraph("No run went wrong.")


def _wrong(result: "ExploreResult") -> "list[Result]":
    subjects = (found.subject for found in findings(result))
    return [subject for subject in subjects if isinstance(subject, Result)]


def _event(one: "Result") -> str:
    return one.event if one.nested is None else f"{one.event},{one.nested}"
