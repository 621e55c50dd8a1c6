"""Injects events into a window, one run at a time, and judges each run.

A run: back to the window's start, on to the boundary, the event, on to the compare point or to
a verdict. Runs do not depend on each other: the same run always gives the same result.
"""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final, NamedTuple, NoReturn

from trapline.base.errors import NotReproducibleError, UsageError
from trapline.boot.trace import describe
from trapline.cpu.engine import Reg
from trapline.explore import events
from trapline.explore.course import NO_CONTEXT, Context, Course, Run, Words
from trapline.explore.ends import Excused, Taken
from trapline.explore.events import Decision
from trapline.explore.footprints import Footprints
from trapline.explore.oracle import Oracle
from trapline.explore.places import Places, Step
from trapline.explore.registers import differing_registers, registers
from trapline.explore.scenario import Inject
from trapline.explore.stacks import Stacks, size_of_stacks
from trapline.explore.watch import Ending, Watch
from trapline.explore.window import LiveWindow, ReferenceEnd
from trapline.machine.observe.lastwords import take_splat
from trapline.machine.observe.recorder import Trap
from trapline.machine.outcome import OutcomeKind
from trapline.results.explore import CLEAN, NOTHING, Result, Verdict
from trapline.results.splat import Splat

DEFAULT_BUDGET: Final = 3_000_000  # instructions from the event on
_LAST: Final = 16
_SLOW: Final = 64  # instructions before the end that are stepped through to see the last ones
_TRAPS: Final = 8
_MAX_DIFFERS: Final = 12
# Endings that say more of the scenario than of the kernel, if nothing was injected: timers are
# held, and a guest may be switched off.
_OF_THE_SCENARIO: Final = (None, "hang")
_SWITCHED_OFF: Final = (OutcomeKind.POWERED_OFF, OutcomeKind.RESET)
_UNDECIDED: Final = Decision(False, "")
_MAX_STEPPED: Final = 200_000  # of a run that is stepped through


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


class NotApplicableError(UsageError):
    """The event makes no sense before this instruction."""


def decide_at(event: str, step: Step) -> Decision:
    """Apply the rules to an event at a boundary of the reference run."""
    return events.decide(event, step.conditions)


class Injector:
    """Runs the runs of one window. `reproduce` is the command line up to the scenario."""

    def __init__(self, window: LiveWindow, reproduce: str, *, budget: int = DEFAULT_BUDGET) -> None:
        self._window = window
        self._machine = window.machine
        self._vcpu = window.vcpu
        self._reproduce = reproduce
        self._budget = budget
        self._watch = Watch(window)
        self._watching = ExitStack()
        self._watching.enter_context(self._machine.module.listening(self._watch))
        self._vcpu.set_breakpoints(self._watch.breakpoints)
        self._vcpu.watch_entries(self._watch.entries)
        try:
            self._reference()
        except ReferenceFailsError:
            self.close()
            raise

    def close(self) -> None:
        """Take the watch off the machine."""
        self._vcpu.watch_entries(None)
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
            last.append(self._instruction())
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
        splat = take_splat(
            vcpu,
            window.target.symbols,
            banner=f"{ending.verdict}: {ending.detail}",
            injected=(),
            traps=tuple(_trap_line(trap) for trap in list(self._machine.recorder.last)[-_TRAPS:]),
            reproduce=self._reproduce,
        )
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
                reproduce=self._reproduce,
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
        self._usual = self._watch.counts.copy()
        self._vectors: dict[str, int] = {}
        self._before: tuple[int, Counter[int]] = 0, Counter()
        self._held_until: dict[int, int] = {}
        steps = (*self._window.steps, self._window.last_step)
        self._places = Places(self._window.target, steps)
        stacks = Stacks(self._vcpu, size_of_stacks(self._window.target), end.rsp, end.cpl)
        stacks.add(step.rsp for step in steps)
        self._oracle = Oracle(
            self._window.ends, self._places, len(self._window.steps), self, stacks
        )
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
        decision = decide_at(run.event, window.steps[run.boundary])
        with self._detour():
            excused = self._oracle.prepare(run)
        course = None if counts else self._oracle.known(run)
        if course is None:
            course, decision = self._do(run, excused, decision, counts=counts)
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
            reproduce=self._command(run),
        )

    # What the oracle asks for; see `oracle.Runner`.

    def course(self, run: Run, excused: Excused) -> Course | None:
        """Do a run; None where the event makes no sense."""
        counts = run.nested is not None
        try:
            with self._detour():
                return self._do(run, excused, _UNDECIDED, counts=counts)[0]
        except NotApplicableError:
            return None

    def length(self, run: Run) -> int | None:
        """Count the instructions that handling a run's event takes."""
        try:
            with self._detour():
                start = self._finish(run, counts=True)[0]
                ending = self._watch.ending
                executed = self._vcpu.instructions - start
        except NotApplicableError:
            return None
        if ending is None or ending.verdict is not None:
            return None
        return max(executed - (len(self._window.steps) - run.boundary), 0)

    def end(self, run: Run, later: int) -> Taken | None:
        """Return the memory at the compare point, with the clock set forward at the event."""
        try:
            with self._detour():
                self._finish(run, counts=run.nested is not None, later=later)
                ending = self._watch.ending
                if ending is None or ending.verdict is not None:
                    return None
                return self._take()
        except NotApplicableError:
            return None

    def pointers(self, run: Run) -> set[int]:
        """Step through a run; return a stack pointer for each page that they were in."""
        window, watch, vcpu = self._window, self._watch, self._vcpu
        found: dict[int, int] = {}
        with self._detour():
            window.count(wanted=run.nested is not None)
            start = self._begin(run)
            if run.nested is not None and watch.ending is None:
                self._nest(run, start, _UNDECIDED)
            watch.stop_at(start + self._budget)
            for _ in range(_MAX_STEPPED):
                if watch.ending is not None or self._has_closed(run):
                    break
                rsp = int(vcpu.regs[Reg.RSP])
                found.setdefault(rsp - 8 >> 12, rsp)
                vcpu.step(watch.on_exit)
        return set(found.values())

    def _has_closed(self, run: Run) -> bool:
        """Whether the window has closed behind what was injected."""
        return (
            self._window.is_end()
            and self._extra(run.event) > 0
            and not self._watch.is_deliverable()
        )

    @contextmanager
    def _detour(self) -> Iterator[None]:
        """Do other runs, and go on as if there had been none."""
        before = self._before
        with self._window.detour():
            yield
        self._before = before

    def _do(
        self, run: Run, excused: Excused, decision: Decision, *, counts: bool
    ) -> tuple[Course, Decision]:
        """Do a run, and take what came of it."""
        start, decision = self._finish(run, decision, counts=counts)
        watch, window = self._watch, self._window
        executed = self._vcpu.instructions - start
        ending = watch.ending
        assert ending is not None
        named = [event for event in (run.event, run.nested) if event is not None]
        vectors = {self._vector(event) for event in named}
        deliveries = watch.after(vectors, start)
        first = next((d for d in deliveries if d.vector == self._vector(run.event)), None)
        words: Words = ()
        context = NO_CONTEXT
        wrong: tuple[str, ...] = ()
        if ending.verdict is None:
            wrong = differing_registers(window.end.registers, registers(self._machine), named)
            taken = self._take()
            context = Context(
                frozenset(d.rip for d in deliveries), frozenset(d.rsp for d in deliveries)
            )
            words = window.ends.differing(taken, excused, context)
        more = self._extra(run.event)
        nested = 0 if run.nested is None else self._extra(run.nested) - (run.nested == run.event)
        course = Course(
            run=run,
            verdict=ending.verdict,
            detail=ending.detail,
            executed=executed,
            first=None if first is None else (first.instructions - start, first.rip),
            place=None if first is None else self._place(run, first.rip),
            delivered=(more > 0, nested > 0),
            words=words,
            context=context,
            wrong=wrong,
        )
        return course, decision

    def _place(self, run: Run, rip: int) -> int | None:
        """Find the boundary at which an event was delivered."""
        steps = self._window.steps
        if run.boundary < len(steps) and steps[run.boundary].rip == rip:
            return run.boundary
        if run.boundary not in self._held_until:
            self._held_until = {run.boundary: self._until(run)}
        place = self._held_until[run.boundary]
        found = self._window.last_step.rip if place == len(steps) else steps[place].rip
        return place if found == rip else None

    def _until(self, run: Run) -> int:
        """Say where an event that is held back can be delivered first, by the reference run."""
        steps = self._window.steps
        for place in range(run.boundary, len(steps)):
            if events.is_open(run.event, steps[place].conditions):
                return place
        return len(steps)

    # The course of a run.

    def _finish(
        self, run: Run, decision: Decision = _UNDECIDED, *, counts: bool, later: int = 0
    ) -> tuple[int, Decision]:
        """Do a run; return the instructions that had retired at its event, and what decided."""
        watch = self._watch
        self._window.count(wanted=counts)
        start = self._begin(run, later)
        if run.nested is not None and watch.ending is None:
            decision = self._nest(run, start, decision)
        if watch.ending is None:
            self._go_on(start + self._budget)
        if watch.ending is None:
            watch.finish("hang", f"The budget of {self._budget:,} instructions is used up.")
        return start, decision

    def _begin(self, run: Run, later: int = 0) -> int:
        """Go to the boundary and inject; return how many instructions had retired there.

        The virtual clock is set forward so many cycles before.
        """
        self._go_to(run.boundary)
        if later:
            self._vcpu.cycles += later
        start = self._vcpu.instructions
        self._inject(run.event)
        return start

    def _go_to(self, boundary: int) -> None:
        """Go to a boundary, and count what is delivered on the way."""
        window, watch, vcpu = self._window, self._watch, self._vcpu
        number, counts = self._before
        watch.reset(counts if number <= boundary else None)
        window.go_to(boundary, watch.on_exit)
        self._before = boundary, watch.counts.copy()
        last = boundary == len(window.steps)
        expected = window.last_step.rip if last else window.steps[boundary].rip
        if vcpu.regs[Reg.RIP] != expected:
            raise NotReproducibleError(
                f"scenario {window.scenario.name}: boundary {boundary} is at "
                f"{int(vcpu.regs[Reg.RIP]):#x} and was at {expected:#x}: the window does not "
                "repeat."
            )

    def _inject(self, event: str) -> None:
        if event == "mce" and not self._watch.note_delivery(events.VECTOR_MC):
            return
        if not events.applies(self._machine, event):
            raise NotApplicableError(
                f"{event} makes no sense here: {self._instruction()} does not access memory."
            )
        events.inject(self._machine, event)
        outcome = self._machine.host.outcome
        if outcome is not None:
            self._watch.finish("td-exit", outcome.detail)

    def _nest(self, run: Run, start: int, decision: Decision) -> Decision:
        """Inject the second event; return the decision that matters for the run."""
        assert run.nested is not None
        assert run.nested_at is not None
        if run.nested_at:
            self._go_on(start + run.nested_at)
        if self._watch.ending is not None:
            return decision
        second = events.decide(run.nested, events.conditions(self._machine))
        self._inject(run.nested)
        return Decision(decision.allowed and second.allowed, second.rule)

    def _go_on(self, limit: int) -> None:
        self._watch.stop_at(limit)
        self._vcpu.run(self._watch.on_exit)

    # Judgement.

    def _judge(self, course: Course) -> _Judged:
        if course.verdict is not None:
            return _Judged(course.verdict, course.detail)
        with self._detour():
            judgement = self._oracle.judge(course)
        wrong = (*course.wrong, *judgement.odd)
        if wrong:
            return _Judged("corrupt", f"{wrong[0].removesuffix('.')}.", wrong)
        footprint = self.footprints.note(course, judgement)
        if course.first is None:
            return _Judged("held", "It is still held at the compare point.", (), footprint)
        at, rip = course.first
        if at > 0 or rip != self._window.steps[course.run.boundary].rip:
            return _Judged("held", f"It was delivered at {self._label(rip)}.", (), footprint)
        if footprint:
            detail = f"It changed {self.footprints.summary(footprint)}."
            return _Judged("handled", detail, (), footprint)
        return _Judged("same", "")

    def _take(self) -> Taken:
        """Copy what the run wrote; the machine may be elsewhere after that."""
        window = self._window
        taken = window.ends.take(window.pages_written())
        unknown = window.ends.unknown(taken)
        if unknown:
            window.rewind()
            window.ends.learn(unknown)
        return taken

    def _vector(self, event: str) -> int:
        if event not in self._vectors:
            self._vectors[event] = events.vector_of(self._machine, event)
        return self._vectors[event]

    def _extra(self, event: str) -> int:
        """How much oftener than in the reference the event was delivered."""
        vector = self._vector(event)
        return self._watch.counts[vector] - self._usual[vector]

    # Evidence.

    def _look_again(
        self, run: Run, judged: _Judged, executed: int
    ) -> tuple[Splat, tuple[str, ...]]:
        """Repeat a run, slowly at its end; return its last state and instructions."""
        watch, vcpu = self._watch, self._vcpu
        start = self._begin(run)
        watch.ends_at_oops = judged.verdict == "oops"
        if run.nested is not None and watch.ending is None:
            self._nest(run, start, _UNDECIDED)
        slow = start + max(executed - _SLOW, run.nested_at or 0)
        if watch.ending is None and vcpu.instructions < slow:
            self._go_on(slow)
            reached = vcpu.instructions - start
            if watch.ending is not None and reached < executed:
                # An oops is long before the end of its run.
                return self._look_again(run, judged, reached)
        last: deque[str] = deque(maxlen=_LAST)
        watch.stop_at(start + self._budget + _SLOW)
        while watch.ending is None and vcpu.instructions < start + max(executed, 1):
            last.append(self._instruction())
            vcpu.step(watch.on_exit)
        if not last or last[-1] != self._instruction():
            last.append(self._instruction())
        splat = take_splat(
            vcpu,
            self._window.target.symbols,
            banner=f"{judged.verdict}: {judged.detail}",
            injected=tuple(self._announce(run)),
            traps=tuple(_trap_line(trap) for trap in list(self._machine.recorder.last)[-_TRAPS:]),
            reproduce=self._command(run),
        )
        return splat, tuple(last)

    def _instruction(self) -> str:
        rip = int(self._vcpu.regs[Reg.RIP])
        is_user = self._vcpu.cpl == 3
        return f"{self._label(rip, is_user=is_user)}: {self._window.text(rip)}"

    def _label(self, rip: int, *, is_user: bool = False) -> str:
        return self._window.target.symbols.locate(rip, is_user=is_user).label

    def _announce(self, run: Run) -> Iterator[str]:
        boundary = self._window.boundaries[run.boundary]
        yield (
            f"{run.event} before instruction {run.boundary} of {self._window.scenario.name}, "
            f"{boundary.function}+{boundary.offset:#x} ({boundary.instruction})"
        )
        if run.nested is not None:
            yield f"{run.nested} {run.nested_at} instructions later"

    def _command(self, run: Run) -> str:
        event, at = run.event, str(run.boundary)
        if run.nested is not None:
            event, at = f"{event},{run.nested}", f"{at},{run.nested_at}"
        return f"{self._reproduce} --event {event} --at {at}"


def _nested(inject: Inject, *, by_rules: bool) -> tuple[str, ...]:
    """Return what is to be injected into the handling; by the rules, that is the host's."""
    return tuple(event for event in inject.then if not by_rules or events.is_hosts(event))


def _trap_line(trap: Trap) -> str:
    return " ".join(f"{name}={value}" for name, value in describe(trap).items())
