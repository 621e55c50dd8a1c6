"""What a process of a campaign does: opens windows, one after the other, and runs tasks in them."""

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

from trapline.explore.stage import Plan, Stage, StageConfig, Task
from trapline.explore.store import Row, row_of
from trapline.results.explore import NotOpened

NEXT_WINDOW: Final = "next window"

#: Tasks of the window that is open, or the word to go on to the next one.
Job = tuple[Task, ...] | Literal["next window"]


class Opened(NamedTuple):
    """A window is open."""

    plan: Plan


class Done(NamedTuple):
    """Tasks are finished."""

    rows: tuple[Row, ...]
    footprints: tuple[tuple[str, bytes], ...]


class Finished(NamedTuple):
    """There are no more windows; these scenarios had none."""

    not_opened: tuple[NotOpened, ...]


Answer = Opened | Done | Finished


class WindowWorker:
    """Goes through the windows of a campaign as its jobs say."""

    def __init__(self, config: StageConfig) -> None:
        self._stage = Stage(config)
        self._plans = self._stage.plans()

    def __call__(self, job: Job) -> Answer:
        """Do a job."""
        if job != NEXT_WINDOW:
            return run_tasks(self._stage, job)
        plan = next(self._plans, None)
        if plan is not None:
            return Opened(plan)
        self._stage.__exit__()  # others may need the memory
        return Finished(tuple(self._stage.not_opened))


def run_tasks(stage: Stage, tasks: Iterable[Task]) -> Done:
    """Run tasks of the window that is open, and make the results ready for the store."""
    rows = tuple(row_of(result) for task in tasks for result in stage.run(task))
    return Done(rows, stage.footprints())
