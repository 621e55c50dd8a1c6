"""What is said of what each context may reach: two answers, a table, chains, gates."""

from typing import TYPE_CHECKING, Final

from trapline.report.blocks import Code, Gap, Heading, Paragraph, Quote, Table
from trapline.report.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trapline.report.blocks import Block
    from trapline.results.reach import Gate, Reach, ReachedSite, Step, Untold

_SHOWN: Final = 5  # of each kind, before -v shows all
_BEFORE: Final = "ve-before"
_AFTER: Final = "ve-after"
_NMI: Final = "nmi"


def answers(reach: "Sequence[Reach]") -> "Iterator[Block]":
    """Yield the two questions of the mail with what the kernel answers."""
    by_id = {each.id: each for each in reach}
    before, after, nmi = by_id.get(_BEFORE), by_id.get(_AFTER), by_id.get(_NMI)
    if before is not None and after is not None:
        yield Quote("Do we have to say no MMIO in #VE?")
        yield Paragraph(f"Before VEINFO.GET: {_answer(before)} Behind it: {_answer(after)}", 2)
    if nmi is not None:
        yield Quote("Consoles and NMIs have been a nightmare")
        yield Paragraph(_consoles(nmi), 2)


def section(reach: "Sequence[Reach]", verbosity: int) -> "Iterator[Block]":
    """Yield what each context reaches."""
    yield Heading("What may be reached", 1)
    yield Gap()
    yield Table(
        ("context", "trap", "functions", "sites", "gates open", "closed", "untold"),
        tuple(
            (
                each.id,
                "forbidden" if each.forbidden else "allowed",
                len(each.functions),
                len(each.sites),
                len(each.open_gates),
                len(each.gates) - len(each.open_gates),
                len(each.open_untold),
            )
            for each in reach
        ),
    )
    for each in reach:
        if each.forbidden or verbosity:
            yield from _context(each, verbosity)


def _answer(reach: "Reach") -> str:
    sites = len(reach.sites)
    mmio = sum(site.trap == "mmio" for site in reach.sites)
    said = (
        f"{counted(len(reach.functions), 'function')}, no site that may trap"
        if not sites
        else f"{counted(len(reach.functions), 'function')}, "
        f"{counted(sites, 'site')} that may trap, {mmio} of them MMIO"
    )
    gates = reach.open_gates
    if gates:
        names = ", ".join(gate.function for gate in gates[:_SHOWN])
        said += f"; behind {counted(len(gates), 'open gate')} ({names}) most of the kernel"
    if reach.open_untold:
        said += f"; {counted(len(reach.open_untold), 'branch', 'branches')} cannot be told"
    return f"{said}."


def _consoles(nmi: "Reach") -> str:
    if nmi.console:
        way = " > ".join(step.function for step in nmi.console)
        return f"An NMI may come to a console driver: {way}."
    if nmi.open_gates or nmi.open_untold:
        return f"No way from an NMI to a console driver is told. NMI handlers: {_answer(nmi)}"
    return f"No way leads from an NMI to a console driver. NMI handlers: {_answer(nmi)}"


def _context(reach: "Reach", verbosity: int) -> "Iterator[Block]":
    yield Gap()
    yield Heading(f"{reach.title} ({reach.id})")
    word = "No trap may land here" if reach.forbidden else "Traps may land here"
    roots = ", ".join(reach.roots)
    yield Paragraph(f"{word}: {reach.why}. From {roots or 'nothing'}.", 2, 2)
    for missing in reach.missing:
        yield Paragraph(f"Not seen: {missing}.", 2, 2)
    if verbosity > 1:
        yield Paragraph(f"Functions: {', '.join(reach.functions) or 'none'}.", 2, 2)
    shown = len(reach.sites) if verbosity else _SHOWN
    for site in reach.sites[:shown]:
        yield from _site(site)
    yield from _rest(len(reach.sites) - shown, "site")
    for gate in sorted(reach.gates, key=lambda gate: (gate.reason is not None, -gate.sites)):
        yield from _gate(gate, verbosity)
    for each in reach.untold:
        yield _untold(each)


def _rest(count: int, what: str) -> "Iterator[Block]":
    if count > 0:
        yield Paragraph(f"and {counted(count, f'more {what}')}; -v shows all.", 2)


def _site(site: "ReachedSite") -> "Iterator[Block]":
    accessor = f" in {site.accessor}()" if site.accessor else ""
    yield Paragraph(f"{site.trap}: {site.instruction}{accessor}, {_at(site.file, site.line)}", 2, 2)
    yield Code(tuple(_lines(site.chain)), 4, "wrap")


def _gate(gate: "Gate", verbosity: int) -> "Iterator[Block]":
    if gate.reason is not None:
        shown = f" [{gate.source}]" if gate.source else ""
        yield Paragraph(f"closed gate {gate.function}(): {gate.reason}{shown}; {gate.by}.", 2, 2)
        return
    yield Paragraph(
        f"OPEN gate {gate.function}(), {_at(gate.file, gate.line)}: "
        f"{counted(gate.functions, 'function')} behind it, {counted(gate.sites, 'site')}.",
        2,
        2,
    )
    if verbosity:
        yield Code(tuple(_lines(gate.chain)), 4, "wrap")


def _untold(each: "Untold") -> Paragraph:
    place = f"{each.function}(), {_at(each.file, each.line)}"
    if each.reason is not None:
        return Paragraph(f"closed: indirect branch in {place}: {each.reason}; {each.by}.", 2, 2)
    fit = counted(each.targets, "function")
    return Paragraph(f"NOT TOLD: indirect branch in {place}: {fit} fit ({each.kind}).", 2, 2)


def _lines(chain: "Sequence[Step]") -> "Iterator[str]":
    for number, step in enumerate(chain):
        arrow = "-> " if number else ""
        ways = f" 1 of {step.targets}" if step.targets > 1 else ""
        edge = "" if step.edge is None else f"  {step.edge}{ways}"
        yield f"{'  ' * number}{arrow}{step.function}()  {_at(step.file, step.line)}{edge}"


def _at(file: str | None, line: int | None) -> str:
    return "no source known" if file is None else f"{file}:{line or '?'}"
