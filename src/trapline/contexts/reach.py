"""What each context may reach: sites in front of the gates, the gates, and what is behind them."""

import hashlib
import re
from collections import deque
from fnmatch import translate
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

from trapline.contexts.largestcycle import core
from trapline.contexts.partial import halves
from trapline.kernel.calls.graph import Edge
from trapline.linux.roots import CONSOLE, NAMED_WHY, ROOTS, Root
from trapline.results.reach import Gate, Reach, ReachedSite, Step, Untold

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from iced_x86 import Instruction

    from trapline.contexts.closed import Closed, Reason
    from trapline.kernel.binary import Binary
    from trapline.kernel.calls.graph import Graph
    from trapline.results.scan import Site

_START: Final = -1  # stands for the part of a function that a context starts in
_NONE: "Final[tuple[int, ...]]" = ()


class _Start(NamedTuple):
    """Where a context starts: whole functions, or the instructions of a part of one."""

    functions: tuple[int, ...]
    part: "tuple[int, frozenset[int]] | None"
    missing: tuple[str, ...]


class Contexts:
    """All contexts of one kernel; `sites` are the places that may trap."""

    def __init__(
        self, binary: "Binary", graph: "Graph", sites: "Iterable[Site]", closed: "Closed"
    ) -> None:
        self._binary = binary
        self._graph = graph
        self._closed = closed
        self._sites: dict[int, list[Site]] = {}
        self._bodies: dict[int, dict[int, Instruction]] = {}
        self._names: dict[int, str] = {}
        self._closures: dict[int, set[int]] = {}
        self._cores: dict[frozenset[int], frozenset[int]] = {}
        for site in sites:
            if site.trap == "tdcall" or (site.form == "call" and self._has_sites(site)):
                continue
            function = graph.function_at(int(site.address, 16))
            if function is not None:
                self._sites.setdefault(function, []).append(site)

    def all(self, named: "Sequence[str]" = ()) -> "Iterator[Reach]":
        """Yield what each context reaches; with `named`, only what those functions do."""
        roots = [
            Root(f"from-{name}", f"from {name}()", (name,), NAMED_WHY, forbidden=True)
            for name in named
        ] or ROOTS
        for root in roots:
            if root.sections:
                yield self._in_sections(root)
            else:
                yield self._reach(root)

    def _has_sites(self, site: "Site") -> bool:
        """Whether what a site calls is a function with sites of its own, to be reached itself."""
        return site.accessor is not None and self._binary.address_of(site.accessor) is not None

    # The parts of an answer.

    def _reach(self, root: Root) -> Reach:
        start = self._start(root)
        closed = self._shut(root.id)
        starts = start.functions if start.part is None else (_START,)
        search = _Search(self._graph, starts, start.part, closed)
        near = search.run(self._core(closed))
        gates = sorted(search.met)
        found_gates = tuple(self._gate(root.id, gate, search) for gate in gates)
        sites = tuple(self._reached(search, near))
        return Reach(
            id=root.id,
            title=root.title,
            roots=tuple(self._name(f) for f in self._roots(start)),
            forbidden=root.forbidden,
            why=root.why,
            functions=tuple(sorted({self._name(f) for f in near if f != _START})),
            sites=sites,
            gates=found_gates,
            untold=tuple(self._untold(root.id, near, start.part)),
            console=self._to_console(search, root),
            missing=start.missing,
        )

    def _to_console(self, search: "_Search", root: Root) -> tuple[Step, ...]:
        """Return a shortest way to a console driver, through all gates that are open."""
        (consoles,) = (each for each in ROOTS if each.id == CONSOLE)
        if root == consoles:
            return ()
        targets = self._start(consoles).functions
        reached = search.run(frozenset())
        ways = [self._chain(search, target) for target in targets if target in reached]
        return min(ways, key=len, default=())

    def _start(self, root: Root) -> _Start:
        missing: list[str] = []
        functions: list[int] = sorted(self._binary.functions.addresses_of(root.functions))
        for struct, member in root.members:
            targets = self._graph.members(struct, member)
            functions += targets or ()
            if targets is None:
                missing.append(f"this kernel's types have no {member} in struct {struct}")
        if not functions:
            names = " or ".join(f"{name}()" for name in root.functions)
            missing.append(f"this kernel has no {names}" if names else "nothing starts here")
        calls = root.until or root.after
        if not calls or not functions:
            return _Start(tuple(sorted(set(functions))), None, tuple(missing))
        function = functions[0]
        for name in calls:
            addresses = self._binary.functions.addresses_of([name])
            half = halves(self._body(function), function, addresses)
            if half.found:
                return _Start((), (function, half.before if root.until else half.after), ())
        missing.append(
            f"{self._name(function)}() calls none of {', '.join(calls)}: all of it is looked at"
        )
        return _Start((function,), None, tuple(missing))

    def _in_sections(self, root: Root) -> Reach:
        found = [
            (function, site)
            for function, sites in sorted(self._sites.items())
            for site in sites
            if self._binary.section_at(int(site.address, 16)) in root.sections
        ]
        return Reach(
            id=root.id,
            title=root.title,
            roots=root.sections,
            forbidden=root.forbidden,
            why=root.why,
            functions=tuple(sorted({self._name(function) for function, _ in found})),
            sites=tuple(
                self._site(site, (self._step(function, None),)) for function, site in found
            ),
            gates=(),
            untold=(),
            console=(),
            missing=(),
        )

    def _reached(self, search: "_Search", near: "Iterable[int]") -> "Iterator[ReachedSite]":
        for function in sorted(near):
            for site in self._sites_of(function, search.part):
                yield self._site(site, self._chain(search, function))

    def _sites_of(
        self, function: int, part: "tuple[int, frozenset[int]] | None"
    ) -> "Iterable[Site]":
        if function != _START:
            return self._sites.get(function, ())
        assert part is not None
        return [s for s in self._sites.get(part[0], ()) if int(s.address, 16) in part[1]]

    def _site(self, site: "Site", chain: tuple[Step, ...]) -> ReachedSite:
        return ReachedSite(
            id=site.id,
            trap=site.trap,
            function=site.function,
            file=site.file,
            line=site.line,
            instruction=site.instruction,
            accessor=site.accessor,
            emulable=site.emulable,
            chain=chain,
        )

    def _gate(self, context: str, gate: int, search: "_Search") -> Gate:
        name = self._name(gate)
        behind = self._behind(gate)
        frame = self._binary.own_frame(gate)
        return Gate(
            id=_identity(context, "gate", name),
            function=name,
            file=None if frame is None else frame.file,
            line=None if frame is None else frame.line,
            **_reason(self._why(context, gate)),
            functions=len(behind),
            sites=sum(len(self._sites.get(function, ())) for function in behind),
            chain=self._chain(search, gate),
        )

    def _behind(self, gate: int) -> set[int]:
        """Return what a gate leads to; the same for all in the core, as each leads to each."""
        core = self._core(frozenset())
        key = min(core) if gate in core else gate
        if key not in self._closures:
            self._closures[key] = self._graph.closure([key])
        return self._closures[key]

    def _untold(
        self, context: str, near: "Iterable[int]", part: "tuple[int, frozenset[int]] | None"
    ) -> "Iterator[Untold]":
        for function in sorted(near):
            real = part[0] if function == _START and part is not None else function
            seen: set[int] = set()
            for edge in self._graph.edges(real):
                if not edge.is_guess or edge.site in seen:
                    continue
                if function == _START and part is not None and edge.site not in part[1]:
                    continue
                seen.add(edge.site)
                name = self._name(real)
                identity = _identity(context, "untold", f"{name} {len(seen)}")
                frame = self._binary.own_frame(edge.site)
                yield Untold(
                    id=identity,
                    function=name,
                    file=None if frame is None else frame.file,
                    line=None if frame is None else frame.line,
                    kind=edge.kind,
                    targets=edge.ways,
                    **_reason(self._closed.by_id(identity)),
                )

    # Chains.

    def _chain(self, search: "_Search", function: int) -> tuple[Step, ...]:
        edges = search.way_to(function)
        steps = [self._step(edge.source, edge) for edge in edges]
        last = edges[-1].target if edges else search.real(function)
        return (*steps, self._step(last, None))

    def _step(self, function: int, edge: "Edge | None") -> Step:
        frame = self._binary.own_frame(function if edge is None else edge.site)
        return Step(
            function=self._name(function),
            file=None if frame is None else frame.file,
            line=None if frame is None else frame.line,
            edge=None if edge is None else edge.kind,
            targets=0 if edge is None else edge.ways,
        )

    # What is asked more than once.

    def _roots(self, start: _Start) -> tuple[int, ...]:
        return start.functions if start.part is None else (start.part[0],)

    def _shut(self, context: str) -> frozenset[int]:
        """Return the closed gates of a context."""
        return frozenset(
            function for function in self._closable if self._why(context, function) is not None
        )

    @cached_property
    def _closable(self) -> frozenset[int]:
        """Functions that some reason may be about."""
        found: set[int] = set()
        for pattern in self._closed.patterns():
            wanted = re.compile(translate(pattern))
            found.update(self._binary.functions.matching(wanted))
        return frozenset(found | set(self._binary.functions.addresses_of(self._closed.names())))

    def _why(self, context: str, function: int) -> "Reason | None":
        name = self._name(function)
        return self._closed.why(context, name, _identity(context, "gate", name))

    def _core(self, closed: frozenset[int]) -> frozenset[int]:
        """Return those of the core that still lead to most of it where some gates are closed."""
        known = self._cores.get(closed)
        if known is None:
            told = self._graph.told
            rest = core(
                (function for function in told if function not in closed),
                lambda function: [c for c in told.get(function, _NONE) if c not in closed],
            )
            known = self._cores[closed] = self._whole_core & self._leading_to(rest, closed)
        return known

    @cached_property
    def _whole_core(self) -> frozenset[int]:
        told = self._graph.told
        return core(told, lambda function: told.get(function, _NONE))

    @cached_property
    def _callers(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for function, callees in self._graph.told.items():
            for callee in callees:
                found.setdefault(callee, []).append(function)
        return found

    def _leading_to(self, functions: frozenset[int], closed: frozenset[int]) -> set[int]:
        seen = set(functions)
        pending = list(functions)
        while pending:
            for caller in self._callers.get(pending.pop(), _NONE):
                if caller not in seen and caller not in closed:
                    seen.add(caller)
                    pending.append(caller)
        return seen

    def _body(self, function: int) -> "dict[int, Instruction]":
        known = self._bodies.get(function)
        if known is None:
            known = self._bodies[function] = self._graph.body(function)
        return known

    def _name(self, function: int) -> str:
        known = self._names.get(function)
        if known is None:
            symbol = self._binary.symbol_at(function)
            known = self._names[function] = f"{function:#x}" if symbol is None else symbol.name
        return known


class _Search:
    """The way from the start of a context, breadth first, not through gates."""

    def __init__(
        self,
        graph: "Graph",
        starts: tuple[int, ...],
        part: "tuple[int, frozenset[int]] | None",
        closed: frozenset[int],
    ) -> None:
        self._graph = graph
        self._starts = starts
        self.part = part
        self._closed = closed
        self._came: dict[int, Edge | None] = {}
        #: The gates that are reached, open and closed.
        self.met: set[int] = set()

    def run(self, middle: frozenset[int]) -> frozenset[int]:
        """Return the functions that are reached without entering the core or a closed gate."""
        near = set(self._starts)
        self.met = set()
        self._came = dict.fromkeys(self._starts)
        pending = deque(self._starts)
        while pending:
            for edge in self._edges(pending.popleft()):
                target = edge.target
                if target in self._came:
                    continue
                self._came[target] = edge
                if target in self._closed or target in middle:
                    self.met.add(target)
                else:
                    near.add(target)
                    pending.append(target)
        return frozenset(near)

    def way_to(self, function: int) -> list[Edge]:
        """Return a shortest way to a function that was reached."""
        way: list[Edge] = []
        edge = self._came.get(function)
        while edge is not None:
            way.append(edge)
            source = edge.source
            if self.part is not None and source == self.part[0] and source not in self._came:
                break
            edge = self._came.get(source)
        return way[::-1]

    def real(self, function: int) -> int:
        """Return the function that a start stands for."""
        return self.part[0] if function == _START and self.part is not None else function

    def _edges(self, function: int) -> "Iterator[Edge]":
        for edge in self._graph.edges(self.real(function)):
            if edge.is_guess:
                continue
            if function != _START or (self.part is not None and edge.site in self.part[1]):
                yield edge


def _reason(why: "Reason | None") -> dict[str, str | None]:
    if why is None:
        return {"reason": None, "source": None, "by": None}
    return why._asdict()


def _identity(*parts: str) -> str:
    """Return an id that survives a rebuild: made of names, not of addresses."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
