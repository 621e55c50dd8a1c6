"""`trapline explore`: events injected at every instruction boundary of a window of a running TD."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec

from trapline.base.errors import BadInputFileError, ExitCode, NoDebugInfoError, UsageError
from trapline.boot.plan import BootOptions, make_plan
from trapline.cli.options import format_option, kernel_argument, output_option, verbose_option
from trapline.cli.progress import ProgressReport
from trapline.explore import baseline, campaign, scenario
from trapline.explore.campaign import Ledger, LocalWorkers
from trapline.explore.cluster import ClusterWorkers
from trapline.explore.scenario import EVENTS, Inject, Scenario
from trapline.explore.stage import Exactly, StageConfig
from trapline.explore.store import Store
from trapline.guest.target import DEFAULT_MEMORY, TargetSource
from trapline.kernel.elf.file import ElfFile
from trapline.kernel.find.locate import locate
from trapline.report.explore_text import is_finding
from trapline.report.formats import EXPLORE_FORMATS
from trapline.report.output import Destination

if TYPE_CHECKING:
    from trapline.results.explore import ExploreResult, NotOpened

_PATH: Final = click.Path(path_type=Path)
_LIST: Final = "list"
_NUMBER: Final = re.compile("[0-9]{1,12}")


def _show_list(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    """Print the scenarios that come with trapline, and the events."""
    del parameter
    if not wanted or context.resilient_parsing:
        return
    titles = {name: scenario.load(name).title for name in scenario.shipped()}
    width = max(map(len, (*titles, *EVENTS)))
    for head, rows in (("Scenarios:", titles), ("Events:", EVENTS)):
        click.echo(head)
        for name, text in rows.items():
            click.echo(f"  {name:{width}} {text}")
    context.exit()


@click.command("explore", short_help="Inject events at every instruction of a window.")
@kernel_argument
@click.option(
    "--list",
    _LIST,
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_list,
    help="Name the scenarios that come with trapline and the events they inject.",
)
@click.option(
    "--scenario",
    "names",
    multiple=True,
    metavar="NAME|FILE",
    help="A scenario by name, or one of your own (TOML); repeatable. Default: all.",
)
@click.option(
    "--beyond-rules",
    is_flag=True,
    help="Try, too, what the TDX module's rules do not allow.",
)
@click.option(
    "--event",
    metavar="E[,E2]",
    help="Inject this instead of what the scenario says; with E2, that into the handling of E.",
)
@click.option(
    "--at",
    metavar="K[,N]",
    help="With --event: only before instruction K, E2 N instructions later.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1, max=256),
    metavar="N",
    help="Processes on this machine; default: one for each CPU.",
)
@click.option("--cluster", metavar="ADDR", help="Run on the dask cluster at this address instead.")
@click.option(
    "--store",
    type=_PATH,
    metavar="FILE",
    help="Keep all results in this SQLite file, so that the campaign can be resumed.",
)
@click.option("--resume", is_flag=True, help="Go on with the campaign in --store.")
@click.option(
    "--baseline",
    "baseline_path",
    type=_PATH,
    metavar="FILE",
    help="Compare with an earlier --store or JSON result; only what became worse is a finding.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Try only so many boundaries of each window and event, evenly spread.",
)
@click.option(
    "--initrd",
    type=_PATH,
    metavar="FILE",
    help="Boot this initrd; default: a busybox that tests the guest and powers it off.",
)
@format_option(EXPLORE_FORMATS)
@output_option
@verbose_option
def command(  # noqa: PLR0917 - click passes by name
    kernel: str,
    names: tuple[str, ...],
    beyond_rules: bool,
    event: str | None,
    at: str | None,
    workers: int | None,
    cluster: str | None,
    store: Path | None,
    resume: bool,
    baseline_path: Path | None,
    limit: int | None,
    initrd: Path | None,
    format_name: str,
    output: Path | None,
    verbosity: int,
) -> int:
    """Inject events at every instruction of a window of the running KERNEL, and judge each run.

    KERNEL is as for `trapline scan`; its vmlinux with symbols is booted as a TD.

    Exits with 1 when a run went wrong: an oops, a panic, a double or triple fault, a hang, a
    silent corruption, a handler on the user's stack or GS base.
    """
    destination = Destination(output)
    if resume and store is None:
        raise UsageError("--resume goes on with a campaign in a file; name it with --store.")
    references = names or scenario.shipped()
    scenarios = tuple(scenario.load(reference) for reference in references)
    _check_names(scenarios)
    exactly = None
    if event is not None:
        scenarios, exactly = _chosen(scenarios, event, at)
    elif at is not None:
        raise UsageError("--at says where to inject; say what with --event.")
    before = None if baseline_path is None else baseline.verdicts(*baseline.load(baseline_path))
    with ProgressReport("explored") as progress:
        source = _source(kernel, initrd, progress)
        config = StageConfig(
            source, scenarios, references, beyond_rules, exactly, is_all_shipped=not names
        )
        with ElfFile.open(source.vmlinux) as elf:
            build_id = elf.build_id
        with Store.open(store, campaign.identity(config, build_id), resume=resume) as results:

            def advance(done: int, total: int) -> None:
                progress.advance(done, total, _to_come(ledger.to_come))

            ledger = Ledger(results, config, advance, limit)
            try:
                if cluster is not None:
                    not_opened = ClusterWorkers(config, cluster, ledger).run()
                else:
                    count = workers or os.cpu_count() or 1
                    not_opened = LocalWorkers(config, count, ledger).run()
            except KeyboardInterrupt:
                if store is not None:
                    progress.announce(f"what is done is in {store}; go on with --resume.")
                raise
            if names and not_opened:
                raise _unopened(not_opened)
            result = campaign.result_of(results, config, build_id, not_opened)
    if before is not None:
        now = baseline.verdicts(result.windows, result.results)
        worse = baseline.worse(before, now, not_opened)
        result = msgspec.structs.replace(result, worse_than_baseline=worse)
    destination.write(EXPLORE_FORMATS[format_name](result, verbosity))
    return _exit_code(result)


def _to_come(windows: int) -> str:
    if not windows:
        return ""
    return f"up to {windows} more window{'s' if windows > 1 else ''} to come"


def _exit_code(result: "ExploreResult") -> ExitCode:
    if result.worse_than_baseline is not None:
        return ExitCode.FINDINGS if result.worse_than_baseline else ExitCode.CLEAN
    return ExitCode.FINDINGS if any(map(is_finding, result.results)) else ExitCode.CLEAN


def _unopened(scenarios: "tuple[NotOpened, ...]") -> BadInputFileError:
    said = "; ".join(f"scenario {one.scenario}: {one.why}" for one in scenarios)
    return BadInputFileError(f"{said}; choose another start.")


def _check_names(scenarios: tuple[Scenario, ...]) -> None:
    names = [one.name for one in scenarios]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two scenarios are called {twice!r}; rename one file or drop it.")


def _chosen(
    scenarios: tuple[Scenario, ...], event: str, at: str | None
) -> tuple[tuple[Scenario, ...], Exactly | None]:
    """Replace what the scenarios inject by what the command line says."""
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
    return tuple(chosen), None if at is None else _where(at, nested=bool(rest))


def _where(at: str, *, nested: bool) -> Exactly:
    numbers = at.split(",")
    if not all(map(_NUMBER.fullmatch, numbers)) or len(numbers) != 1 + nested:
        wanted = "two numbers, K,N" if nested else "one number"
        raise UsageError(f"--at {at}: {wanted} is what goes with this --event.")
    return Exactly(*map(int, numbers))


def _source(kernel: str, initrd: Path | None, progress: ProgressReport) -> TargetSource:
    files = locate(kernel, announce=progress.announce)
    if files.vmlinux is None:
        raise NoDebugInfoError(
            f"{kernel}: there is no vmlinux with symbols; install the kernel's debug package, or "
            "name one that deb: can fetch."
        )
    plan = make_plan(files, BootOptions(initrd=initrd), progress.announce)
    return TargetSource(
        kernel=kernel,
        vmlinux=files.vmlinux.resolve(),
        initrd=plan.initrd,
        release=files.release,
        memory=DEFAULT_MEMORY,
        options=() if initrd is None else ("--initrd", str(initrd)),
    )
