"""Spreads the objects of a kernel over processes.

A process takes one object at a time and asks for the next when it is done, so that none waits
while there is work. Objects are scanned in processes of their own also because they are hostile
input to native code: what an abort takes along is one object, and the report says so.
"""

import multiprocessing
import os
import signal
import sys
from collections import deque
from multiprocessing import connection
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import msgspec

from trapline.base import processes
from trapline.base.errors import TraplineError
from trapline.scan.objects import ObjectResult, Task, scan_object

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    from trapline.scan.kernelfacts import ScanContext

    #: Told (objects done, objects in all).
    Progress = Callable[[int, int], None]


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Why an object was not scanned, in one sentence."""

    name: str
    reason: str


class Success(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The result of one object."""

    result: ObjectResult


_encoder: Final = msgspec.msgpack.Encoder()
_task_decoder: Final = msgspec.msgpack.Decoder(Task)
_outcome_decoder: Final = msgspec.msgpack.Decoder(Success | Failure)


class _Worker(NamedTuple):
    process: "multiprocessing.process.BaseProcess"
    channel: "Connection"


class Pool:
    """Worker processes for one scan; a context manager, so that none survives it.

    Processes start on entry and load their libraries while the caller does other things.
    """

    def __init__(self, context: "ScanContext", workers: int) -> None:
        self._context = context
        self._count = workers
        self._workers: list[_Worker] = []
        self._busy: dict[Connection, Task] = {}

    def __enter__(self) -> Self:
        try:
            for _ in range(self._count):
                self._start()
        except BaseException:  # Ctrl-C, too: nobody else ends those that have started
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.channel.close()
        processes.end(worker.process for worker in self._workers)
        self._workers.clear()

    def run(
        self, tasks: "Sequence[Task]", progress: "Progress | None" = None
    ) -> "dict[str, ObjectResult | Failure]":
        """Scan all objects, handing them out in this order; return what came of each, by name."""
        pending = deque(tasks)
        outcomes: dict[str, ObjectResult | Failure] = {}
        for worker in self._workers:
            self._give(worker.channel, pending)
        while self._busy:
            for ready in connection.wait(list(self._busy)):
                assert isinstance(ready, connection.Connection)
                task = self._busy.pop(ready)
                outcomes[task.name] = self._receive(ready, task)
                if progress is not None:
                    progress(len(outcomes), len(tasks))
                self._give(self._successor(ready), pending)
        return outcomes

    def _start(self) -> "Connection":
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        # Not a daemon: coverage and the system's tools treat it as any other process.
        process = spawn.Process(target=_serve, args=(theirs, self._context))
        self._workers.append(_Worker(process, ours))
        processes.start(process)
        theirs.close()
        return ours

    def _give(self, channel: "Connection", pending: "deque[Task]") -> None:
        if pending:
            task = pending.popleft()
            self._busy[channel] = task
            try:
                channel.send_bytes(_encoder.encode(task))
            except (BrokenPipeError, ConnectionResetError):
                return  # it died: `_receive` finds out how

    def _receive(self, channel: "Connection", task: Task) -> "ObjectResult | Failure":
        try:
            outcome = _outcome_decoder.decode(channel.recv_bytes())
        except (EOFError, ConnectionResetError):
            return Failure(name=task.name, reason=self._death(channel))
        return outcome.result if isinstance(outcome, Success) else outcome

    def _death(self, channel: "Connection") -> str:
        process = next(worker.process for worker in self._workers if worker.channel is channel)
        process.join(processes.PATIENCE)
        code = process.exitcode
        if code == -signal.SIGKILL:
            return "the process that scanned it was killed, probably for want of memory"
        if code is not None and code < 0:
            return f"the process that scanned it died of {signal.Signals(-code).name}"
        return f"the process that scanned it ended with status {code}"

    def _successor(self, channel: "Connection") -> "Connection":
        """Return the channel, or that of a new process where this one's is dead."""
        worker = next(worker for worker in self._workers if worker.channel is channel)
        if worker.process.is_alive():
            return channel
        self._workers.remove(worker)
        channel.close()
        worker.process.join()
        worker.process.close()
        return self._start()


def _serve(channel: "Connection", context: "ScanContext") -> None:
    """Scan objects until the channel closes."""
    # Ctrl-C goes to the whole terminal group; the parent decides and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not os.environ.get("TRAPLINE_DEBUG"):
        # Native libraries write on standard error what the outcome says in a sentence.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stderr__.fileno() if sys.__stderr__ else 2)
    while True:
        try:
            task = _task_decoder.decode(channel.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        try:
            channel.send_bytes(_encoder.encode(_outcome(task, context)))
        except (BrokenPipeError, ConnectionResetError):
            return


def _outcome(task: Task, context: "ScanContext") -> Success | Failure:
    try:
        return Success(result=scan_object(task, context))
    except TraplineError as error:
        return Failure(name=task.name, reason=str(error))
    except MemoryError:
        return Failure(name=task.name, reason="there was not enough memory for it")
    except Exception as error:  # one bad module must not end the scan; the report names it
        if os.environ.get("TRAPLINE_DEBUG"):
            raise
        kind = type(error).__name__
        return Failure(name=task.name, reason=f"internal error ({kind}: {error})")
