"""Processes that run cases, each on a guest of its own.

A chunk of cases goes to whoever is free; since each case starts from the same frozen state, it
does not matter who runs it. The guest is hostile input to native code, so that a process may
die: this ends the run with one sentence.
"""

import multiprocessing
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from trapline.base import processes
from trapline.base.errors import BadMachineError, TraplineError
from trapline.guest.target import TargetSource
from trapline.verify.cases import Case
from trapline.verify.judge import Judge, Judgement
from trapline.verify.launch import Launch

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

_CHUNK: Final = 64

#: Told how many cases are done.
Progress = Callable[[int], None]


class _Chunk(NamedTuple):
    """Cases to run, in ring 3 or in the kernel; `executed` is for `Judge`."""

    number: int
    cases: tuple[Case, ...]
    executed: frozenset[int]


class _Answer(NamedTuple):
    number: int
    judgements: tuple[Judgement, ...]


class _Failed(NamedTuple):
    """What ended a process: an error of ours, to be raised again."""

    error: TraplineError


class Workers:
    """A number of processes, each with a booted guest; a context manager.

    Cases in ring 3 must all be run before the first others: the guest only goes forward.
    """

    def __init__(self, source: TargetSource, count: int, *, ring3: bool) -> None:
        self._source = source
        self._ring3 = ring3
        self._count = count
        self._channels: list[Connection] = []
        self._processes: list[BaseProcess] = []

    def __enter__(self) -> Self:
        try:
            for _ in range(self._count):
                self._start()
        except BaseException:  # Ctrl-C, too: nobody else ends those that have started
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for channel in self._channels:
            channel.close()
        processes.end(self._processes)

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, self._source, self._ring3))
        self._channels.append(ours)
        self._processes.append(process)
        processes.start(process)
        theirs.close()

    def run(
        self,
        cases: Sequence[Case],
        executed: frozenset[int] = frozenset(),
        progress: Progress | None = None,
    ) -> tuple[Judgement, ...]:
        """Run all cases; judgements come in the order of the cases."""
        pending = deque(
            _Chunk(number, tuple(cases[at : at + _CHUNK]), executed)
            for number, at in enumerate(range(0, len(cases), _CHUNK))
        )
        answers: dict[int, tuple[Judgement, ...]] = {}
        busy: set[Connection] = set()
        for channel in self._channels:
            self._give(channel, pending, busy)
        while busy:
            for ready in connection.wait(list(busy)):
                assert isinstance(ready, Connection)
                busy.discard(ready)
                answer = self._receive(ready)
                answers[answer.number] = answer.judgements
                if progress is not None:
                    progress(len(answer.judgements))
                self._give(ready, pending, busy)
        return tuple(each for number in sorted(answers) for each in answers[number])

    @staticmethod
    def _give(channel: Connection, pending: deque[_Chunk], busy: set[Connection]) -> None:
        if pending:
            busy.add(channel)
            try:
                channel.send(pending.popleft())
            except (BrokenPipeError, ConnectionResetError):
                return  # it died: `_receive` finds out how

    def _receive(self, channel: Connection) -> _Answer:
        try:
            answer = channel.recv()
        except (EOFError, ConnectionResetError):
            process = self._processes[self._channels.index(channel)]
            process.join(processes.PATIENCE)
            raise BadMachineError(
                f"a process that ran the guest ended with status {process.exitcode}; "
                "if it was killed, give fewer --workers or more memory."
            ) from None
        if isinstance(answer, _Failed):
            raise answer.error
        assert isinstance(answer, _Answer)
        return answer


class _Server:
    """Runs chunks on a guest that is booted when the first one comes."""

    def __init__(self, source: TargetSource, *, ring3: bool) -> None:
        target = source.open()
        self._launch = Launch(target)
        self._user = self._launch.ring3() if ring3 else None
        self._judges = {True: Judge(self._user)} if self._user is not None else {}

    def run(self, chunk: _Chunk) -> tuple[Judgement, ...]:
        ring3 = chunk.cases[0].ring3
        judge = self._judges.get(ring3)
        if judge is None:
            judge = self._judges[ring3] = Judge(self._launch.kernel(self._user))
        judge.executed = chunk.executed
        return tuple(judge.judge(case) for case in chunk.cases)


def _serve(channel: Connection, source: TargetSource, ring3: bool) -> None:
    """Run chunks until the channel closes."""
    # Ctrl-C goes to the whole terminal group; the parent decides and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if not os.environ.get("TRAPLINE_DEBUG"):
            # Native libraries write on standard error what the parent says in a sentence.
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.__stderr__.fileno() if sys.__stderr__ else 2
            )
        server = _Server(source, ring3=ring3)
        while True:
            chunk = channel.recv()
            channel.send(_Answer(chunk.number, server.run(chunk)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except TraplineError as error:
        channel.send(_Failed(error))
    except (ValueError, MemoryError, OSError, pickle.PickleError) as error:
        channel.send(_Failed(BadMachineError(f"the guest cannot be run: {error}")))
