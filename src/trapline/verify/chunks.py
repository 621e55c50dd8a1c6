"""Runs cases in worker processes, each on a guest of its own.

A chunk of cases goes to whoever is free; since each case starts from the same frozen state, it
does not matter who runs it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

from trapline.base.errors import BadMachineError
from trapline.base.workers import Pool
from trapline.guest.target import TargetSource
from trapline.verify.cases import Case
from trapline.verify.judge import Judge, Judgement
from trapline.verify.launch import Launch

_CHUNK: Final = 64

#: Told how many cases are done.
Progress = Callable[[int], None]


class Chunk(NamedTuple):
    """Cases to run, in ring 3 or in the kernel; `executed` is for `Judge`."""

    cases: tuple[Case, ...]
    executed: frozenset[int]


Judgements = tuple[Judgement, ...]


def verify_pool(source: TargetSource, count: int, *, ring3: bool) -> Pool[Chunk, Judgements]:
    """Return a number of processes, each with a booted guest.

    Cases in ring 3 must all be run before the first others: the guest only goes forward.
    """
    make = partial(_Runner, source, ring3=ring3)
    return Pool(make, count, advice="give fewer --workers, or free some memory, and try again")


def run_cases(
    pool: Pool[Chunk, Judgements],
    cases: Sequence[Case],
    executed: frozenset[int] = frozenset(),
    progress: Progress | None = None,
) -> Judgements:
    """Run all cases; judgements come in the order of the cases.

    Raises BadMachineError where the guest cannot be run, WorkersLostError where processes keep
    dying of it.
    """

    def receive(judgements: Judgements) -> Judgements:
        if progress is not None:
            progress(len(judgements))
        return judgements

    chunks = [
        Chunk(tuple(cases[at : at + _CHUNK]), executed) for at in range(0, len(cases), _CHUNK)
    ]
    return tuple(each for answer in pool.map(chunks, receive, _place) for each in answer)


def _place(chunk: Chunk) -> str:
    first = chunk.cases[0]
    return f"at the {first.trap} instruction {first.code.hex(' ')} or one of the {_CHUNK} after it"


class _Runner:
    """What a worker does: it runs chunks on a guest that is booted at first."""

    def __init__(self, source: TargetSource, *, ring3: bool) -> None:
        try:
            self._launch = Launch(source.open())
            self._user = self._launch.ring3() if ring3 else None
        except (ValueError, OSError) as error:
            raise _cannot_run(error) from error
        self._judges = {True: Judge(self._user)} if self._user is not None else {}

    def __call__(self, chunk: Chunk) -> Judgements:
        ring3 = chunk.cases[0].ring3
        try:
            judge = self._judges.get(ring3)
            if judge is None:
                judge = self._judges[ring3] = Judge(self._launch.kernel(self._user))
            judge.executed = chunk.executed
            return tuple(judge.judge(case) for case in chunk.cases)
        except (ValueError, OSError) as error:
            raise _cannot_run(error) from error


def _cannot_run(error: Exception) -> BadMachineError:
    return BadMachineError(f"the guest cannot be run: {error}")
