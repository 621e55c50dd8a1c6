"""Campaigns: windows and runs of all scenarios, by worker processes, into one store.

The parent alone writes the store, one transaction per chunk of tasks. Which worker does what
does not matter for the results. A worker that dies is replaced, and its chunk done again.
"""

import multiprocessing as mp
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Final

from trapline.base import processes
from trapline.base.errors import NotReproducibleError, WorkersLostError
from trapline.base.version import GENERATOR, __version__
from trapline.explore.stage import Plan, StageConfig, Task
from trapline.explore.store import Row, Store
from trapline.explore.worker import Done, Failed, Finished, Message, Opened, work
from trapline.results.explore import NOTHING, ExploreResult, NotOpened

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

# Tasks are handed out in chunks of this many at most; a chunk is one transaction.
_CHUNK: Final = 32
_AHEAD: Final = 2  # chunks that a worker has
_MAX_DEATHS: Final = 3

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
        return len(self._config.scenarios) - len(self._plans)

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

    def done(self, tasks: Collection[Task], rows: Iterable[Row]) -> None:
        """Keep the results of a chunk."""
        self._store.add_rows(rows, tasks)
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


class _Worker:
    """A worker process as its parent sees it."""

    def __init__(self, config: StageConfig, context: mp.context.SpawnContext) -> None:
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=work, args=(theirs, config), name="trapline-explore", daemon=True
        )
        processes.start(self.process)
        theirs.close()
        self.chunks: deque[tuple[Task, ...]] = deque()  # sent, and not answered yet
        self.scenario = ""

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


class LocalWorkers:
    """Runs a campaign with processes on this machine."""

    def __init__(self, config: StageConfig, workers: int, recorder: Ledger) -> None:
        self._config = config
        self._count = workers
        self._recorder = recorder
        self._context = mp.get_context("spawn")
        self._workers: list[_Worker] = []
        self._queues: dict[str, deque[tuple[Task, ...]]] = {}
        self._deaths: Counter[str] = Counter()
        self._not_opened: dict[str, NotOpened] = {}

    def run(self) -> tuple[NotOpened, ...]:
        """Run all there is to run; on an error or Ctrl-C no worker is left behind."""
        try:
            for _ in range(self._count):
                self._workers.append(_Worker(self._config, self._context))
            while self._workers:
                self._serve()
        finally:
            for worker in self._workers:
                worker.stop()
        return tuple(self._not_opened[name] for name in sorted(self._not_opened))

    def _serve(self) -> None:
        """Wait for messages, and answer them."""
        pipes = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(pipes)):
            assert isinstance(pipe, Connection)
            worker = pipes[pipe]
            try:
                self._answer(worker, pipe.recv())
            except (EOFError, ConnectionError):
                self._bury(worker)

    def _answer(self, worker: _Worker, message: Message) -> None:
        if isinstance(message, Failed):
            raise message.error
        if isinstance(message, Finished):
            self._not_opened |= {one.scenario: one for one in message.not_opened}
            self._workers.remove(worker)
            worker.stop()
            if not self._workers and any(self._queues.values()):
                self._workers.append(_Worker(self._config, self._context))
            return
        if isinstance(message, Opened):
            worker.scenario = message.plan.window.scenario
            chunks = self._recorder.opened(message.plan)
            self._queues.setdefault(worker.scenario, deque()).extend(chunks)
        elif isinstance(message, Done):
            worker.chunks.popleft()
            self._feed(worker)  # it works on while the results are stored
            self._recorder.done(message.tasks, message.rows)
            return
        self._feed(worker)

    def _feed(self, worker: _Worker) -> None:
        """Send chunks ahead, so that the worker never waits; None sends it to the next window."""
        queue = self._queues[worker.scenario]
        while queue and len(worker.chunks) < _AHEAD:
            worker.chunks.append(queue.popleft())
            worker.pipe.send(worker.chunks[-1])
        if not worker.chunks:
            worker.pipe.send(None)

    def _bury(self, worker: _Worker) -> None:
        """Replace a worker that died; its chunk goes to whoever comes first."""
        self._workers.remove(worker)
        worker.stop()
        code = worker.process.exitcode
        self._deaths[worker.scenario] += 1
        if self._deaths[worker.scenario] > _MAX_DEATHS:
            where = f"in scenario {worker.scenario}" if worker.scenario else "while booting"
            raise WorkersLostError(
                f"worker processes keep dying {where} (exit code {code}); what is done is in the "
                "store: look for a lack of memory and go on with --resume."
            )
        if worker.chunks:
            self._queues[worker.scenario].extendleft(reversed(worker.chunks))
        self._workers.append(_Worker(self._config, self._context))


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
        counts={name: dict(sorted(count.items())) for name, count in sorted(counts.items())},
        worse_than_baseline=None,
    )
