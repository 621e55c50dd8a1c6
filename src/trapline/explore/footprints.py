"""The footprints of a window's events, as the result document has them.

An id stands for the words and their values: two processes that come to the same footprint give
it the same id.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from trapline.base import encode
from trapline.explore.course import FPU_WORD, Course, Words
from trapline.explore.oracle import Judgement
from trapline.explore.window import LiveWindow
from trapline.results.explore import Footprint, FootprintWord, Result

_ID_SIZE: Final = 8
_MAX_WORDS: Final = 512
_NAMED: Final = 3


class Footprints:
    """Those of one window that came up."""

    def __init__(self, window: LiveWindow) -> None:
        self._window = window
        self._summaries: dict[str, str] = {}
        self._ids: dict[tuple[str, str | None, Words], str] = {}
        self._documents: dict[str, Footprint] = {}
        self._fresh: list[str] = []

    def note(self, course: Course, judgement: Judgement) -> str:
        """Return the id of a clean run's footprint, empty if it left nothing."""
        words = judgement.usual
        if not words:
            return ""
        key = course.run.event, course.run.nested, words
        if key not in self._ids:
            self._ids[key] = self._add(course, judgement)
        return self._ids[key]

    def document(self, identity: str) -> Footprint:
        """Return a footprint that came up, without its runs."""
        return self._documents[identity]

    def summary(self, identity: str) -> str:
        """Name the first variables of a footprint, and say how many words it has."""
        if identity not in self._summaries:
            self._summaries[identity] = self._summarise(self._documents[identity])
        return self._summaries[identity]

    @staticmethod
    def _summarise(document: Footprint) -> str:
        names = list(dict.fromkeys(word.name.partition("+")[0] for word in document.words))
        more = "" if len(names) <= _NAMED else " and others"
        words = "1 word" if document.count == 1 else f"{document.count} words"
        return f"{words}, in {', '.join(names[:_NAMED])}{more}"

    def take(self) -> tuple[tuple[str, bytes], ...]:
        """Return those that came up since the last time, ready for the store."""
        fresh, self._fresh = self._fresh, []
        return tuple((one, encode.json(self._documents[one])) for one in fresh)

    def _add(self, course: Course, judgement: Judgement) -> str:
        run, name = course.run, self._window.scenario.name
        said = msgspec.msgpack.encode((name, run.event, run.nested, judgement.usual))
        identity = hashlib.blake2b(said, digest_size=_ID_SIZE).hexdigest()
        self._documents[identity] = Footprint(
            id=identity,
            scenario=name,
            event=run.event,
            nested=run.nested,
            basis=judgement.basis,
            count=len(judgement.usual) + len(judgement.times),
            words=(*self._words(judgement.usual), *self._times(judgement.times))[:_MAX_WORDS],
            runs=0,
            boundaries=(),
        )
        self._fresh.append(identity)
        return identity

    def _words(self, words: Words) -> Iterator[FootprintWord]:
        ends = self._window.ends
        for word in words:
            yield FootprintWord(
                name=self._name(word.gpa),
                gpa=word.gpa,
                kind=word.kind,
                was=ends.was(word.gpa),
                now=word.value if word.kind == "value" else None,
            )

    def _times(self, gpas: frozenset[int]) -> Iterator[FootprintWord]:
        for gpa in sorted(gpas):
            yield FootprintWord(
                name=self._name(gpa),
                gpa=gpa,
                kind="time",
                was=self._window.ends.was(gpa),
                now=None,
            )

    def _name(self, gpa: int) -> str:
        if gpa == FPU_WORD:
            return "x87 and SSE registers"
        return self._window.ends.data.describe(gpa)


def count(footprints: Iterable[Footprint], results: Iterable[Result]) -> tuple[Footprint, ...]:
    """Complete footprints with the runs that left them; results come by event and boundary."""
    runs: dict[str, int] = {}
    stretches: dict[str, list[list[int]]] = {}
    for result in results:
        if not result.footprint:
            continue
        runs[result.footprint] = runs.get(result.footprint, 0) + 1
        found = stretches.setdefault(result.footprint, [])
        if found and found[-1][1] in (result.boundary, result.boundary - 1):
            found[-1][1] = result.boundary
        else:
            found.append([result.boundary, result.boundary])
    return tuple(
        msgspec.structs.replace(
            one,
            runs=runs[one.id],
            boundaries=tuple((first, last) for first, last in stretches[one.id]),
        )
        for one in footprints
        if one.id in runs
    )
