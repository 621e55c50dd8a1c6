"""Worker processes: one pool for all that is spread over several.

What a worker does is a callable, made in the process itself. Who gets which job, and where the
answers go, is a `Desk` of the parent's; `Pool.map` has one for jobs that anybody can do.

Workers work on hostile input with native code. One that dies is replaced, and its jobs are done
again; where they keep dying, the pool gives up and says so. None survives its pool, nor a parent
that is killed.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import connection, resource_tracker
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Protocol, Self, TypeVar, cast

from trapline.base.errors import TraplineError, UsageError, WorkersLostError
from trapline.base.scarcity import scarce

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

_Job = TypeVar("_Job")
_Answer = TypeVar("_Answer")
_Result = TypeVar("_Result")
_Answer_contra = TypeVar("_Answer_contra", contravariant=True)

_PATIENCE: Final = 5.0  # seconds for a process to end after SIGTERM
_MAX_AT_ONE_PLACE: Final = 3
_MAX_IN_ALL: Final = 12
_PR_SET_PDEATHSIG: Final = 1
# What a process brings upon itself; other signals come from outside.
_OWN_SIGNALS: Final = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP}
)


def how_many(wanted: int | None) -> int:
    """Give the number of workers: what is wanted, or else one for each CPU that may be used.

    Raises UsageError for less than one.
    """
    if wanted is not None and wanted < 1:
        raise UsageError(f"{wanted} workers can do nothing; one is the least.")
    return wanted or len(os.sched_getaffinity(0))


class Death(NamedTuple):
    """How a worker ended; `status` is negative for a signal, as in `subprocess`."""

    status: int | None

    @property
    def is_crash(self) -> bool:
        """Whether its own code is to blame, and not somebody who killed it."""
        return self.status is not None and -self.status in _OWN_SIGNALS

    def __str__(self) -> str:
        if self.status == -signal.SIGKILL:
            return "was killed, perhaps for want of memory"
        if self.status is not None and self.status < 0:
            return f"died of {signal.Signals(-self.status).name}"
        return f"ended with status {self.status}"


class Desk(Protocol[_Job, _Answer_contra]):
    """Who gets which job. A worker is a number; whoever replaces a dead one has a new number."""

    def next(self, worker: int) -> _Job | None:
        """Give the next job, or None where there is none for this worker now."""

    def answered(self, worker: int, job: _Job, answer: _Answer_contra) -> None:
        """Take an answer."""

    def lost(self, worker: int, jobs: Sequence[_Job], death: Death) -> str | None:
        """Take back the jobs of a dead worker, the one that it was at first.

        Returns where it died, for a message ("in module e1000"); None forgives it.
        """


class _Raised(NamedTuple):
    """What ended a worker: an error of ours, to be raised again."""

    error: TraplineError


class _Worker(Generic[_Job]):
    """A worker process as its parent sees it."""

    def __init__(self, number: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.number = number
        self.jobs: deque[_Job] = deque()  # sent, and not answered yet
        self.channel: Connection
        self.channel, self._theirs = spawn.Pipe()
        # Not a daemon: coverage and the system's tools treat it as any other process.
        self.process: BaseProcess = spawn.Process(target=_serve, args=(self._theirs, os.getpid()))

    def start(self) -> None:
        _start(self.process)
        self._theirs.close()

    def send(self, message: object) -> None:
        try:
            self.channel.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return  # it died: whoever waits for its answer finds out how


class Pool(Generic[_Job, _Answer]):
    """A number of workers. A context manager: they start on entry, and none survives it.

    `make` is called in each process for what does the jobs; it must pickle, as must jobs and
    answers. Each worker has up to `ahead` jobs, so that it need not wait for the parent.
    `advice` tells the user what to do when workers keep dying.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[_Job], _Answer]],
        count: int,
        *,
        ahead: int = 1,
        advice: str,
    ) -> None:
        self._make = make
        self._count = count
        self._ahead = ahead
        self._advice = advice
        self._workers: list[_Worker[_Job]] = []
        self._started = 0
        self._deaths: Counter[str] = Counter()

    def __enter__(self) -> Self:
        try:
            for _ in range(self._count):
                self._start()
            # All run by now; what they are to do may be large, and a pipe is small.
            for worker in self._workers:
                worker.send(self._make)
        except BaseException:  # Ctrl-C, too: nobody else ends those that have started
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.channel.close()
        _end(worker.process for worker in self._workers)
        self._workers.clear()

    def run(self, desk: Desk[_Job, _Answer]) -> None:
        """Serve until the desk has no job for anybody.

        Raises what a worker raised, and WorkersLostError where workers keep dying.
        """
        for worker in self._workers:
            self._feed(worker, desk)
        while busy := {worker.channel: worker for worker in self._workers if worker.jobs}:
            for channel in connection.wait(list(busy)):
                self._hear(busy[cast("Connection", channel)], desk)
            for worker in self._workers:
                if not worker.jobs:
                    self._feed(worker, desk)

    def map(
        self,
        jobs: Iterable[_Job],
        receive: Callable[[_Answer], _Result],
        place: Callable[[_Job], str],
        settle: Callable[[_Job, Death], _Answer | None] = lambda *_: None,
    ) -> list[_Result]:
        """Do jobs in any order; results come in the order of the jobs.

        `receive` gets each answer as it comes, and returns what is kept of it. `place` says where
        a worker was that died, for a message. `settle` may give an answer in the stead of a
        worker that died of its job, which is then not tried again.
        """
        queue = _Queue(jobs, receive, place, settle)
        self.run(queue)
        return queue.results()

    def _start(self) -> _Worker[_Job]:
        worker: _Worker[_Job] = _Worker(self._started)
        self._started += 1
        self._workers.append(worker)
        worker.start()
        return worker

    def _feed(self, worker: _Worker[_Job], desk: Desk[_Job, _Answer]) -> None:
        while len(worker.jobs) < self._ahead:
            job = desk.next(worker.number)
            if job is None:
                return
            worker.jobs.append(job)
            worker.send(job)

    def _hear(self, worker: _Worker[_Job], desk: Desk[_Job, _Answer]) -> None:
        try:
            answer = worker.channel.recv()
        except (EOFError, ConnectionResetError):
            self._replace(worker, desk)
            return
        if isinstance(answer, _Raised):
            raise answer.error
        desk.answered(worker.number, worker.jobs.popleft(), answer)
        self._feed(worker, desk)

    def _replace(self, worker: _Worker[_Job], desk: Desk[_Job, _Answer]) -> None:
        worker.process.join(_PATIENCE)
        death = Death(worker.process.exitcode)
        self._workers.remove(worker)
        worker.channel.close()
        _end([worker.process])
        where = desk.lost(worker.number, tuple(worker.jobs), death)
        if where is not None:
            self._deaths[where] += 1
            if self._deaths[where] > _MAX_AT_ONE_PLACE or self._deaths.total() > _MAX_IN_ALL:
                raise WorkersLostError(
                    f"worker processes keep dying {where} (the last one {death}); {self._advice}."
                )
        self._start().send(self._make)


class _Queue(Generic[_Job, _Answer, _Result]):
    """The desk for jobs that anybody can do, handed out in their order."""

    def __init__(
        self,
        jobs: Iterable[_Job],
        receive: Callable[[_Answer], _Result],
        place: Callable[[_Job], str],
        settle: Callable[[_Job, Death], _Answer | None],
    ) -> None:
        self._jobs = list(jobs)
        self._receive = receive
        self._place = place
        self._settle = settle
        self._pending = deque(range(len(self._jobs)))
        self._given: dict[int, deque[int]] = {}
        self._results: dict[int, _Result] = {}

    def next(self, worker: int) -> _Job | None:
        if not self._pending:
            return None
        number = self._pending.popleft()
        self._given.setdefault(worker, deque()).append(number)
        return self._jobs[number]

    def answered(self, worker: int, job: _Job, answer: _Answer) -> None:
        del job
        self._results[self._given[worker].popleft()] = self._receive(answer)

    def lost(self, worker: int, jobs: Sequence[_Job], death: Death) -> str | None:
        given = self._given.pop(worker)
        settled = self._settle(jobs[0], death)
        if settled is not None:
            self._results[given.popleft()] = self._receive(settled)
        self._pending.extendleft(reversed(given))
        return self._place(jobs[0]) if settled is None else None

    def results(self) -> list[_Result]:
        return [self._results[number] for number in range(len(self._jobs))]


def _start(process: "BaseProcess") -> None:
    """Start a worker process ("spawn") with SIGINT blocked.

    Ctrl-C goes to the whole terminal group. A worker ignores it, for its parent decides and ends
    its workers; but one that still loads its libraries would show a traceback of its own. So the
    worker's first act is to ignore SIGINT, and none comes before.

    A worker is not told what the main program is: multiprocessing would have it run that again,
    and a script that calls trapline would start workers in its workers. None of their jobs is
    defined there.
    """
    # The tracker, which the first start brings along, unblocks SIGINT here; so it comes first.
    resource_tracker.ensure_running()
    main = sys.modules["__main__"]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        sys.modules["__main__"] = ModuleType("__main__")
        process.start()
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(processes: "Iterable[BaseProcess]") -> None:
    """End and close worker processes, by SIGKILL where SIGTERM does not do.

    One whose start was interrupted has no PID, and is left alone.
    """
    started = [process for process in processes if process.pid is not None]
    for process in started:
        process.terminate()
    for process in started:
        process.join(_PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


# In the worker. This module imports little, so that what follows comes before heavy imports.


def _serve(channel: "Connection", parent: int) -> None:
    """Do jobs until the channel closes."""
    # Ctrl-C goes to the whole terminal group; the parent decides and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that is killed closes the channel, but a worker looks at it only between jobs.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    debug = bool(os.environ.get("TRAPLINE_DEBUG"))
    if not debug:
        # Native libraries write on standard error what the parent says in a sentence.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        work = _receive(channel)()
        while True:
            _send(channel, work(_receive(channel)))
    except TraplineError as error:
        _send(channel, _Raised(error))
    except Exception as error:  # noqa: BLE001 - the parent ends the command with it
        if (short := scarce(error)) is not None:
            _send(channel, _Raised(short))
            return
        if debug:
            traceback.print_exc()
        kind = type(error).__name__
        message = (
            f"internal error in a worker ({kind}: {error}); set TRAPLINE_DEBUG=1 and report the "
            "traceback."
        )
        _send(channel, _Raised(TraplineError(message)))


# A channel that is closed means that the parent has no more use for this process. It ends without
# tidying up: a guest's memory takes long, and nobody is there to see it.


def _receive(channel: "Connection") -> Any:  # noqa: ANN401 - what `make` made knows
    try:
        return channel.recv()
    except (EOFError, ConnectionResetError):
        os._exit(0)


def _send(channel: "Connection", message: object) -> None:
    try:
        channel.send(message)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
