"""Does the runs of one window: goes to a boundary, injects, goes on to the end, takes what is left.

Judges nothing. Runs do not depend on each other: the same run always comes to the same.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from trapline.base.errors import NotReproducibleError, UsageError
from trapline.cpu.engine import Exit, Reg
from trapline.explore import events
from trapline.explore.course import NO_CONTEXT, NO_WORDS, Context, Course, Run
from trapline.explore.ends import Excused, Taken
from trapline.explore.events import Decision
from trapline.explore.evidence import Evidence
from trapline.explore.registers import differing_registers, registers
from trapline.explore.watch import Passed, Watch
from trapline.explore.window import LiveWindow

UNDECIDED: Final = Decision(False, "")
# A twin's clock is set forward again each so many instructions, by a part of the first time.
_SLICE: Final = 40
_SLICES: Final = 2_000
_PART: Final = 8
_CLOSELY: Final = 16  # each so many boundaries a run's way is looked at closely
_MAX_STEPPED: Final = 200_000  # of a run that is stepped through


class NotApplicableError(UsageError):
    """The event makes no sense before this instruction."""


class Runs:
    """Runs of a window whose reference run has just come to its end under `watch`.

    A run that executes more than `budget` instructions from its event on hangs.
    """

    def __init__(self, window: LiveWindow, watch: Watch, evidence: Evidence, budget: int) -> None:
        self._window = window
        self._machine = window.machine
        self._vcpu = window.vcpu
        self._watch = watch
        self._evidence = evidence
        self._budget = budget
        self._usual = watch.counts.copy()
        self._vectors: dict[str, int] = {}
        self._before = 0, Passed(Counter(), None)
        self._held_until: dict[int, int] = {}

    # What the oracle asks for; see `oracle.Runner`.

    def course(self, run: Run, excused: Excused) -> Course | None:
        """Do a run; None where the event makes no sense."""
        counts = run.nested is not None
        try:
            with self.detour():
                return self.do(run, excused, UNDECIDED, counts=counts)[0]
        except NotApplicableError:
            return None

    def length(self, run: Run) -> int | None:
        """Count the instructions that handling a run's event takes, up to where it came.

        0 for one that is held back, None for one from which the guest does not come back.
        """
        window, watch, vcpu = self._window, self._watch, self._vcpu
        window.count(wanted=True)
        rip, rsp = window.step_at(run.boundary)[:2]
        back: list[int] = []

        def on_exit(exit_: Exit) -> None:
            if (
                exit_ is Exit.BREAKPOINT
                and self._extra(run.event) > 0
                and (vcpu.regs[Reg.RIP], vcpu.regs[Reg.RSP]) == (rip, rsp)
            ):
                back.append(vcpu.instructions)
                vcpu.stop()
            else:
                watch.on_exit(exit_)

        with self.detour():
            try:
                start = self.begin(run)
            except NotApplicableError:
                return None
            if not events.is_open(self._machine.rules, run.event, events.conditions(self._machine)):
                return 0
            vcpu.set_breakpoints(watch.breakpoints | {rip})
            try:
                watch.stop_at(start + self._budget)
                if watch.ending is None:
                    vcpu.run(on_exit)
            finally:
                vcpu.set_breakpoints(watch.breakpoints)
        return back[0] - start if back else None

    def end(self, run: Run, later: int) -> Taken | None:
        """Return the memory at the compare point, with the clock set forward at the event."""
        try:
            with self.detour():
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
        with self.detour():
            window.count(wanted=run.nested is not None)
            start = self.begin(run)
            if run.nested is not None and watch.ending is None:
                self.nest(run, start, UNDECIDED)
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
    def detour(self) -> Iterator[None]:
        """Do other runs, and go on as if there had been none."""
        before = self._before
        with self._window.detour():
            yield
        self._before = before

    def do(
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
        words = NO_WORDS
        context = NO_CONTEXT
        wrong: tuple[str, ...] = ()
        if ending.verdict is None:
            wrong = differing_registers(
                window.end.registers, registers(self._machine), named, is_return=window.is_return
            )
            taken = self._take()
            context = Context(
                frozenset(d.rip for d in deliveries),
                frozenset(d.rflags for d in deliveries),
                excused.stacks.holding({d.rsp for d in deliveries}),
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
        return place if self._window.step_at(place).rip == rip else None

    def _until(self, run: Run) -> int:
        """Say where an event that is held back can be delivered first, by the reference run."""
        steps = self._window.steps
        for place in range(run.boundary, len(steps)):
            if events.is_open(self._machine.rules, run.event, steps[place].conditions):
                return place
        return len(steps)

    # The course of a run.

    def _finish(
        self, run: Run, decision: Decision = UNDECIDED, *, counts: bool, later: int = 0
    ) -> tuple[int, Decision]:
        """Do a run; return the instructions that had retired at its event, and what decided."""
        self._window.count(wanted=counts)
        skims = run.boundary % _CLOSELY != 0
        found = self._once(run, decision, later, skims=skims)
        return found if not self._watch.way.is_in_doubt else self._once(run, decision, later)

    def _once(
        self, run: Run, decision: Decision, later: int, *, skims: bool = False
    ) -> tuple[int, Decision]:
        watch = self._watch
        start = self.begin(run, later, skims=skims)
        if run.nested is not None and watch.ending is None:
            decision = self.nest(run, start, decision)
        if later:
            self._hurry(later // _PART)
        if watch.ending is None:
            self.go_on(start + self._budget)
        if watch.ending is None:
            watch.finish("hang", f"The budget of {self._budget:,} instructions is used up.")
        return start, decision

    def _hurry(self, step: int) -> None:
        """Let the clock go faster than the guest: how long something took is a time, too."""
        for number in range(_SLICES):
            if self._watch.ending is not None:
                return
            self.go_on(self._vcpu.instructions + _SLICE)
            self._vcpu.cycles += step + number % 7

    def begin(self, run: Run, later: int = 0, *, skims: bool = False) -> int:
        """Go to the boundary and inject; return how many instructions had retired there.

        The virtual clock is set forward so many cycles before, and chance gets another seed.
        `skims`: from there on the watch looks less closely (`Way.skim`).
        """
        self._go_to(run.boundary)
        if skims:
            self._watch.way.skim()
        if later:
            self._vcpu.cycles += later
            self._vcpu.reseed(later)
        start = self._vcpu.instructions
        self._inject(run.event)
        return start

    def _go_to(self, boundary: int) -> None:
        """Go to a boundary, and count what is delivered on the way."""
        window, watch, vcpu = self._window, self._watch, self._vcpu
        number, passed = self._before
        watch.reset(passed if number <= boundary else None)
        window.go_to(boundary, watch.on_exit)
        self._before = boundary, watch.passed
        expected = window.step_at(boundary).rip
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
            here = self._evidence.instruction()
            raise NotApplicableError(f"{event} makes no sense here: {here} does not access memory.")
        events.inject(self._machine, event)
        outcome = self._machine.host.outcome
        if outcome is not None:
            self._watch.finish("td-exit", outcome.detail)

    def nest(self, run: Run, start: int, decision: Decision) -> Decision:
        """Inject the second event; return the decision that matters for the run."""
        assert run.nested is not None
        assert run.nested_at is not None
        if run.nested_at:
            self.go_on(start + run.nested_at)
        if self._watch.ending is not None:
            return decision
        second = events.decide(self._machine.rules, run.nested, events.conditions(self._machine))
        self._inject(run.nested)
        return Decision(decision.allowed and second.allowed, second.rule)

    def go_on(self, limit: int) -> None:
        """Let the guest go on until so many instructions have retired, or the run is over."""
        self._watch.stop_at(limit)
        self._vcpu.run(self._watch.on_exit)

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
