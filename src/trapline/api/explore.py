"""`explore`: events injected at every instruction of a window of a running TD."""

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from trapline.api.kernel import as_kernel
from trapline.api.label import known_labels, with_labels
from trapline.api.progress import Progress
from trapline.api.several import several
from trapline.base.errors import BadInputFileError, UsageError
from trapline.base.workers import how_many
from trapline.boot.plan import BootOptions, make_plan
from trapline.explore import baseline as earlier
from trapline.explore import campaign, scenario
from trapline.explore.campaign import Ledger, LocalWorkers
from trapline.explore.cluster import ClusterWorkers
from trapline.explore.scenario import EVENTS, Inject, Scenario
from trapline.explore.stage import Exactly, StageConfig
from trapline.explore.store import Store
from trapline.guest.target import DEFAULT_MEMORY, TargetSource
from trapline.results.explore import NOTHING
from trapline.rules.tables import DEFAULT_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from trapline.api.kernel import AnyKernel, AnyPath, Kernel
    from trapline.api.label import AnyLabels
    from trapline.api.progress import Announce, OnProgress
    from trapline.explore.baseline import Verdicts
    from trapline.results.explore import ExploreResult, NotOpened


def explore(
    kernel: "AnyKernel",
    *,
    scenarios: "str | Iterable[str]" = (),
    beyond_rules: bool = False,
    event: str | None = None,
    at: "Sequence[int] | None" = None,
    initrd: "AnyPath | None" = None,
    module_version: str = DEFAULT_VERSION,
    baseline: "AnyPath | None" = None,
    limit: int | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    store: "AnyPath | None" = None,
    resume: bool = False,
    labels: "AnyLabels" = None,
    progress: "OnProgress | None" = None,
    announce: "Announce | None" = None,
) -> "ExploreResult":
    """Inject events at every instruction of a window of the running kernel, and judge each run.

    `scenarios` are names of shipped ones or paths of TOML files; none means all that ship.
    `beyond_rules` tries, too, what the TDX module's rules do not allow. `event` ("nmi", or
    "nmi,ve:wrmsr" for the second inside the handling of the first) replaces what the scenarios
    inject; `at` is then one boundary, and how many instructions later the second comes. `initrd`
    replaces the self-test. `baseline` is an earlier store or JSON result: what became worse is in
    `ExploreResult.worse_than_baseline`. `limit` tries only so many boundaries of each window and
    event. `workers` is the number of processes, by default one for each CPU; `cluster` is the
    address of a dask scheduler to use instead. `store` keeps all results in a file, so that
    `resume` can go on. `labels` are what people said of findings.

    Raises UsageError, BadInputFileError, NoDebugInfoError without a vmlinux, WorkersLostError,
    NotReproducibleError, and what `boot` raises.
    """
    if resume and store is None:
        raise UsageError("--resume goes on with a campaign in a file; name it with --store.")
    said = known_labels(labels)
    named = several(scenarios)
    references = named or scenario.shipped()
    chosen, exactly = _chosen(_load(references), event, at)
    before = None if baseline is None else earlier.verdicts(*earlier.load(Path(baseline)))
    opened = as_kernel(kernel, announce=announce)
    config = StageConfig(
        _source(opened, initrd, module_version, announce),
        chosen,
        references,
        beyond_rules,
        exactly,
        is_all_shipped=not named,
    )
    build_id = opened.build_id
    identity = campaign.identity(config, build_id)
    path = None if store is None else Path(store)
    with Store.open(path, identity, resume=resume) as results:

        def advance(done: int, total: int) -> None:
            if progress is not None:
                progress(Progress("explored", done, total, _to_come(ledger.to_come)))

        ledger = Ledger(results, config, advance, limit)
        try:
            if cluster is not None:
                not_opened = ClusterWorkers(config, cluster, ledger).run()
            else:
                not_opened = LocalWorkers(config, how_many(workers), ledger).run()
        except KeyboardInterrupt:
            if store is not None and announce is not None:
                announce(f"what is done is in {store}; go on with --resume.")
            raise
        result = campaign.result_of(results, config, build_id, not_opened)
        has_died = any(one.event == NOTHING for one in result.results)
        asked = tuple(one for one in not_opened if one.scenario in {s.name for s in chosen})
        if named and asked and not has_died:
            raise _unopened(asked)
    return with_labels(result if before is None else _compared(result, before), said)


def _to_come(windows: int) -> str:
    if not windows:
        return ""
    return f"up to {windows} more window{'s' if windows > 1 else ''} to come"


def _unopened(scenarios: "tuple[NotOpened, ...]") -> BadInputFileError:
    said = "; ".join(f"scenario {one.scenario}: {one.why}" for one in scenarios)
    return BadInputFileError(f"{said}; choose another start.")


def _compared(result: "ExploreResult", before: "Verdicts") -> "ExploreResult":
    now = earlier.verdicts(result.windows, result.results)
    worse = earlier.worse(before, now, result.not_opened)
    return msgspec.structs.replace(result, worse_than_baseline=worse)


def _load(references: tuple[str, ...]) -> tuple[Scenario, ...]:
    scenarios = tuple(scenario.load(reference) for reference in references)
    names = [one.name for one in scenarios]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two scenarios are called {twice!r}; rename one file or drop it.")
    return scenarios


def _chosen(
    scenarios: tuple[Scenario, ...], event: str | None, at: "Sequence[int] | None"
) -> tuple[tuple[Scenario, ...], Exactly | None]:
    """Replace what the scenarios inject by what the caller says."""
    if event is None:
        if at is not None:
            raise UsageError("--at says where to inject; say what with --event.")
        return scenarios, None
    first, *rest = event.split(",")
    if len(rest) > 1 or not all(scenario.is_event(name) for name in (first, *rest)):
        raise UsageError(
            f"--event {event}: give an event, or two with a comma; known are {', '.join(EVENTS)}."
        )
    chosen = []
    for one in scenarios:
        expect = next((i.expect for i in one.inject if i.event == first), ())
        inject = Inject(event=first, then=tuple(rest), expect=expect)
        chosen.append(msgspec.structs.replace(one, inject=(inject,)))
    if at is None:
        return tuple(chosen), None
    if len(at) != 1 + len(rest):
        wanted = "two numbers, K,N" if rest else "one number"
        raise UsageError(f"--at: {wanted} is what goes with --event {event}.")
    return tuple(chosen), Exactly(*at)


def _source(
    kernel: "Kernel", initrd: "AnyPath | None", module_version: str, announce: "Announce | None"
) -> TargetSource:
    vmlinux = kernel.vmlinux
    path = None if initrd is None else Path(initrd)
    options = BootOptions(initrd=path, module_version=module_version)
    plan = make_plan(kernel.files, options, announce)
    reproduced: tuple[str, ...] = () if path is None else ("--initrd", str(path))
    if module_version != DEFAULT_VERSION:
        reproduced += ("--module-version", module_version)
    return TargetSource(
        kernel=kernel.name,
        vmlinux=vmlinux,
        initrd=plan.initrd,
        release=kernel.release,
        memory=DEFAULT_MEMORY,
        module_version=module_version,
        options=reproduced,
    )
