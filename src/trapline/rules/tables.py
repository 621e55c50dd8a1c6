"""Loads the rule tables: CSV files, parsed into the types of `rows`.

The tables of a version are package data and loaded once; a folder of the same files can be
loaded beside them. A folder with a file `base`, which names a version that ships, holds only what
is not as there: its rows stand in the place of those of the same id, and behind the others.
Whatever is wrong with a table is collected as `Problem`s, which `trapline.rules.lint` reports and
the loaders refuse.
"""

import csv
import io
import re
import types
import typing
from collections import Counter
from dataclasses import fields
from enum import Enum
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trapline.base import decode, files
from trapline.base.errors import BadInputFileError, UsageError
from trapline.rules.rows import Rule, Standing
from trapline.rules.ruleset import TABLES, RuleSet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.resources.abc import Traversable

DEFAULT_VERSION = "1.5.01"
_PREFIX = "tdx-"
BASE = "base"  # names the version that a folder's tables are changes to
_MAX_BYTES = 4 << 20  # of one table; the largest that ships has 40 kB
_MAX_NUMBER = (1 << 64) - 1


class Problem(NamedTuple):
    """Something wrong with a table; `line` counts from 1, the header being line 1."""

    table: str
    line: int
    text: str

    def __str__(self) -> str:
        """Write it the way compilers do."""
        file = self.table if self.table == BASE else f"{self.table}.csv"
        return f"{file}:{self.line}: {self.text}"


class Located(NamedTuple):
    """A row and where it stands."""

    line: int
    row: Rule


def versions() -> list[str]:
    """Name the module versions that ship, oldest first."""
    names = (entry.name for entry in resources.files(__package__).iterdir() if entry.is_dir())
    found = (name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX))
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")])


@lru_cache(maxsize=8)
def load(version: str = DEFAULT_VERSION) -> RuleSet:
    """Load the tables of a module version that ships with trapline."""
    if version not in versions():
        known = ", ".join(versions())
        raise UsageError(f"no rules for TDX module {version!r}; there are {known}.")
    return _checked(folder_of(version), version)


def load_folder(folder: Path) -> RuleSet:
    """Load the tables in a folder; their version is the newest one that their rows name."""
    if not folder.is_dir():
        raise BadInputFileError(f"{folder} is not a folder of rule tables.")
    return _checked(folder, None)


def folder_of(version: str) -> "Traversable":
    """Return the folder of a version that ships."""
    return resources.files(__package__) / f"{_PREFIX}{version}"


def _checked(folder: "Traversable", version: str | None) -> RuleSet:
    tables, problems = read(folder)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise BadInputFileError(f"{problems[0]}{more}; run 'trapline rules lint' on the folder.")
    rows = {name: tuple(located.row for located in tables[name]) for name in TABLES}
    return RuleSet(version=version or version_of(tables), **typing.cast("Any", rows))


def version_of(tables: dict[str, list[Located]]) -> str:
    """Return the newest version that ships among those that rows name, else what most say."""
    named = Counter(located.row.module for rows in tables.values() for located in rows)
    shipped = [version for version in versions() if version in named]
    if shipped:
        return shipped[-1]
    return named.most_common(1)[0][0] if named else ""


def read(folder: "Traversable") -> tuple[dict[str, list[Located]], list[Problem]]:
    """Parse every table of a folder; rows that do not parse are left out and reported."""
    tables: dict[str, list[Located]] = {}
    problems: list[Problem] = []
    base = _base(folder, problems)
    inherited = {} if base is None else read(folder_of(base))[0]
    for name, kind in TABLES.items():
        own: list[Located] = []
        entry = folder / f"{name}.csv"
        if base is None or _is_there(entry):
            text = _text(entry, name, problems)
            if text is not None:
                _parse(name, kind, text, own, problems)
        tables[name] = _over(inherited.get(name, []), own)
    return tables, problems


def _base(folder: "Traversable", problems: list[Problem]) -> str | None:
    """Name the version that the folder's tables are changes to; None where they are whole."""
    entry = folder / BASE
    if not _is_there(entry):
        return None
    found: list[Problem] = []
    text = _text(entry, BASE, found)
    problems.extend(found)
    version = (text or "").strip()
    if version in versions():
        return version
    if not found:
        known = ", ".join(versions())
        problems.append(
            Problem(BASE, 1, f"{version[:20]!r} is no module version; there are {known}")
        )
    return None


def _over(inherited: list[Located], own: list[Located]) -> list[Located]:
    """Put rows in the place of those of the same id, and the others behind them.

    Rows that are 'removed' take the one of their id away.
    """
    by_id = {located.row.id: located for located in own}
    known = {located.row.id for located in inherited}
    changed = [by_id.get(located.row.id, located) for located in inherited]
    whole = [*changed, *(located for located in own if located.row.id not in known)]
    return [located for located in whole if located.row.standing is not Standing.REMOVED]


def _is_there(entry: "Traversable") -> bool:
    return entry.is_file() or (isinstance(entry, Path) and entry.exists())


def _text(entry: "Traversable", name: str, problems: list[Problem]) -> str | None:
    if not _is_there(entry):
        problems.append(Problem(name, 1, "the table is missing"))
        return None
    try:
        if isinstance(entry, Path):
            data = files.read(entry, limit=_MAX_BYTES, what="a table of rules")
        else:
            data = entry.read_bytes()
        return decode.text(data, str(entry))
    except BadInputFileError as error:
        found = re.match(r"(?:line (\d+) )?(?:is )?(.*)", str(error).removeprefix(f"{entry}: "))
        assert found is not None, "all of it is optional"
        problems.append(Problem(name, int(found[1] or 1), found[2].rstrip(".")))
        return None


def _parse(
    name: str, kind: type[Rule], text: str, rows: list[Located], problems: list[Problem]
) -> None:
    types_of = typing.get_type_hints(kind)
    columns = {column.name: types_of[column.name] for column in fields(kind)}
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        wrong = list(_header_faults(header, columns))
        problems.extend(Problem(name, 1, fault) for fault in wrong)
        if wrong:
            return
        for cells in reader:
            row = _row(name, reader.line_num, header, cells, columns, problems)
            if row is not None:
                rows.append(Located(reader.line_num, kind(**row)))
    except csv.Error as error:
        problems.append(Problem(name, reader.line_num, f"not CSV: {error}"))


def _header_faults(header: list[str], columns: dict[str, Any]) -> "Iterator[str]":
    yield from (f"column {c!r} is missing" for c in columns if c not in header)
    yield from (f"unknown column {c!r}" for c in header if c not in columns)
    if len(set(header)) != len(header):
        yield "a column appears twice"


def _row(
    name: str,
    line: int,
    header: list[str],
    cells: list[str],
    columns: dict[str, Any],
    problems: list[Problem],
) -> dict[str, Any] | None:
    if len(cells) != len(header):
        problems.append(Problem(name, line, f"{len(cells)} cells for {len(header)} columns"))
        return None
    row: dict[str, Any] = {}
    for column, cell in zip(header, cells, strict=True):
        try:
            row[column] = _value(columns[column], cell)
        except ValueError as error:
            problems.append(Problem(name, line, f"column {column!r}: {error}"))
    return row if len(row) == len(header) else None


def _value(kind: Any, cell: str) -> Any:  # noqa: ANN401 - a column's type is known at run time
    if kind is str:
        if not cell.isprintable():
            raise ValueError("control characters")
        return cell
    if kind is bool:
        if cell not in {"yes", "no"}:
            raise ValueError(f"{cell!r} is neither 'yes' nor 'no'")
        return cell == "yes"
    if isinstance(kind, types.UnionType):  # int | None
        return None if not cell else _number(cell)
    if kind is int:
        return _number(cell)
    assert issubclass(kind, Enum)
    try:
        return kind(cell)
    except ValueError:
        allowed = ", ".join(repr(member.value) for member in kind)
        raise ValueError(f"{cell!r} is not one of {allowed}") from None


def _number(cell: str) -> int:
    # int() also takes underscores, spaces and signs, and long digit strings in quadratic time.
    if len(cell) > 20 or not cell.isascii() or not cell.isalnum():
        raise ValueError(f"{cell[:20]!r} is not a number")
    try:
        value = int(cell, 16) if cell.startswith("0x") else int(cell)
    except ValueError:
        raise ValueError(f"{cell!r} is not a number") from None
    if value > _MAX_NUMBER:
        raise ValueError(f"{cell} does not fit in 64 bits")
    return value
