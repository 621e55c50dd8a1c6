"""One process's share of a campaign: boots the kernel, opens windows one after the other, runs.

Scenarios with the same addition to the command line share a boot, in the order in which their
windows open; each window is left as if it had not been.
"""

import hashlib
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import msgspec

from trapline.base.errors import BadInputFileError
from trapline.explore.course import Run
from trapline.explore.died import death, has_died
from trapline.explore.events import INT80_VECTOR
from trapline.explore.gates import Gate
from trapline.explore.inject import DEFAULT_BUDGET, Injector, ReferenceFailsError, decide_at
from trapline.explore.places import entry_code
from trapline.explore.scenario import Inject, Scenario, family
from trapline.explore.triggers import Triggers, lacking
from trapline.explore.window import LiveWindow
from trapline.guest.target import Target, TargetSource
from trapline.linux import names
from trapline.results.explore import Forbidden, NotOpened, NotTried, Result, Window

if TYPE_CHECKING:
    from trapline.machine.machine import Machine

_DIGEST_SIZE: Final = 16
# A host may end a guest whenever it likes: a vector that does is no finding.
_ENDS_BY_HOST: Final = ("panic", "td-exit", "hang")
# CPUID.(7,1):EAX (Intel, Flexible Return and Event Delivery, 3.1).
_FRED_LEAF: Final = (7, 1, "eax")
_FRED_BIT: Final = 17


class Exactly(NamedTuple):
    """One run that the user asks for, whatever the rules say of it."""

    boundary: int
    nested_at: int | None = None


class StageConfig(NamedTuple):
    """All that results depend on; the same in each process of a campaign.

    `references` are what the user called the scenarios, for command lines that reproduce a run.
    """

    source: TargetSource
    scenarios: tuple[Scenario, ...]
    references: tuple[str, ...]
    beyond_rules: bool = False
    exactly: Exactly | None = None
    budget: int = DEFAULT_BUDGET
    # The scenarios are all that ship: what this kernel has no code for is told, not an error.
    is_all_shipped: bool = False

    @property
    def digest(self) -> str:
        """A name for what is run, without the kernel."""
        parts = (
            self.scenarios,
            self.beyond_rules,
            self.exactly,
            self.budget,
            self.source.memory,
            self.source.command_line,
            hashlib.blake2b(self.source.initrd, digest_size=_DIGEST_SIZE).hexdigest(),
        )
        data = msgspec.msgpack.encode(parts)
        return hashlib.blake2b(data, digest_size=_DIGEST_SIZE).hexdigest()


class Task(NamedTuple):
    """What is run at once: all of one [[inject]] at one boundary."""

    scenario: str
    inject: int
    boundary: int


class Plan(NamedTuple):
    """A window that is open, and the boundaries to be tried for each of its [[inject]]s.

    `failure` is what the window comes to without any event, if that is wrong already.
    """

    window: Window
    boundaries: tuple[tuple[int, ...], ...]
    failure: Result | None = None


class Stage:
    """Goes through the windows of all scenarios. Use as a context manager."""

    def __init__(self, config: StageConfig) -> None:
        self._config = config
        self._target = Target(config.source)
        self._machine: Machine | None = None
        self._injector: Injector | None = None
        self._window: LiveWindow | None = None
        self.not_opened: list[NotOpened] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()
        self._target.binary.close()

    def plans(self) -> Iterator[Plan]:
        """Open one window after the other; `run` is for the last one given."""
        scenarios = self._config.scenarios
        for append, mmio_uart in dict.fromkeys((s.append, s.mmio_uart) for s in scenarios):
            group = [
                s
                for s in scenarios
                if (s.append, s.mmio_uart) == (append, mmio_uart) and self._is_possible(s)
            ]
            if not group:
                continue
            self._machine = self._target.machine(append, mmio_uart=mmio_uart)
            triggers = Triggers(self._machine, self._target, group)
            has_failed = False
            while (opening := triggers.next()) is not None:
                self._window = LiveWindow(self._machine, self._target, opening)
                name = opening.scenario.name
                try:
                    self._injector = Injector(
                        self._window, self._command(opening.scenario), budget=self._config.budget
                    )
                except ReferenceFailsError as failure:
                    if opening.is_one_of and failure.result.verdict in _ENDS_BY_HOST:
                        self.not_opened.append(NotOpened(scenario=name, why=_alone(failure.result)))
                    else:
                        has_failed = True
                        yield Plan(_document(self._window), (), failure.result)
                except BadInputFileError:
                    if not opening.is_one_of:
                        raise
                    why = "the handler of this vector does not come back"
                    self.not_opened.append(NotOpened(scenario=name, why=why))
                else:
                    yield self._plan(self._window)
                    self._injector.close()
                self._window.leave()
            yield from self._missing(triggers.missing, has_failed=has_failed)
            self._close()

    def _missing(self, scenarios: Sequence[Scenario], *, has_failed: bool) -> Iterator[Plan]:
        """Tell of windows that did not open; a guest that died by itself is a finding, once."""
        assert self._machine is not None
        outcome = self._machine.host.outcome
        why = "its window did not open before the guest ended"
        if scenarios and outcome is not None and has_died(outcome):
            why = f"the guest died before its window opened: {outcome.detail.removesuffix('.')}"
            if not has_failed:
                first, *scenarios = scenarios
                window, result = death(self._machine, self._target, first, self._command(first))
                yield Plan(window, (), result)
        self.not_opened += [NotOpened(scenario=one.name, why=why) for one in scenarios]

    def run(self, task: Task) -> list[Result]:
        """Run a task of the window that is open."""
        assert self._injector is not None
        assert self._window is not None
        inject = self._window.scenario.inject[task.inject]
        exactly = self._config.exactly
        if exactly is not None:
            nested = inject.then[0] if inject.then else None
            run = Run(inject.event, exactly.boundary, nested, exactly.nested_at)
            result = self._injector.run(run, inject)
            if exactly.nested_at is not None and result.instructions < exactly.nested_at:
                raise BadInputFileError(
                    f"scenario {result.scenario}: {inject.event} before instruction "
                    f"{exactly.boundary} is over after {result.instructions:,} instructions; "
                    f"{nested} cannot come {exactly.nested_at:,} behind it."
                )
            return [result]
        by_rules = not self._config.beyond_rules
        return list(self._injector.results(inject, task.boundary, by_rules=by_rules))

    def footprints(self) -> tuple[tuple[str, bytes], ...]:
        """Return id and document of the footprints that came up since the last time."""
        assert self._injector is not None
        return self._injector.footprints.take()

    def _is_possible(self, scenario: Scenario) -> bool:
        """Whether the kernel has all symbols that a scenario names."""
        name = lacking(scenario, self._target)
        if name is None:
            return True
        why = f"this kernel has no symbol {name!r}"
        if not self._config.is_all_shipped:
            raise BadInputFileError(f"scenario {scenario.name}: {why}; name one that it has.")
        self.not_opened.append(NotOpened(scenario=scenario.name, why=why))
        return False

    def _close(self) -> None:
        if self._machine is not None:
            self._machine.close()
            self._machine = None

    def _command(self, scenario: Scenario) -> str:
        """Return the command line up to the scenario."""
        names = [s.name for s in self._config.scenarios]
        name = scenario.name if scenario.name in names else family(scenario.name)
        reference = self._config.references[names.index(name)]
        if name != scenario.name:
            reference += scenario.name.removeprefix(name)
        source = self._config.source
        words = ["trapline", "explore", source.kernel, *source.options, "--scenario", reference]
        return shlex.join(words)

    def _plan(self, window: LiveWindow) -> Plan:
        forbidden: list[Forbidden] = []
        not_tried = list(_untried_entries(window))
        boundaries = []
        for inject in window.scenario.inject:
            chosen: tuple[int, ...]
            why = _not_possible(window, inject)
            if why is not None:
                chosen = ()
                not_tried.append(NotTried(event=inject.event, why=why))
            elif self._config.exactly is not None:
                chosen = (self._exact_boundary(window),)
            elif self._config.beyond_rules:
                chosen = _places(window, inject)
            else:
                chosen, refused = _allowed(window, inject)
                forbidden += refused
            boundaries.append(chosen)
        return Plan(_document(window, forbidden, not_tried), tuple(boundaries))

    def _exact_boundary(self, window: LiveWindow) -> int:
        assert self._config.exactly is not None
        boundary = self._config.exactly.boundary
        if boundary >= len(window.steps):
            raise BadInputFileError(
                f"scenario {window.scenario.name}: its window has {len(window.steps):,} "
                f"instructions, numbered from 0; there is no {boundary}."
            )
        return boundary


def _document(
    window: LiveWindow, forbidden: Sequence[Forbidden] = (), not_tried: Sequence[NotTried] = ()
) -> Window:
    return Window(
        scenario=window.scenario.name,
        title=window.scenario.title,
        instructions=len(window.steps),
        boundaries=window.boundaries,
        forbidden=tuple(forbidden),
        not_tried=tuple(not_tried),
    )


def _untried_entries(window: LiveWindow) -> Iterator[NotTried]:
    """Tell of entry code that the kernel has for a processor that is not this one."""
    features = window.vcpu.cpuid_features
    if features.get(_FRED_LEAF, 0) >> _FRED_BIT & 1:
        return
    entries = window.target.addresses(names.FRED_ENTRIES)
    if entries:
        yield NotTried(
            event="FRED",
            why="the processor of the model does not offer it: events come through the IDT, and "
            f"{' and '.join(entries.values())} are not reached",
        )


def _not_possible(window: LiveWindow, inject: Inject) -> str | None:
    """Say why a kernel cannot take an event as what it is meant to be; None if it can.

    Vector 0x80 is a system call only where a gate leads to one: without IA32_EMULATION it is an
    external interrupt like others, and `irq:0x80` tries it as that.
    """
    if inject.event != "int80":
        return None
    gate = Gate.read(window.vcpu, INT80_VECTOR)
    if gate is None or not gate.is_present:
        return "the IDT has no gate for vector 0x80"
    symbol = window.target.binary.symbol_at(gate.handler)
    name = None if symbol is None else symbol.name
    if name is not None and window.target.names.int80.fullmatch(name):
        return None
    label = window.target.symbols.locate(gate.handler).label
    return f"vector 0x80 is no system call of this kernel: its gate leads to {label}"


def _alone(result: Result) -> str:
    """Say what a vector comes to without any other event."""
    return f"the vector alone leads to {result.verdict}: {result.detail.removesuffix('.')}"


def _places(window: LiveWindow, inject: Inject) -> tuple[int, ...]:
    """Return the boundaries that an [[inject]] is about."""
    count = len(window.steps)
    code = entry_code(window.target) if inject.where == "entry" else ()
    if not code:
        return tuple(range(window.first, count))
    # What an interrupt comes to is not inside, though it is the kernel's.
    inside = [
        number
        for number, step in enumerate(window.steps[window.first :], window.first)
        if step.cpl == 0 and not any(step.rip in where for where in code)
    ]
    if not inside:
        return tuple(range(window.first, count))
    return (*range(window.first, inside[0]), *range(inside[-1] + 1, count))


def _allowed(window: LiveWindow, inject: Inject) -> tuple[tuple[int, ...], Sequence[Forbidden]]:
    """Return the boundaries at which the rules allow an [[inject]], or some of what it nests."""
    refused: Counter[tuple[str, str]] = Counter()
    chosen = []
    for number in _places(window, inject):
        step = window.steps[number]
        decision = decide_at(window, inject.event, step)
        if not decision.allowed:
            refused[",".join((inject.event, *inject.then)), decision.rule] += 1
            continue
        nested = [(event, decide_at(window, event, step)) for event in inject.then]
        for event, second in nested:
            if not second.allowed:
                refused[f"{inject.event},{event}", second.rule] += 1
        if not nested or any(second.allowed for _, second in nested):
            chosen.append(number)
    return tuple(chosen), [
        Forbidden(event=name, rule=rule, boundaries=count)
        for (name, rule), count in refused.items()
    ]
