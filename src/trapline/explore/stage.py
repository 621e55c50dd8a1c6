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
from trapline.explore.inject import DEFAULT_BUDGET, Injector, ReferenceFailsError, decide_at
from trapline.explore.scenario import Inject, Scenario
from trapline.explore.triggers import Triggers, lacking
from trapline.explore.window import LiveWindow
from trapline.guest.target import Target, TargetSource
from trapline.results.explore import Forbidden, NotOpened, Result, Window

if TYPE_CHECKING:
    from trapline.machine.machine import Machine

_DIGEST_SIZE: Final = 16


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
            while (opening := triggers.next()) is not None:
                self._window = LiveWindow(self._machine, self._target, opening)
                try:
                    self._injector = Injector(
                        self._window, self._command(opening.scenario), budget=self._config.budget
                    )
                except ReferenceFailsError as failure:
                    yield Plan(_document(self._window), (), failure.result)
                else:
                    yield self._plan(self._window)
                    self._injector.close()
                self._window.leave()
            self.not_opened += [
                NotOpened(
                    scenario=scenario.name, why="its window did not open before the guest ended"
                )
                for scenario in triggers.missing
            ]
            self._close()

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
        reference = self._config.references[names.index(scenario.name)]
        source = self._config.source
        words = ["trapline", "explore", source.kernel, *source.options, "--scenario", reference]
        return shlex.join(words)

    def _plan(self, window: LiveWindow) -> Plan:
        forbidden: list[Forbidden] = []
        boundaries = []
        for inject in window.scenario.inject:
            chosen: tuple[int, ...]
            if self._config.exactly is not None:
                chosen = (self._exact_boundary(window),)
            elif self._config.beyond_rules:
                chosen = tuple(range(len(window.steps)))
            else:
                chosen, refused = _allowed(window, inject)
                forbidden += refused
            boundaries.append(chosen)
        return Plan(_document(window, forbidden), tuple(boundaries))

    def _exact_boundary(self, window: LiveWindow) -> int:
        assert self._config.exactly is not None
        boundary = self._config.exactly.boundary
        if boundary >= len(window.steps):
            raise BadInputFileError(
                f"scenario {window.scenario.name}: its window has {len(window.steps):,} "
                f"instructions, numbered from 0; there is no {boundary}."
            )
        return boundary


def _document(window: LiveWindow, forbidden: Sequence[Forbidden] = ()) -> Window:
    return Window(
        scenario=window.scenario.name,
        title=window.scenario.title,
        instructions=len(window.steps),
        boundaries=window.boundaries,
        forbidden=tuple(forbidden),
    )


def _allowed(window: LiveWindow, inject: Inject) -> tuple[tuple[int, ...], Sequence[Forbidden]]:
    """Return the boundaries at which the rules allow an [[inject]], or some of what it nests."""
    refused: Counter[tuple[str, str]] = Counter()
    chosen = []
    for number, step in enumerate(window.steps):
        decision = decide_at(inject.event, step)
        if not decision.allowed:
            refused[",".join((inject.event, *inject.then)), decision.rule] += 1
            continue
        nested = [(event, decide_at(event, step)) for event in inject.then]
        for event, second in nested:
            if not second.allowed:
                refused[f"{inject.event},{event}", second.rule] += 1
        if not nested or any(second.allowed for _, second in nested):
            chosen.append(number)
    return tuple(chosen), [
        Forbidden(event=name, rule=rule, boundaries=count)
        for (name, rule), count in refused.items()
    ]
