"""What is said of a campaign: the matrix, a strip along each window, and the worst findings.

The first line says how many events trapline injected. A strip has one character for each
instruction of the window, the function's name beneath its first instruction.
"""

from collections import Counter
from typing import TYPE_CHECKING, Final

from trapline.report.blocks import (
    Code,
    Details,
    Gap,
    Heading,
    Item,
    Matrix,
    Paragraph,
    Strip,
    Table,
)
from trapline.report.pages import splat
from trapline.report.pages.said import said
from trapline.report.words import counted, injected
from trapline.results.explore import CLEAN, SEVERITY, Result
from trapline.results.findings import findings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trapline.report.blocks import Block
    from trapline.results.explore import ExploreResult, FootprintWord, Verdict, Window

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
    "misstep": "m",
    "corrupt": "C",
    "privilege": "!",
}
_QUIET: Final = frozenset(MARKS[verdict] for verdict in CLEAN)
# Headers of the matrix, so that all of them fit into a line.
_SHORT: "Final[dict[Verdict, str]]" = {verdict: verdict for verdict in SEVERITY} | {
    "td-exit": "exit",
    "double-fault": "#DF",
    "triple-fault": "triple",
    "privilege": "priv",
}
_RANK: Final = {verdict: rank for rank, verdict in enumerate(SEVERITY)}
_GROUPS: Final = 8
_EXAMPLES: Final = 3
_RANGES: Final = 6
_KINDS: Final = {
    "time": "a time",
    "rip": "the interrupted RIP",
    "flags": "the interrupted RFLAGS",
    "stack": "into the stack",
}
_BASES: Final = {
    "ordinary": "at ordinary places",
    "most": "in most of this window, which has no ordinary place",
}
_LAST: Final = 4


def page(result: "ExploreResult", verbosity: int = 0) -> "Iterator[Block]":
    """Yield the report's blocks. `verbosity` 1 folds no strip and shows every splat."""
    yield from _head(result)
    yield Gap()
    yield from _matrix(result)
    for window in result.windows:
        yield from _strips(window, result.results, whole=verbosity > 0)
    if verbosity > 0:
        yield from _footprints(result)
        yield from _meant(result)
    yield from _findings(result, everything=verbosity > 0)
    yield from _verdict(result)


def _head(result: "ExploreResult") -> "Iterator[Block]":
    yield Paragraph(injected(result.injected))
    rules = "and beyond its rules" if result.beyond_rules else "by its rules"
    yield Paragraph(
        f"{result.generator}: Linux {result.kernel} as a TD, TDX module {result.module_version}, "
        f"{rules}."
    )
    if result.build_id:
        yield Paragraph(f"build id {result.build_id}")
    for missed in result.not_opened:
        yield Paragraph(f"NOT TRIED: {missed.scenario}: {missed.why}.", hanging=2)
    untried: dict[tuple[str, str], list[str]] = {}
    for window in result.windows:
        for part in window.not_tried:
            untried.setdefault((part.event, part.why), []).append(window.scenario)
    for (event, why), scenarios in untried.items():
        where = "" if len(scenarios) == len(result.windows) else f" in {', '.join(scenarios)}"
        yield Paragraph(f"NOT TRIED: {event}{where}: {why}.", hanging=2)


def _matrix(result: "ExploreResult") -> "Iterator[Block]":
    counts: dict[str, dict[str, Counter[Verdict]]] = {}
    for one in result.results:
        events = counts.setdefault(one.scenario, {})
        events.setdefault(_event(one), Counter())[one.verdict] += 1
    seen = {verdict for events in counts.values() for count in events.values() for verdict in count}
    present = [verdict for verdict in SEVERITY if verdict in seen]
    yield Matrix(
        tuple(_SHORT[verdict] for verdict in present),
        {
            scenario: tuple(
                (event, tuple(count[verdict] for verdict in present))
                for event, count in events.items()
            )
            for scenario, events in counts.items()
        },
    )
    expected = Counter(
        (one.scenario, _event(one), one.verdict, one.detail)
        for one in result.results
        if one.expected
    )
    for (scenario, event, verdict, detail), runs in expected.items():
        all_runs = counts[scenario][event].total()
        yield Paragraph(
            f"{scenario}: {verdict} is what {event} is meant to lead to. {runs:,} of "
            f"{all_runs:,}: {detail}",
            hanging=2,
        )
    forbidden = tuple(
        (window.scenario, part.event, part.boundaries, part.rule)
        for window in result.windows
        for part in window.forbidden
    )
    if forbidden:
        yield Gap()
        yield Heading(
            "Not tried, as the rules do not allow it (--beyond-rules tries it all the same):"
        )
        yield Table(("scenario", "event", "instructions", "rule"), forbidden)


def _strips(window: "Window", results: "Sequence[Result]", *, whole: bool) -> "Iterator[Block]":
    events: dict[str, dict[int, Verdict]] = {}
    for one in results:
        if one.scenario == window.scenario:
            worst = events.setdefault(_event(one), {})
            before = worst.get(one.boundary, "same")
            worst[one.boundary] = max(before, one.verdict, key=_RANK.__getitem__)
    if not events:
        return
    yield Gap()
    yield Paragraph(f"{window.scenario}: {window.title}")
    used = {MARKS[verdict]: verdict for worst in events.values() for verdict in worst.values()}
    yield Paragraph(
        ", ".join(f"{mark} {verdict}" for mark, verdict in sorted(used.items())), indent=2
    )
    names = tuple(boundary.function for boundary in window.boundaries)
    for event, worst in events.items():
        yield Paragraph(f"{event}, {counted(window.instructions, 'instruction')}:", indent=2)
        yield Strip(
            marks="".join(
                MARKS[worst[i]] if i in worst else " " for i in range(window.instructions)
            ),
            names=names,
            words={mark: verdict for verdict, mark in MARKS.items()},
            quiet=_QUIET,
            whole=whole,
        )


def _footprints(result: "ExploreResult") -> "Iterator[Block]":
    """Show what each event changes by its own nature, phase by phase."""
    shown = None
    for one in result.footprints:
        event = one.event if one.nested is None else f"{one.event},{one.nested}"
        if shown != (one.scenario, event):
            shown = one.scenario, event
            yield Gap()
            yield Paragraph(f"{one.scenario}: what {event} changes {_BASES[one.basis]}:")
        ranges = [f"{a}" if a == b else f"{a}-{b}" for a, b in one.boundaries[:_RANGES]]
        if len(one.boundaries) > _RANGES:
            ranges.append(f"{len(one.boundaries) - _RANGES:,} more")
        yield Paragraph(
            f"{counted(one.count, 'word')} in {counted(one.runs, 'run')}, before instructions "
            f"{', '.join(ranges)}",
            indent=2,
            hanging=2,
        )
        yield Table(
            ("what", "without", "with"),
            tuple((word.name, f"{word.was:#x}", _now(word)) for word in one.words),
        )


def _now(word: "FootprintWord") -> str:
    return f"{word.now:#x}" if word.now is not None else _KINDS[word.kind]


def _meant(result: "ExploreResult") -> "Iterator[Block]":
    """Show one splat of each kind of end that a scenario wants."""
    seen = set()
    for one in result.results:
        key = one.scenario, _event(one), one.verdict, one.detail
        if one.expected and one.splat is not None and key not in seen:
            seen.add(key)
            yield Gap()
            yield Paragraph(f"As {one.scenario} means it, {_event(one)} leads to {one.verdict}:")
            yield from _evidence(one, everything=True)


def _findings(result: "ExploreResult", *, everything: bool) -> "Iterator[Block]":
    groups: dict[tuple[str, str, str, str], list[Result]] = {}
    functions = {window.scenario: window.boundaries for window in result.windows}
    for one in _wrong(result):
        function = functions[one.scenario][one.boundary].function
        groups.setdefault((one.scenario, _event(one), one.verdict, function), []).append(one)
    worst = sorted(groups.items(), key=lambda item: (-_RANK[item[1][0].verdict], item[0]))
    for (scenario, event, verdict, function), found in worst if everything else worst[:_GROUPS]:
        yield Gap()
        yield Paragraph(
            f"{verdict.upper()}: {scenario}, {event} in {function}(), "
            f"{counted(len(found), 'run')}: {found[0].detail}",
            hanging=2,
        )
        for text in found[0].differs[:_EXAMPLES]:
            yield Item(text, indent=2)
        yield from _evidence(found[0], everything=everything)
    if len(worst) > _GROUPS and not everything:
        yield Gap()
        yield Paragraph(f"{len(worst) - _GROUPS} more kinds of findings: -v shows all.")


def _evidence(one: "Result", *, everything: bool) -> "Iterator[Block]":
    if one.last:
        yield Paragraph("Last instructions:", indent=2)
        yield Code(one.last if everything else one.last[-_LAST:], indent=4, long="cut")
    if one.splat is not None and everything:
        yield Details(one.splat.banner, tuple(splat.page(one.splat)), indent=2)
    else:
        yield Paragraph("To reproduce:", indent=2)
        yield Code((one.reproduce,), indent=4)


def _verdict(result: "ExploreResult") -> "Iterator[Block]":
    yield Gap()
    found = len(_wrong(result))
    if result.worse_than_baseline is not None:
        worse = result.worse_than_baseline
        yield Paragraph(
            f"Worse than the baseline: {counted(len(worse), 'boundary', 'boundaries')}."
        )
        for text in worse:
            yield Paragraph(text, indent=2, hanging=2)
    elif found:
        yield Paragraph(f"{counted(found, 'run')} went wrong.")
    else:
        yield Paragraph("No run went wrong.")
    yield from said(result, result.labels)


def _wrong(result: "ExploreResult") -> "list[Result]":
    subjects = (found.subject for found in findings(result) if not found.settled)
    return [subject for subject in subjects if isinstance(subject, Result)]


def _event(one: "Result") -> str:
    return one.event if one.nested is None else f"{one.event},{one.nested}"
