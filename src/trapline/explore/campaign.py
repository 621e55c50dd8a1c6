"""Campaigns: windows and runs of all scenarios, by worker processes, into one store.

The parent alone writes the store, one transaction per chunk of tasks. Which worker does what
does not matter for the results. A worker that dies is replaced, and its chunk done again.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Final

from trapline.base.errors import NotReproducibleError
from trapline.base.version import GENERATOR, __version__
from trapline.base.workers import Death, Pool
from trapline.explore.footprints import count
from trapline.explore.scenario import family
from trapline.explore.stage import Plan, StageConfig, Task
from trapline.explore.store import Row, Store
from trapline.explore.worker import (
    NEXT_WINDOW,
    Answer,
    Finished,
    Job,
    Opened,
    WindowWorker,
)
from trapline.results.explore import NOTHING, ExploreResult, NotOpened

# Tasks are handed out in chunks of this many at most; a chunk is one transaction.
_CHUNK: Final = 32
_AHEAD: Final = 2  # chunks that a worker has

Progress = Callable[[int, int], None]


class Ledger:
    """Keeps windows and results, and knows what is left; one for each campaign."""

    def __init__(
        self,
        store: Store,
        config: StageConfig,
        progress: Progress,
        limit: int | None = None,
        chunk: int = _CHUNK,
    ) -> None:
        self._store = store
        self._config = config
        self._progress = progress
        self._limit = limit
        self._chunk = chunk
        self._plans: dict[str, Plan] = {}
        self._total = 0
        self._finished = 0

    @property
    def scenarios(self) -> frozenset[str]:
        """The scenarios whose window was seen."""
        return frozenset(self._plans)

    @property
    def to_come(self) -> int:
        """How many windows may still open; not all do in each kernel."""
        begun = {family(name) for name in self._plans}
        return len({s.name for s in self._config.scenarios} - {*begun, *self._plans})

    def opened(self, plan: Plan) -> list[tuple[Task, ...]]:
        """Take a window; return the chunks to be done, none if it is not the first time."""
        name = plan.window.scenario
        if name in self._plans:
            if self._plans[name] != plan:
                raise NotReproducibleError(
                    f"scenario {name}: its window is not the same in two processes; report this."
                )
            return []
        self._plans[name] = plan
        self._store.add_window(plan.window)
        if plan.failure is not None:
            self._store.keep(plan.failure)
            return []
        done = self._store.finished(name)
        tasks = [task for task in self._tasks(plan) if (task.inject, task.boundary) not in done]
        self._total += len(tasks)
        self._progress(self._finished, self._total)
        return [tuple(tasks[i : i + self._chunk]) for i in range(0, len(tasks), self._chunk)]

    def done(
        self,
        tasks: Collection[Task],
        rows: Iterable[Row],
        footprints: Iterable[tuple[str, bytes]] = (),
    ) -> None:
        """Keep the results of a chunk, and the footprints that they refer to."""
        self._store.add_rows(rows, tasks, footprints)
        self._finished += len(tasks)
        self._progress(self._finished, self._total)

    def _tasks(self, plan: Plan) -> list[Task]:
        name = plan.window.scenario
        return [
            Task(name, inject, boundary)
            for inject, boundaries in enumerate(plan.boundaries)
            for boundary in self._spread(boundaries)
        ]

    def _spread(self, boundaries: tuple[int, ...]) -> list[int]:
        """Choose as many boundaries as the limit allows, evenly."""
        count = len(boundaries)
        if self._limit is None or count <= self._limit:
            return list(boundaries)
        return [boundaries[i * count // self._limit] for i in range(self._limit)]


class LocalWorkers:
    """Runs a campaign with processes on this machine: their `base.workers.Desk`."""

    def __init__(self, config: StageConfig, workers: int, recorder: Ledger) -> None:
        self._pool: Pool[Job, Answer] = Pool(
            partial(WindowWorker, config),
            workers,
            ahead=_AHEAD,
            advice="what is done is in the store: look for a lack of memory and go on with "
            "--resume",
        )
        self._recorder = recorder
        self._queues: dict[str, deque[tuple[Task, ...]]] = {}
        # Of each worker: the scenario whose window it has open.
        self._at: dict[int, str] = {}
        # Those that open the next window, or are through with all.
        self._between: set[int] = set()
        self._not_opened: dict[str, NotOpened] = {}

    def run(self) -> tuple[NotOpened, ...]:
        """Run all there is to run; on an error or Ctrl-C no worker is left behind."""
        with self._pool as pool:
            pool.run(self)
        return tuple(self._not_opened[name] for name in sorted(self._not_opened))

    def next(self, worker: int) -> Job | None:
        """Give tasks of the worker's window, or send it on when there are none left."""
        if worker in self._between:
            return None
        queue = self._queues.get(self._at.get(worker, ""))
        if queue:
            return queue.popleft()
        self._between.add(worker)
        return NEXT_WINDOW

    def answered(self, worker: int, job: Job, answer: Answer) -> None:
        """Take a window, or results."""
        if isinstance(answer, Finished):
            self._not_opened |= {one.scenario: one for one in answer.not_opened}
        elif isinstance(answer, Opened):
            self._at[worker] = name = answer.plan.window.scenario
            self._between.discard(worker)
            chunks = self._recorder.opened(answer.plan)
            self._queues.setdefault(name, deque()).extend(chunks)
        elif job != NEXT_WINDOW:
            self._recorder.done(job, answer.rows, answer.footprints)

    def lost(self, worker: int, jobs: Sequence[Job], death: Death) -> str:
        """Give the tasks to whoever comes first: whoever replaces the worker, at last."""
        del death
        name = self._at.get(worker)
        tasks = [job for job in jobs if job != NEXT_WINDOW]
        if name is None:
            return "while booting"
        self._queues[name].extendleft(reversed(tasks))
        return f"in scenario {name}" if tasks else f"on the way from scenario {name} to the next"


def identity(config: StageConfig, build_id: str | None) -> dict[str, str]:
    """Name what the results in a store depend on."""
    return {
        "trapline": __version__,
        "kernel": build_id or config.source.release or config.source.vmlinux.name,
        "module": config.source.module_version,
        "options": config.digest,
    }


def result_of(
    store: Store,
    config: StageConfig,
    build_id: str | None,
    not_opened: tuple[NotOpened, ...] = (),
) -> ExploreResult:
    """Make the result document of a campaign."""
    results = store.results()
    counts: dict[str, Counter[str]] = {}
    for result in results:
        counts.setdefault(result.scenario, Counter())[result.verdict] += 1
    return ExploreResult(
        generator=GENERATOR,
        injected=sum(
            1 + (result.nested is not None) for result in results if result.event != NOTHING
        ),
        kernel=config.source.release or config.source.vmlinux.name,
        build_id=build_id,
        module_version=config.source.module_version,
        beyond_rules=config.beyond_rules,
        not_opened=not_opened,
        windows=store.windows(),
        results=results,
        footprints=count(store.footprints(), results),
        counts={name: dict(sorted(many.items())) for name, many in sorted(counts.items())},
        worse_than_baseline=None,
    )
