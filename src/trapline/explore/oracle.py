"""Is what a run left behind what its event does? Learnt from the event itself, without names.

What an event changes by its own nature is the same wherever any kernel must take it. So each
run is asked what one asks of an operation on a linearizable object: is its outcome that of the
same event just before, or just after, at an ordinary place (`places`)? An outcome is the set of
words that differ from the reference's end, but for what is excused (`ends`): times, which a twin
of a run tells at another virtual time, and dead stack, which stack pointers tell.

Where an event is held back, the place is that of its delivery. Long windows go through phases,
each with an outcome of its own; one that a few instructions have to themselves, between places
that agree, is none. Windows without an ordinary place are judged by what most of them does. And
whatever all runs do, some memory no event may change (`DataMap.guarded`).

All that is asked for depends on the window and the run alone, so that any process comes to the
same judgement.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from trapline.explore.course import FPU_WORD, Context, Course, Run, Word, Words
from trapline.explore.ends import Ends, Excused, Taken
from trapline.explore.places import Places
from trapline.explore.stacks import Stacks
from trapline.results.explore import Basis

_APART: Final = 128  # ordinary places from one anchor to the next, if there are so many
_ANCHORS: Final = 4
_NEAR: Final = 8  # ordinary places looked at on each side where anchors do not tell
_PHASE: Final = 4  # of them must agree for a phase of its own
_SAMPLE: Final = 12  # boundaries that stand for a window without ordinary places
_LATER: Final = (7_919, 104_729)  # cycles that the twins' clocks are set forward
_LONG: Final = 2_000  # instructions of a window from which on the first run is stepped through

_CONTEXT: Final = {
    "rip": "the interrupted RIP",
    "flags": "the interrupted RFLAGS",
    "stack": "a pointer into the interrupted stack",
}

Key = tuple[str, str | None]


class Runner(Protocol):
    """Does runs. None of what it returns depends on what it did before."""

    def course(self, run: Run, excused: Excused) -> Course | None:
        """Do a run; None where the event makes no sense."""

    def length(self, run: Run) -> int | None:
        """Count the instructions that handling a run's event takes."""

    def end(self, run: Run, later: int) -> Taken | None:
        """Return the memory at the compare point, with the clock set forward at the event."""

    def pointers(self, run: Run) -> Iterable[int]:
        """Step through a run; return its stack pointers."""


class Judgement(NamedTuple):
    """`odd` says what differs from what the event does.

    `usual` are the words that it changes, `times` those that follow the virtual clock.
    """

    odd: tuple[str, ...]
    usual: Words
    basis: Basis
    times: frozenset[int] = frozenset()


class Habit:
    """What one event does in a window, or one event in the handling of another."""

    def __init__(
        self, key: Key, ends: Ends, places: Places, count: int, runner: Runner, bare: Stacks
    ) -> None:
        self._key = key
        self._ends = ends
        self._runner = runner
        self._places = places
        self._courses: dict[int, Course | None] = {}
        self.excused = Excused(bare)
        self._spread = tuple(range(0, count, -(-count // _SAMPLE)))
        steps = count >= _LONG or key[0].startswith("irq:")
        # Boundaries to learn from, in order. Where an event cannot come at an ordinary place (a
        # #VE that the kernel takes for a fault of user mode), the window has none for it.
        self.samples = places.all
        self.basis: Basis = "ordinary"
        if not self.samples or not self._learn(steps=steps):
            self.basis = "most"
            self.samples = self._spread
            self._learn(steps=steps)
        self._apart = max(1, min(_APART, len(self.samples) // _ANCHORS))
        self.most: Course | None = None
        if self.basis == "most":
            self.most = _mode(self._at(place) for place in self.samples)

    def at(self, place: int) -> Course | None:
        """Return what a run at a place came to; None if it did not come to the end."""
        return self._at(place)

    def keep(self, course: Course) -> None:
        """Note a run that was asked for, and that may be asked for again here."""
        if self._key[1] is None and course.run.boundary in self._places.modes:
            self._courses.setdefault(course.run.boundary, _come(course))

    def known(self, run: Run) -> Course | None:
        """Return what a run came to that has been done here."""
        return self._courses.get(run.boundary) if self._key[1] is None else None

    def anchor(self, place: int) -> int:
        """Return the last anchor that is not behind a place, or the first."""
        index = bisect_left(self.samples, place + 1) - 1
        return self.samples[max(index, 0) // self._apart * self._apart]

    def anchors(self, place: int) -> Iterator[Course]:
        """Yield what the anchors around a place came to."""
        apart = self._apart
        index = max(bisect_left(self.samples, place + 1) - 1, 0) // apart * apart
        for at in (index, index + apart, index - apart):
            if 0 <= at < len(self.samples) and self.samples[at] != place:
                course = self._at(self.samples[at])
                if course is not None:
                    yield course

    def near(self, place: int, run: Run) -> tuple[list[Course], list[Course]]:
        """Return what ordinary places just before and just after one came to, nearest first.

        For an ordinary place they are of its mode, if there are any others.
        """
        places: Sequence[int] = self._places.all
        if place in self._places.modes:
            alike = self._places.of_mode(place)
            places = alike if len(alike) > 1 else places
        at = bisect_left(places, place)
        sides = places[max(at - _NEAR, 0) : at], places[at : at + _NEAR + 1]
        before, after = (
            [c for p in side if p != run.boundary and (c := self._at(p)) is not None]
            for side in sides
        )
        return before[::-1], after[:_NEAR]

    def is_ordinary(self, place: int) -> bool:
        """Whether a place is an ordinary one."""
        return place in self._places.modes

    def is_anchor(self, place: int) -> bool:
        """Whether a place is an anchor."""
        return self.anchor(place) == place

    def run_at(self, place: int) -> Run | None:
        """Return the run of this event at a place; a nested one comes when the first is over."""
        event, nested = self._key
        if nested is None:
            return Run(event, place)
        length = self._runner.length(Run(event, place))
        return None if length is None else Run(event, place, nested, length)

    def _at(self, place: int) -> Course | None:
        if place not in self._courses:
            run = self.run_at(place)
            course = None if run is None else self._runner.course(run, self.excused)
            self._courses[place] = None if course is None else _come(course)
        return self._courses[place]

    def _learn(self, *, steps: bool) -> bool:
        """Find what is excused: from the first, the middle and the last place to learn from.

        Where they are fewer than three, some of the window are taken, too: times are times
        anywhere. False if no run at any of the places came to its end.
        """
        samples = self.samples
        stacks = self.excused.stacks.copy()
        times: frozenset[int] = frozenset()
        has_learnt = False
        ends = (samples[0], samples[len(samples) // 2], samples[-1])
        chosen = dict.fromkeys((*ends, *self._spread))
        for number, place in enumerate(tuple(chosen)[: len(ends)]):
            run = self.run_at(place)
            taken = None if run is None else self._runner.end(run, 0)
            if run is None or taken is None:
                continue
            has_learnt |= place in ends
            times |= twins(self._ends, self._runner, run, taken, _LATER[number % 2 :][:1])
            if steps:
                stacks.add(self._runner.pointers(run))
                steps = False
        self.excused = Excused(stacks, frozenset(t for t in times if not stacks.is_dead(t)))
        return has_learnt


class Oracle:
    """Judges the runs of one window. `bare` are the stacks that are known without any run."""

    def __init__(
        self, ends: Ends, places: Places, count: int, runner: Runner, bare: Stacks
    ) -> None:
        self._ends = ends
        self._places = places
        self._count = count
        self._runner = runner
        self._bare = bare
        self._habits: dict[Key, Habit] = {}
        self._guarded: dict[Words, dict[int, str]] = {}

    def prepare(self, run: Run) -> Excused:
        """Learn what is to be known before a run, while the guest is on its way there."""
        habit = self._habit((run.event, run.nested))
        if habit.basis == "ordinary" and run.nested is None:
            habit.at(habit.anchor(run.boundary))
        return habit.excused

    def known(self, run: Run) -> Course | None:
        """Return what a run came to, if it has been done to learn from."""
        return self._habit((run.event, run.nested)).known(run)

    def judge(self, course: Course) -> Judgement:
        """Judge a run that came to the compare point."""
        self._habit((course.run.event, course.run.nested)).keep(course)
        wrong = tuple(self._forbidden(course))
        judgement = self._judge(course)
        times = self._habit((course.run.event, course.run.nested)).excused.times
        return judgement._replace(odd=(*wrong, *judgement.odd), times=times)

    def _judge(self, course: Course) -> Judgement:
        run = course.run
        key = _delivered(course)
        if key is None:
            odd = tuple(
                f"{self._name(word.gpa)} is {self._shown(word)}, {self._ends.was(word.gpa):#x} "
                "expected: nothing was delivered"
                for word in course.words
            )
            return Judgement(odd, course.words, "ordinary")
        habit = self._habit(key)
        if habit.basis == "most":
            if habit.most is None or habit.most.words == course.words:
                return Judgement((), course.words, "most")
            return self._compare(habit, course, [habit.most], [])
        place = run.boundary if course.place is None else course.place
        if self._is_as_anchors(habit, course, place):
            return Judgement((), course.words, "ordinary")
        return self._look_around(habit, course, place)

    def _forbidden(self, course: Course) -> Iterator[str]:
        """Describe what is changed that no event may change."""
        if course.words not in self._guarded:
            found = ((word.gpa, self._guard(word.gpa)) for word in course.words)
            self._guarded[course.words] = {gpa: what for gpa, what in found if what is not None}
        guarded = self._guarded[course.words]
        if not guarded:
            return
        states = _states(course.words)
        for gpa in sorted(self._excuse(frozenset(guarded), [course.run])):
            yield (
                f"{guarded[gpa]} is changed: {self._name(gpa)} is {self._shown(states[gpa])}, "
                f"{self._ends.was(gpa):#x} expected"
            )

    def _guard(self, gpa: int) -> str | None:
        if gpa == FPU_WORD:
            return None
        return "the stack in use" if self._bare.is_in_use(gpa) else self._ends.data.guarded(gpa)

    def _habit(self, key: Key) -> Habit:
        if key not in self._habits:
            self._habits[key] = Habit(
                key, self._ends, self._places, self._count, self._runner, self._bare
            )
        return self._habits[key]

    @staticmethod
    def _is_as_anchors(habit: Habit, course: Course, place: int) -> bool:
        """Whether two places far apart agree, one of them next to this run's, and so does it.

        A run whose event was held back is like one that came where it was delivered, too.
        """
        if place != course.run.boundary and habit.is_ordinary(place):
            there = habit.at(place)
            if there is not None and there.words == course.words:
                return True
        found = [one.words for one in habit.anchors(place)]
        itself = habit.is_anchor(place) and course.run.boundary == place
        return course.words in found[:2] and found.count(course.words) + itself > 1

    def _look_around(self, habit: Habit, course: Course, place: int) -> Judgement:
        before, after = habit.near(place, course.run)
        near = [one.words for one in (*before, *after)]
        if not near:
            return Judgement((), course.words, "ordinary")
        if near.count(course.words) >= min(_PHASE, len(near)):
            return Judgement((), course.words, "ordinary")
        sides = [most for side in (before, after) if (most := _mode(side)) is not None]
        nearest = [side[0].run for side in (before, after) if side]
        return self._compare(habit, course, sides, nearest)

    def _compare(
        self, habit: Habit, course: Course, usual: list[Course], others: list[Run]
    ) -> Judgement:
        """Compare word by word with what is usual before and after; one of them is enough."""
        odd = _odd(course, usual)
        if odd:
            odd = self._excuse(odd, [course.run, *others])
        if not odd:
            best = min(usual, key=lambda one: len(_odd(course, [one])))
            return Judgement((), best.words, habit.basis)
        texts = tuple(self._text(gpa, course.words, usual) for gpa in sorted(odd))
        return Judgement(texts, course.words, habit.basis)

    def _excuse(self, odd: frozenset[int], runs: list[Run]) -> frozenset[int]:
        """Look closer: leave out words that are times, or dead stack, in one of these runs."""
        for run in runs:
            taken = self._runner.end(run, 0)
            if taken is not None:
                odd -= twins(self._ends, self._runner, run, taken)
            if not odd:
                return odd
        # A stack is no variable.
        if all(gpa == FPU_WORD or self._ends.data.name(gpa) or self._guard(gpa) for gpa in odd):
            return odd
        stacks = self._bare.copy()
        for run in runs:
            stacks.add(self._runner.pointers(run))
        return frozenset(
            gpa for gpa in odd if gpa == FPU_WORD or self._guard(gpa) or not stacks.is_dead(gpa)
        )

    def _text(self, gpa: int, words: Words, usual: list[Course]) -> str:
        """Say how a word differs from what is usual."""
        name = self._name(gpa)
        here = _states(words).get(gpa)
        states = (_states(one.words).get(gpa) for one in usual)
        there = next((state for state in states if state is not None), None)
        was = self._ends.was(gpa)
        if here is None:
            assert there is not None
            return f"lost: {name} is {was:#x} still, {self._shown(there)} expected"
        if there is None:
            return f"gained: {name} is {self._shown(here)}, {was:#x} expected"
        return f"{name} is {self._shown(here)}, {self._shown(there)} expected"

    def _name(self, gpa: int) -> str:
        if gpa == FPU_WORD:
            return "the digest of the x87 and SSE registers"
        return self._ends.data.describe(gpa)

    @staticmethod
    def _shown(word: Word) -> str:
        if word.kind != "value":
            return _CONTEXT[word.kind]
        return f"{word.value:#x}"


def twins(
    ends: Ends, runner: Runner, run: Run, taken: Taken, times: Iterable[int] = _LATER
) -> frozenset[int]:
    """Find the words that follow the clock or chance: a twin's clock is set forward a little."""
    found: frozenset[int] = frozenset()
    for later in times:
        twin = runner.end(run, later)
        if twin is not None:
            found |= ends.changed(taken, twin)
    return found


def _come(course: Course) -> Course | None:
    """Return a course that others may be compared with."""
    return course if course.verdict is None and any(course.delivered) else None


def _delivered(course: Course) -> Key | None:
    """Name the events that were delivered, as habits are."""
    event, nested = course.run.event, course.run.nested
    first, second = course.delivered
    if first:
        return event, nested if second else None
    return (nested, None) if nested is not None and second else None


def _mode(courses: Iterable[Course | None]) -> Course | None:
    """Return the first of those with the commonest outcome."""
    came = [course for course in courses if course is not None]
    if not came:
        return None
    words = Counter(course.words for course in came).most_common(1)[0][0]
    return next(course for course in came if course.words == words)


def _states(words: Words) -> dict[int, Word]:
    return {word.gpa: word for word in words}


def _odd(course: Course, usual: list[Course]) -> frozenset[int]:
    """Return the words that are in none of the usual states."""
    here, there = _states(course.words), [(_states(one.words), one.context) for one in usual]
    gpas = {gpa for states in (here, *(states for states, _ in there)) for gpa in states}
    return frozenset(
        gpa
        for gpa in gpas
        if not any(
            _are_alike(here.get(gpa), course.context, states.get(gpa), context)
            for states, context in there
        )
    )


def _are_alike(one: Word | None, its: Context, other: Word | None, others: Context) -> bool:
    """Whether two words are in one state; a number may be an address by accident."""
    if one == other:
        return True
    if one is None or other is None:
        return False
    return _is_also(one, its, other) or _is_also(other, others, one)


def _is_also(one: Word, its: Context, other: Word) -> bool:
    """Whether an address that a run's context tells can be the number that another word holds."""
    if other.kind != "value":
        return False
    if one.kind == "rip":
        return other.value in its.rips
    if one.kind == "flags":
        return other.value in its.flags
    return one.kind == "stack" and any(other.value in stack for stack in its.stacks)
