"""`trapline rules`: what a TD does, by TDX module version, with sources."""

from pathlib import Path

import click

from trapline.api.lint_rules import lint_rules
from trapline.base.errors import UsageError
from trapline.cli.command import Command, Group
from trapline.cli.options import PATH, format_option, module_version_option, output_option
from trapline.report.output import Destination
from trapline.report.records import RULES_DIFF, RULES_EXPLAIN, RULES_LINT, RULES_SHOW
from trapline.results.findings import exit_code
from trapline.rules.documents import compared, shown
from trapline.rules.explain import explain
from trapline.rules.ruleset import TABLES, RuleSet
from trapline.rules.tables import load, load_folder, versions


@click.group(
    "rules",
    cls=Group,
    examples=("trapline rules explain second-ve", "trapline rules show msrs"),
)
def command() -> None:
    """Show what a TD does on each instruction, MSR, CPUID leaf, TDCALL and memory access.

    Each rule names its source. Where sources disagree, all answers are kept, and one is marked
    as the one that trapline's software TD follows.
    """


@command.command(
    "show",
    cls=Command,
    examples=(
        "trapline rules show",
        "trapline rules show msrs",
        "trapline rules show cpuid --format csv -o cpuid.csv",
    ),
)
@click.argument("table", required=False, metavar="[TABLE]")
@module_version_option
@format_option(RULES_SHOW.format_names)
@output_option
def show_command(
    table: str | None, module_version: str, format_name: str, output: Path | None
) -> int:
    """Print TABLE, or a list of the tables.

    Tables: instructions, msrs, cpuid, memory, tdcalls, tdvmcalls, statuses, nesting, attributes,
    fields, linux.
    """
    destination = Destination(output)
    result = shown(load(module_version), table)
    if format_name == "csv" and table is None:
        raise UsageError(f"a CSV file holds one table; name one of {', '.join(TABLES)}.")
    destination.write(RULES_SHOW.render(result, format_name))
    return exit_code(result)


@command.command(
    "explain",
    cls=Command,
    examples=(
        "trapline rules explain second-ve",
        "trapline rules explain MOV CR0",
        "trapline rules explain cpuid:4.2 --format json",
    ),
)
@click.argument("what", nargs=-1, required=True)
@module_version_option
@format_option(RULES_EXPLAIN.format_names)
@output_option
def explain_command(
    what: tuple[str, ...], module_version: str, format_name: str, output: Path | None
) -> int:
    """Say what a TD does with WHAT, who says so, and who disagrees.

    \b
    WHAT is one of
      HLT, "MOV CR0", IN          an instruction or event
      msr:0x6e0, "RDMSR 0x6e0"    an MSR by index, or by name: IA32_TSC_DEADLINE
      cpuid:0x1f, "cpuid 4.2"     a CPUID leaf, with a sub-leaf
      port:0x71                   what IN and OUT come to
      tdcall:6, TDG.VP.INFO       a TDCALL leaf
      tdvmcall:0x10001, MapGPA    a TDVMCALL function
      memory:pending              accesses to private or shared pages in a state
      status:0xc000010000000001   a completion code or TDVMCALL status
      second-ve, nmi              what happens when events meet
      TD_CTLS, SEPT_VE_DISABLE    an attribute bit or metadata field
      nmi-held, sdm-rflags-if     a row by its id, as reports print it
    """  # noqa: D301 - click wants the backspace character itself
    destination = Destination(output)
    result = explain(load(module_version), " ".join(what))
    destination.write(RULES_EXPLAIN.render(result, format_name))
    return exit_code(result)


@command.command("diff", cls=Command, examples=("trapline rules diff 1.5.01 my-tables/",))
@click.argument("old")
@click.argument("new")
@format_option(RULES_DIFF.format_names)
@output_option
def diff_command(old: str, new: str, format_name: str, output: Path | None) -> int:
    """Compare the rules of OLD and NEW: module versions, or folders of CSV files.

    Rows are paired by their ids. Exits with 1 when something differs.
    """
    destination = Destination(output)
    result = compared(_rules(old), _rules(new), old, new)
    destination.write(RULES_DIFF.render(result, format_name))
    return exit_code(result)


@command.command(
    "lint", cls=Command, examples=("trapline rules lint", "trapline rules lint my-tables/")
)
@click.argument("folder", required=False, metavar="[DIR]", type=PATH)
@format_option(RULES_LINT.format_names)
@output_option
def lint_command(folder: Path | None, format_name: str, output: Path | None) -> int:
    """Check the rule tables in DIR, or those that trapline brings along.

    Finds columns and words that no table has, ids used twice, rows without a source, questions
    with no or several followed answers, MSR ranges and CPUID leaves that overlap, enforced rows
    that nothing asks, and answers that the software TD looks for in vain or cannot give. Exits
    with 1 when it finds something.
    """
    destination = Destination(output)
    result = lint_rules(folder)
    destination.write(RULES_LINT.render(result, format_name))
    return exit_code(result)


def _rules(name: str) -> RuleSet:
    """Load a version that ships, or else a folder."""
    return load(name) if name in versions() else load_folder(Path(name))
