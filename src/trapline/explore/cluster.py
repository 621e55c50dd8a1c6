"""Campaigns on a dask cluster: the optional extra `cluster`.

Each process of the cluster boots the kernel for itself and keeps its stage from one chunk to
the next; it needs trapline and the kernel's files at the same paths.
"""

import contextlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Final

from trapline.base.errors import (
    NotReproducibleError,
    ToolMissingError,
    WorkersLostError,
)
from trapline.explore.campaign import Ledger
from trapline.explore.stage import Plan, Stage, StageConfig, Task
from trapline.explore.worker import Done, run_tasks
from trapline.results.explore import NotOpened

_CONNECT_SECONDS: Final = 20


class _Kept:
    """The stage of this process: at most one, as a guest takes much memory."""

    digest = ""
    stage: Stage | None = None
    plans: Iterator[Plan] | None = None
    scenario = ""
    passed: frozenset[str] = frozenset()


def explore_plans(config: StageConfig) -> tuple[tuple[Plan, ...], tuple[NotOpened, ...]]:
    """Open all windows; return the plans, and the scenarios without a window."""
    with Stage(config) as stage:
        return tuple(stage.plans()), tuple(stage.not_opened)


def explore_chunk(config: StageConfig, tasks: tuple[Task, ...]) -> tuple[tuple[Task, ...], Done]:
    """Run a chunk of tasks of one scenario in this process."""
    stage = _stage_at(config, tasks[0].scenario)
    return tasks, run_tasks(stage, tasks)


def _stage_at(config: StageConfig, scenario: str) -> Stage:
    """Return the stage of this process with that window open, booting again if it is past."""
    if _Kept.digest != config.digest or scenario in _Kept.passed or _Kept.stage is None:
        if _Kept.stage is not None:
            _Kept.stage.__exit__()
        _Kept.stage, _Kept.digest = Stage(config), config.digest
        _Kept.plans, _Kept.scenario, _Kept.passed = _Kept.stage.plans(), "", frozenset()
    assert _Kept.plans is not None
    while _Kept.scenario != scenario:
        _Kept.passed |= {_Kept.scenario}
        plan = next(_Kept.plans, None)
        if plan is None:
            raise NotReproducibleError(
                f"scenario {scenario}: its window did not open in one of two processes."
            )
        _Kept.scenario = plan.window.scenario
    return _Kept.stage


class ClusterWorkers:
    """Runs a campaign on the cluster whose scheduler is at `address`."""

    def __init__(self, config: StageConfig, address: str, ledger: Ledger) -> None:
        self._config = config
        self._address = address
        self._ledger = ledger
        try:
            self._distributed: Any = import_module("distributed")
        except ImportError as error:
            raise ToolMissingError(
                "--cluster needs dask.distributed; install it with: pip install trapline[cluster]"
            ) from error

    def run(self) -> tuple[NotOpened, ...]:
        """Run all there is to run."""
        distributed = self._distributed
        try:
            client = distributed.Client(self._address, timeout=_CONNECT_SECONDS)
        except (OSError, ValueError, TimeoutError) as error:
            raise WorkersLostError(
                f"no dask scheduler answers at {self._address} ({error}); start one, or leave "
                "--cluster out."
            ) from error
        try:
            return self._run(client)
        except (OSError, distributed.CancelledError, distributed.KilledWorker) as error:
            raise WorkersLostError(
                f"the cluster at {self._address} went away ({type(error).__name__}); what is done "
                "is in the store: go on with --resume."
            ) from error
        finally:
            with contextlib.suppress(OSError, TimeoutError):
                client.close(timeout=_CONNECT_SECONDS)

    def _run(self, client: Any) -> tuple[NotOpened, ...]:  # noqa: ANN401 - distributed has no types
        # pure=False: the same call is made again after --resume, and must then be run.
        plans, not_opened = client.submit(explore_plans, self._config, pure=False).result()
        chunks = [chunk for plan in plans for chunk in self._ledger.opened(plan)]
        futures = client.map(
            explore_chunk, [self._config] * len(chunks), chunks, pure=False, retries=2
        )
        for future in self._distributed.as_completed(futures):
            tasks, done = future.result()
            self._ledger.done(tasks, done.rows, done.footprints)
        return tuple(sorted(not_opened, key=lambda one: one.scenario))
