"""Injects events into a window, one run at a time, and judges each run.

A run: back to the window's start, on to the boundary, the event, on to the compare point or to
a verdict. Runs do not depend on each other: the same run always gives the same result.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Final, NamedTuple, NoReturn

from trapline.base.errors import NotReproducibleError
from trapline.explore import events
from trapline.explore.course import Course, Run
from trapline.explore.events import Decision
from trapline.explore.evidence import Evidence
from trapline.explore.footprints import Footprints
from trapline.explore.oracle import Oracle
from trapline.explore.places import Places, Step
from trapline.explore.runs import UNDECIDED, NotApplicableError, Runs
from trapline.explore.scenario import Inject
from trapline.explore.stacks import Stacks, size_of_stacks
from trapline.explore.watch import Ending, Watch
from trapline.explore.window import LiveWindow, ReferenceEnd
from trapline.machine.outcome import OutcomeKind
from trapline.results.explore import CLEAN, NOTHING, Result, Verdict
from trapline.results.splat import Splat

DEFAULT_BUDGET: Final = 3_000_000  # instructions from the event on
_LAST: Final = 16
_SLOW: Final = 64  # instructions before the end that are stepped through to see the last ones
_MAX_DIFFERS: Final = 12
# Endings that say more of the scenario than of the kernel, if nothing was injected: timers are
# held, and a guest may be switched off.
_OF_THE_SCENARIO: Final = (None, "hang")
_SWITCHED_OFF: Final = (OutcomeKind.POWERED_OFF, OutcomeKind.RESET)


class _Judged(NamedTuple):
    verdict: Verdict
    detail: str
    differs: tuple[str, ...] = ()
    footprint: str = ""


class ReferenceFailsError(Exception):
    """The window goes wrong although nothing is injected: that is a finding of its own."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.detail)
        self.result = result


def decide_at(window: LiveWindow, event: str, step: Step) -> Decision:
    """Apply the rules to an event at a boundary of the reference run."""
    return events.decide(window.machine.rules, event, step.conditions)


class Injector:
    """Runs the runs of one window. `reproduce` is the command line up to the scenario."""

    def __init__(self, window: LiveWindow, reproduce: str, *, budget: int = DEFAULT_BUDGET) -> None:
        self._window = window
        self._machine = window.machine
        self._vcpu = window.vcpu
        self._evidence = Evidence(window, reproduce)
        self._budget = budget
        self._watch = Watch(window)
        self._watching = ExitStack()
        self._watching.enter_context(self._machine.module.listening(self._watch))
        self._vcpu.set_breakpoints(self._watch.breakpoints)
        self._vcpu.watch_entries(self._watch.entries)
        with ExitStack() as unless_ready:
            unless_ready.callback(self.close)
            self._reference()
            unless_ready.pop_all()

    def close(self) -> None:
        """Take the watch off the machine."""
        self._vcpu.watch_entries(None)
        self._watch.way.close()
        self._watching.close()

    def reference(self) -> ReferenceEnd:
        """Run the window without an event, and return the state at its end.

        Raises ReferenceFailsError if the guest goes wrong by itself, BadInputFileError if the
        window never closes, and NotReproducibleError if it does so only sometimes.
        """
        window, watch = self._window, self._watch
        window.rewind()
        watch.reset()
        watch.stop_at(self._vcpu.instructions + len(window.steps) + self._budget)
        self._vcpu.run(watch.on_exit)
        if watch.ending is None or watch.ending.verdict is not None:
            if watch.ending is not None and self._is_kernels(watch.ending):
                self._fail()
            if window.trouble is not None:
                raise window.trouble
            why = "it never ends" if watch.ending is None else watch.ending.detail
            raise NotReproducibleError(
                f"scenario {window.scenario.name}: the window's reference run fails ({why}); "
                "choose another start."
            )
        return window.here()

    def _is_kernels(self, ending: Ending) -> bool:
        """Whether an ending without an event says something of the kernel."""
        outcome = self._machine.host.outcome
        return ending.verdict not in _OF_THE_SCENARIO and (
            ending.verdict != "td-exit" or outcome is None or outcome.kind not in _SWITCHED_OFF
        )

    def _fail(self) -> NoReturn:
        """Repeat the reference run step by step to where it goes wrong, and say so."""
        window, watch, vcpu = self._window, self._watch, self._vcpu
        window.count(wanted=True)
        window.rewind()
        watch.reset()
        watch.ends_at_oops = True
        last: deque[str] = deque(maxlen=_LAST)
        executed = 0
        while watch.ending is None and executed < len(window.steps) + self._budget:
            last.append(self._evidence.instruction())
            vcpu.step(watch.on_exit)
            executed += 1
        ending = watch.ending
        if ending is None or ending.verdict is None:
            raise NotReproducibleError(
                f"scenario {window.scenario.name}: the window's reference run fails in one go, but "
                "not step by step; choose another start."
            )
        if window.trouble is not None:
            window.cut(executed)
        splat = self._evidence.splat(f"{ending.verdict}: {ending.detail}")
        raise ReferenceFailsError(
            Result(
                scenario=window.scenario.name,
                event=NOTHING,
                boundary=min(executed, len(window.steps)) - 1,
                nested=None,
                nested_at=None,
                allowed=True,
                rule=NOTHING,
                verdict=ending.verdict,
                expected=False,
                detail=ending.detail,
                differs=(),
                instructions=executed,
                splat=splat,
                last=tuple(last),
                reproduce=splat.reproduce,
            )
        )

    def _reference(self) -> None:
        traced = self._window.end
        end = self.reference()
        if end[:3] != traced[:3]:
            raise NotReproducibleError(
                f"scenario {self._window.scenario.name}: the window ends elsewhere in one go than "
                "step by step; choose another start."
            )
        self._window.finish_reference(end)
        self._runs = Runs(self._window, self._watch, self._evidence, self._budget)
        steps = (*self._window.steps, self._window.last_step)
        places = Places(self._window.target, steps)
        stacks = Stacks(self._vcpu, size_of_stacks(self._window.target), end.rsp, end.cpl)
        stacks.add(step.rsp for step in steps)
        count = len(self._window.steps)
        self._oracle = Oracle(self._window.ends, places, count, self._runs, stacks)
        self.footprints = Footprints(self._window)

    def results(self, inject: Inject, boundary: int, *, by_rules: bool = False) -> Iterator[Result]:
        """Run all that one [[inject]] asks for at one boundary, or what the rules leave of it."""
        self._window.count(wanted=bool(inject.then))
        try:
            first = self.run(Run(inject.event, boundary), inject)
        except NotApplicableError:
            return
        if not inject.then:
            yield first
        if first.verdict not in CLEAN:
            # There is no handling to nest into, which nobody may have asked for by itself.
            if inject.then and self._speaks_for_first(inject, by_rules=by_rules):
                yield first
            return
        for nested in _nested(inject, by_rules=by_rules):
            for distance in range(boundary % inject.stride, first.instructions, inject.stride):
                with suppress(NotApplicableError):
                    yield self.run(Run(inject.event, boundary, nested, distance), inject)

    def _speaks_for_first(self, inject: Inject, *, by_rules: bool) -> bool:
        """Whether no other [[inject]] reports what its event leads to when nothing is nested."""
        likes = [
            one
            for one in self._window.scenario.inject
            if one.event == inject.event and (not one.then or _nested(one, by_rules=by_rules))
        ]
        return all(one.then for one in likes) and likes[0] == inject

    def run(self, run: Run, inject: Inject | None = None) -> Result:
        """Do one run and judge it."""
        window = self._window
        counts = run.nested is not None or (inject is not None and bool(inject.then))
        decision = decide_at(window, run.event, window.steps[run.boundary])
        with self._runs.detour():
            excused = self._oracle.prepare(run)
        course = None if counts else self._oracle.known(run)
        if course is None:
            course, decision = self._runs.do(run, excused, decision, counts=counts)
        judged = self._judge(course)
        splat: Splat | None = None
        last: tuple[str, ...] = ()
        if judged.verdict not in CLEAN:
            window.count(wanted=counts)
            splat, last = self._look_again(run, judged, course.executed)
        return Result(
            scenario=window.scenario.name,
            event=run.event,
            boundary=run.boundary,
            nested=run.nested,
            nested_at=run.nested_at,
            allowed=decision.allowed,
            rule=decision.rule,
            verdict=judged.verdict,
            expected=inject is not None and judged.verdict in inject.expect,
            detail=judged.detail,
            differs=judged.differs[:_MAX_DIFFERS],
            footprint=judged.footprint,
            instructions=course.executed,
            splat=splat,
            last=last,
            reproduce=self._evidence.command(run),
        )

    # Judgement.

    def _judge(self, course: Course) -> _Judged:
        if course.verdict is not None:
            return _Judged(course.verdict, course.detail)
        with self._runs.detour():
            judgement = self._oracle.judge(course)
        wrong = (*course.wrong, *judgement.odd)
        if wrong:
            return _Judged("corrupt", f"{wrong[0].removesuffix('.')}.", wrong)
        footprint = self.footprints.note(course, judgement)
        if course.first is None:
            return _Judged("held", "It is still held at the compare point.", (), footprint)
        at, rip = course.first
        if at > 0 or rip != self._window.steps[course.run.boundary].rip:
            return _Judged(
                "held", f"It was delivered at {self._evidence.label(rip)}.", (), footprint
            )
        if footprint:
            detail = f"It changed {self.footprints.summary(footprint)}."
            return _Judged("handled", detail, (), footprint)
        return _Judged("same", "")

    def _look_again(
        self, run: Run, judged: _Judged, executed: int
    ) -> tuple[Splat, tuple[str, ...]]:
        """Repeat a run, slowly at its end; return its last state and instructions."""
        watch, vcpu = self._watch, self._vcpu
        start = self._runs.begin(run)
        watch.ends_at_oops = judged.verdict == "oops"
        if run.nested is not None and watch.ending is None:
            self._runs.nest(run, start, UNDECIDED)
        slow = start + max(executed - _SLOW, run.nested_at or 0)
        if watch.ending is None and vcpu.instructions < slow:
            self._runs.go_on(slow)
            reached = vcpu.instructions - start
            if watch.ending is not None and reached < executed:
                # An oops is long before the end of its run.
                return self._look_again(run, judged, reached)
        last: deque[str] = deque(maxlen=_LAST)
        watch.stop_at(start + self._budget + _SLOW)
        while watch.ending is None and vcpu.instructions < start + max(executed, 1):
            last.append(self._evidence.instruction())
            vcpu.step(watch.on_exit)
        if not last or last[-1] != self._evidence.instruction():
            last.append(self._evidence.instruction())
        splat = self._evidence.splat(f"{judged.verdict}: {judged.detail}", run)
        return splat, tuple(last)


def _nested(inject: Inject, *, by_rules: bool) -> tuple[str, ...]:
    """Return what is to be injected into the handling; by the rules, that is the host's."""
    return tuple(event for event in inject.then if not by_rules or events.is_hosts(event))
