"""Spreads the objects of a kernel over processes.

A process takes one object at a time and asks for the next when it is done, so that none waits
while there is work. Objects are scanned in processes of their own also because they are hostile
input to native code: what a crash takes along is one object, and the report says so.
"""

import os
import signal
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from trapline.base.errors import TraplineError
from trapline.base.scarcity import is_memory_limited, out_of_memory
from trapline.base.workers import Death, Pool
from trapline.kernel.binary import VMLINUX
from trapline.scan.objects import ObjectResult, Task, scan_object

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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


# Outcomes pass between the processes encoded: that is several times faster than a pickle.
_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Success | Failure)


def scan_pool(context: "ScanContext", workers: int) -> Pool[Task, bytes]:
    """Return processes for one scan; they load libraries while the caller does other things."""
    return Pool(
        partial(_Scanner, context),
        workers,
        advice="give fewer --workers, or free some memory, and try again",
    )


def scan_all(
    pool: Pool[Task, bytes], tasks: "Sequence[Task]", progress: "Progress | None" = None
) -> dict[str, ObjectResult | Failure]:
    """Scan all objects, handing them out in this order; return what came of each, by name.

    Raises WorkersLostError where processes are killed again and again.
    """
    done = 0

    def receive(answer: bytes) -> ObjectResult | Failure:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(tasks))
        outcome = _decoder.decode(answer)
        return outcome.result if isinstance(outcome, Success) else outcome

    outcomes = pool.map(tasks, receive, _place, _crash)
    return {task.name: outcome for task, outcome in zip(tasks, outcomes, strict=True)}


def _place(task: Task) -> str:
    return f"at {task.name if task.name == VMLINUX else f'module {task.name}'}"


def _crash(task: Task, death: Death) -> bytes | None:
    """Charge a crash to the object; another process would crash of it, too.

    Raises ResourceError where it comes of a limit of memory: native code aborts then.
    """
    if not death.is_crash:
        return None
    if death.status == -signal.SIGABRT and is_memory_limited():
        raise out_of_memory()
    return _encoder.encode(Failure(name=task.name, reason=f"the process that scanned it {death}"))


class _Scanner:
    """What a worker does."""

    def __init__(self, context: "ScanContext") -> None:
        self._context = context

    def __call__(self, task: Task) -> bytes:
        return _encoder.encode(self._outcome(task))

    def _outcome(self, task: Task) -> Success | Failure:
        try:
            return Success(result=scan_object(task, self._context))
        except TraplineError as error:
            return Failure(name=task.name, reason=str(error))
        except MemoryError:
            return Failure(name=task.name, reason="there was not enough memory for it")
        except Exception as error:  # one bad module must not end the scan; the report names it
            if os.environ.get("TRAPLINE_DEBUG"):
                raise
            kind = type(error).__name__
            return Failure(name=task.name, reason=f"internal error ({kind}: {error})")
