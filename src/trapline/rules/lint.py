"""Checks a folder of rule tables for what a reader could stumble over.

Beyond what does not parse: ids used twice, rows without a source, questions with no or several
followed answers, MSR ranges and CPUID leaves that overlap, statuses that no table defines, and
rows of another module version.
"""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from trapline.base.errors import BadInputFileError
from trapline.rules.rows import (
    CpuidKind,
    CpuidRule,
    MsrKind,
    MsrRule,
    StatusRule,
    TdcallRule,
    TdvmcallRule,
)
from trapline.rules.tables import Located, Problem, folder_of, read, version_of, versions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.resources.abc import Traversable

_NOT_STATUSES = {"gp", "td_exit"}


def lint(version: str) -> list[Problem]:
    """Check the tables of a module version that ships."""
    if version not in versions():
        return [Problem("*", 0, f"no tables for module version {version!r}")]
    return _lint(folder_of(version), version)


def lint_folder(folder: Path) -> list[Problem]:
    """Check the tables in a folder; the version is whatever most rows say."""
    if not folder.is_dir():
        raise BadInputFileError(f"{folder} is not a folder of rule tables.")
    return _lint(folder, None)


def _lint(folder: "Traversable", version: str | None) -> list[Problem]:
    tables, problems = read(folder)
    if version is None:
        version = version_of(tables)
    shipped = versions()
    older = shipped[: shipped.index(version)] if version in shipped else []
    for name, rows in tables.items():
        problems.extend(_common(name, rows, (version, *older)))
        problems.extend(_disagreements(name, rows))
    problems.extend(_msr_ranges(tables["msrs"]))
    problems.extend(_cpuid_leaves(tables["cpuid"]))
    problems.extend(_statuses(tables["tdcalls"], tables["tdvmcalls"], tables["statuses"]))
    return sorted(problems)


def _common(name: str, rows: list[Located], allowed: tuple[str, ...]) -> "Iterator[Problem]":
    first_line: dict[str, int] = {}
    for line, row in rows:
        if not row.id:
            yield Problem(name, line, "no id")
        elif row.id in first_line:
            yield Problem(name, line, f"id {row.id!r} is already on line {first_line[row.id]}")
        first_line.setdefault(row.id, line)
        if not row.source.strip():
            yield Problem(name, line, f"{row.id}: no source")
        if row.module not in allowed:
            yield Problem(
                name, line, f"{row.id}: module {row.module!r} in tables of {allowed[0]!r}"
            )


def _disagreements(name: str, rows: list[Located]) -> "Iterator[Problem]":
    answers: dict[tuple[object, ...], list[Located]] = defaultdict(list)
    for located in rows:
        answers[located.row.key].append(located)
    for located_rows in answers.values():
        followed = [located for located in located_rows if located.row.followed]
        line = located_rows[0].line
        ids = ", ".join(located.row.id for located in located_rows)
        if not followed:
            yield Problem(name, line, f"no followed answer among: {ids}")
        elif len(followed) > 1:
            line = followed[1].line
            yield Problem(name, line, f"{len(followed)} followed answers among: {ids}")


def _msr_ranges(rows: list[Located]) -> "Iterator[Problem]":
    spans: list[tuple[int, int, int, str]] = []
    for line, row in rows:
        assert isinstance(row, MsrRule)
        for way, action, feature in (
            ("read", row.read, row.read_feature),
            ("write", row.write, row.write_feature),
        ):
            if action.needs_feature != bool(feature):
                named = feature.value
                yield Problem("msrs", line, f"{row.id}: {way} {action} with feature {named!r}")
        if row.kind != MsrKind.RANGE:
            continue
        if row.first is None or row.last is None or not row.first <= row.last <= 0xFFFFFFFF:
            yield Problem("msrs", line, f"{row.id}: not a range of MSR indices")
        elif row.followed:
            spans.append((row.first, row.last, line, row.id))
    yield from _overlaps("msrs", spans)


def _cpuid_leaves(rows: list[Located]) -> "Iterator[Problem]":
    spans: dict[int | None, list[tuple[int, int, int, str]]] = defaultdict(list)
    for line, row in rows:
        assert isinstance(row, CpuidRule)
        if row.kind != CpuidKind.LEAF:
            continue
        if row.first is None or row.last is None or not row.first <= row.last <= 0xFFFFFFFF:
            yield Problem("cpuid", line, f"{row.id}: not a range of leaves")
        elif row.followed:
            spans[row.subleaf].append((row.first, row.last, line, row.id))
    for subleaf, found in spans.items():
        # A row for any sub-leaf overlaps those for one.
        yield from _overlaps("cpuid", found + (spans.get(None, []) if subleaf is not None else []))


def _overlaps(name: str, spans: list[tuple[int, int, int, str]]) -> "Iterator[Problem]":
    end, holder = -1, ""
    for first, last, line, row_id in sorted(spans):
        if first <= end:
            yield Problem(name, line, f"{row_id} overlaps {holder}")
        if last > end:
            end, holder = last, row_id


def _statuses(
    calls: list[Located], vmcalls: list[Located], statuses: list[Located]
) -> "Iterator[Problem]":
    known: dict[str, set[str]] = defaultdict(set)
    for _, row in statuses:
        assert isinstance(row, StatusRule)
        known[row.kind].add(row.name)
    for line, row in calls:
        assert isinstance(row, TdcallRule)
        if row.status not in known["completion"] and row.status not in _NOT_STATUSES:
            yield Problem("tdcalls", line, f"{row.id}: unknown status {row.status!r}")
        if row.operand and row.operand not in known["operand"]:
            yield Problem("tdcalls", line, f"{row.id}: unknown operand {row.operand!r}")
    for line, row in vmcalls:
        assert isinstance(row, TdvmcallRule)
        if row.status not in known["ghci"]:
            yield Problem("tdvmcalls", line, f"{row.id}: unknown status {row.status!r}")
