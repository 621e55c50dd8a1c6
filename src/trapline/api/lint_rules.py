"""Checks rule tables, alone and against what asks them.

An *enforced* row is one that the TDX module, the VMM or the explorer takes an answer from. All of
them look their rows up when they are built, so building them once tells which rows are asked, and
which are asked for that no table has.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from trapline.base.errors import BadInputFileError
from trapline.cpu.default import open_engine
from trapline.explore.events import ask_all
from trapline.machine.devices.bus import Bus
from trapline.machine.devices.lapic import LocalApic
from trapline.machine.vmm.host import Host, Limits
from trapline.rules.documents import linted
from trapline.rules.lint import lint, lint_folder
from trapline.rules.rows import Standing
from trapline.rules.ruleset import TABLES
from trapline.rules.tables import Problem, folder_of, load, load_folder, read, versions
from trapline.tdx.module import TdxModule
from trapline.tdx.sept import Sept
from trapline.tdx.vmm_interface import TdConfig

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable
    from pathlib import Path

    from trapline.results.rules import RulesLinted
    from trapline.rules.ruleset import RuleSet

_MEMORY: Final = 1 << 21
_PORTS: Final = 1 << 16


def lint_rules(folder: "Path | None" = None) -> "RulesLinted":
    """Check the tables in a folder, or all that ship."""
    if folder is not None:
        problems = lint_folder(folder)
        if not problems:
            problems = _against_askers(load_folder(folder), folder)
        return linted(problems, str(folder))
    problems = []
    for version in versions():
        found = lint(version)
        problems += found or _against_askers(load(version), folder_of(version))
    return linted(problems, "the tables of trapline")


def _against_askers(rules: "RuleSet", folder: "Traversable") -> list[Problem]:
    """Hold the standing of each row against whether it is asked."""
    fresh = replace(rules)  # nothing was asked of it yet
    lines = {
        (name, located.row.id): located.line
        for name, rows in read(folder)[0].items()
        for located in rows
    }
    try:
        ask_everything(fresh)
    except BadInputFileError as error:
        return [_of_refusal(str(error), lines)]
    problems = []
    for name in TABLES:
        for row in fresh.table(name):
            asked = (name, row.id) in fresh.asked
            line = lines[name, row.id]
            if row.standing is Standing.ENFORCED and not asked:
                text = f"{row.id}: nothing asks this row; it is 'described'"
                problems.append(Problem(name, line, text))
            elif row.standing is Standing.DESCRIBED and asked:
                text = f"{row.id}: the software TD asks this row; it is 'enforced'"
                problems.append(Problem(name, line, text))
    return sorted(problems)


def _of_refusal(text: str, lines: dict[tuple[str, str], int]) -> Problem:
    """Make a problem of what an asker said."""
    table, _, rest = text.partition(".csv: ")
    return Problem(table, lines.get((table, rest.partition(" ")[0]), 0), rest.rstrip("."))


def ask_everything(rules: "RuleSet") -> None:
    """Build all that asks `rules`; BadInputFileError for what they do not answer."""
    engine = open_engine(_MEMORY)
    try:
        vcpu = engine.vcpus[0]
        config = TdConfig(memory_size=_MEMORY, module_version=rules.version)
        apic = LocalApic(lambda: 0, config.tsc_frequency, lambda: None)
        sept = Sept(engine.memory, _MEMORY)
        mmio = Bus("MMIO", engine.memory.shared_bit)
        limits = Limits(cycles=0, seconds=None)
        host = Host(vcpu, sept, apic, Bus("port", _PORTS), mmio, limits, _Nobody(), rules)
        TdxModule(vcpu, host, config, rules, sept=sept, apic=apic)
    finally:
        engine.close()
    ask_all(rules)


class _Nobody:
    """A witness who looks away."""

    def breakpoint(self) -> None:
        """Do nothing."""

    def double_fault(self, *, made_by_module: bool = True) -> None:
        """Do nothing."""
        del made_by_module
