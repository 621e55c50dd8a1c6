"""A worker process of a campaign on this machine, and what it and its parent say to each other.

The worker opens a window and waits for tasks; it is sent on to the next window when there are
none left for it. All it says goes through one pipe, so that its death is seen at once.
"""

import ctypes
import os
import signal
from multiprocessing.connection import Connection
from typing import Final, NamedTuple

from trapline.base.errors import TraplineError
from trapline.explore.stage import Plan, Stage, StageConfig, Task
from trapline.explore.store import Row, row_of
from trapline.results.explore import NotOpened

_PR_SET_PDEATHSIG: Final = 1


class Opened(NamedTuple):
    """A window is open: send tasks, or None for the next one."""

    plan: Plan


class Done(NamedTuple):
    """Tasks are finished: send more, or None."""

    tasks: tuple[Task, ...]
    rows: tuple[Row, ...]


class Finished(NamedTuple):
    """There are no more windows; these scenarios had none."""

    not_opened: tuple[NotOpened, ...]


class Failed(NamedTuple):
    """The user can do something about it."""

    error: TraplineError


Message = Opened | Done | Finished | Failed


def work(pipe: Connection, config: StageConfig) -> None:
    """Serve a campaign until its parent closes the pipe or there is nothing left to do."""
    # Ctrl-C goes to the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that is killed closes the pipe, but a worker looks at it only between chunks.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        with Stage(config) as stage:
            for plan in stage.plans():
                pipe.send(Opened(plan))
                while (tasks := pipe.recv()) is not None:
                    rows = tuple(row_of(result) for task in tasks for result in stage.run(task))
                    pipe.send(Done(tasks, rows))
            pipe.send(Finished(tuple(stage.not_opened)))
    except TraplineError as error:
        pipe.send(Failed(error))
    except (EOFError, BrokenPipeError):
        # The parent is gone. Nothing here is worth tidying up, and a guest's memory takes long.
        os._exit(1)
    except Exception as error:
        if os.environ.get("TRAPLINE_DEBUG"):
            raise
        kind = type(error).__name__
        pipe.send(
            Failed(
                TraplineError(
                    f"internal error in a worker ({kind}: {error}); set TRAPLINE_DEBUG=1 and "
                    "report the traceback."
                )
            )
        )
