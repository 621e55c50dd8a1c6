"""`trapline explore`: events injected at every instruction boundary of a window of a running TD."""

import re
from typing import TYPE_CHECKING, Final

import click
from click.shell_completion import CompletionItem

import trapline
from trapline.base.errors import UsageError
from trapline.cli.command import Command
from trapline.cli.options import (
    PATH,
    format_option,
    initrd_option,
    kernel_argument,
    labels_option,
    module_version_option,
    output_option,
    verbose_option,
    workers_option,
)
from trapline.cli.progress import ProgressReport
from trapline.explore import scenario
from trapline.report.output import Destination
from trapline.report.records import EXPLORE
from trapline.results.findings import exit_code

if TYPE_CHECKING:
    from pathlib import Path


_LIST: Final = "list"
_NUMBER: Final = re.compile("[0-9]{1,12}")


def _show_list(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    """Print the scenarios that come with trapline, and the events."""
    del parameter
    if not wanted or context.resilient_parsing:
        return
    titles = {name: scenario.load(name).title for name in scenario.shipped()}
    width = max(map(len, (*titles, *scenario.EVENTS)))
    for head, rows in (("Scenarios:", titles), ("Events:", scenario.EVENTS)):
        click.echo(head)
        for name, text in rows.items():
            click.echo(f"  {name:{width}} {text}")
    context.exit()


def _scenarios(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the name of a scenario, or else of a file: bash offers no mixture."""
    del context, parameter
    names = [name for name in scenario.shipped() if name.startswith(incomplete)]
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


def _events(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    del context, parameter
    return [name for name in scenario.EVENTS if name.startswith(incomplete)]


@click.command(
    "explore",
    cls=Command,
    groups={
        "What is tried": ("names", _LIST, "beyond_rules", "event", "at", "limit"),
        "The guest": ("initrd", "module_version"),
        "The campaign": ("workers", "cluster", "store", "resume", "baseline"),
        "The result": ("labels", "format_name", "output", "verbosity"),
    },
    examples=(
        "trapline explore --list",
        "trapline explore vmlinux --scenario syscall-gap --beyond-rules",
        "trapline explore vmlinux --scenario ve-in-nmi --event nmi --at 12 -v",
        "trapline explore vmlinux --store campaign.db --baseline last-release.json",
    ),
)
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
    shell_complete=_scenarios,
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
    shell_complete=_events,
    help="Inject this instead of what the scenario says; with E2, that into the handling of E.",
)
@click.option(
    "--at",
    metavar="K[,N]",
    help="With --event: only before instruction K, E2 N instructions later.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Try only so many boundaries of each window and event, evenly spread.",
)
@initrd_option
@module_version_option
@workers_option
@click.option("--cluster", metavar="ADDR", help="Run on the dask cluster at this address instead.")
@click.option(
    "--store",
    type=PATH,
    metavar="FILE",
    help="Keep all results in this SQLite file, so that the campaign can be resumed.",
)
@click.option("--resume", is_flag=True, help="Go on with the campaign in --store.")
@click.option(
    "--baseline",
    type=PATH,
    metavar="FILE",
    help="Compare with an earlier --store or JSON result; only what became worse is a finding.",
)
@labels_option
@format_option(EXPLORE.format_names)
@output_option
@verbose_option
def command(
    kernel: str,
    *,
    names: tuple[str, ...],
    beyond_rules: bool,
    event: str | None,
    at: str | None,
    limit: int | None,
    initrd: "Path | None",
    module_version: str,
    workers: int | None,
    cluster: str | None,
    store: "Path | None",
    resume: bool,
    baseline: "Path | None",
    labels: "Path | None",
    format_name: str,
    output: "Path | None",
    verbosity: int,
) -> int:
    """Inject events at every instruction of a window of the running KERNEL, and judge each run.

    KERNEL is as for `trapline scan`; its vmlinux with symbols is booted as a TD.

    Exits with 1 when a run went wrong: an oops, a panic, a double or triple fault, a hang, a
    silent corruption, a handler on the user's stack or GS base.
    """
    destination = Destination(output)
    with ProgressReport() as report:
        result = trapline.explore(
            kernel,
            scenarios=names,
            beyond_rules=beyond_rules,
            event=event,
            at=None if at is None else _numbers(at),
            limit=limit,
            initrd=initrd,
            module_version=module_version,
            workers=workers,
            cluster=cluster,
            store=store,
            resume=resume,
            baseline=baseline,
            labels=labels,
            progress=report.advance,
            announce=report.announce,
        )
    destination.write(EXPLORE.render(result, format_name, verbosity))
    return exit_code(result)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(map(_NUMBER.fullmatch, parts)):
        raise UsageError(f"--at {text}: give one number, K, or two numbers, K,N.")
    return tuple(map(int, parts))
