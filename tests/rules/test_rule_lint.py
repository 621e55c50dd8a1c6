"""Each fault of a table is planted, found on its line, and absent from the tables that ship."""

import csv
import os
import shutil
from importlib.resources import as_file, files

import pytest

from trapline.base.errors import BadInputFileError, UsageError
from trapline.rules.lint import lint, lint_folder
from trapline.rules.ruleset import TABLES
from trapline.rules.tables import load, load_folder, versions


@pytest.fixture
def folder(tmp_path):
    """A copy of the tables of 1.5.01."""
    with as_file(files("trapline.rules") / "tdx-1.5.01") as shipped:
        return shutil.copytree(shipped, tmp_path / "tables")


def edit(folder, table, change):
    """Apply `change` to the list of rows (dicts) of a table."""
    path = folder / f"{table}.csv"
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        header, rows = reader.fieldnames, list(reader)
    change(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)


def only(problems):
    assert len(problems) == 1, [str(problem) for problem in problems]
    return str(problems[0])


def by_id(rows, row_id):
    return next(row for row in rows if row["id"] == row_id)


@pytest.mark.parametrize("version", versions())
def test_what_ships_is_clean(version):
    assert lint(version) == []


def test_a_copy_of_what_ships_is_clean(folder):
    assert lint_folder(folder) == []


def set_cell(row_id, column, value):
    return lambda rows: by_id(rows, row_id).update({column: value})


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("nesting", set_cell("nmi-held", "source", " "), "nmi-held: no source"),
        ("nesting", set_cell("nmi-held", "id", "nmi-one"), "id 'nmi-one' is already on line"),
        ("nesting", set_cell("nmi-held", "id", ""), "no id"),
        ("nesting", set_cell("nmi-held", "module", "1.0"), "module '1.0' in tables of '1.5.01'"),
        ("nesting", set_cell("nmi-held", "outcome", "maybe"), "'maybe' is not one of"),
        ("nesting", set_cell("nmi-held", "standing", "true"), "'true' is not one of"),
        (
            "nesting",
            set_cell("second-ve-module", "standing", "claimed"),
            "no followed answer among: second-ve-module, second-ve-module-comment",
        ),
        (
            "nesting",
            set_cell("second-ve-sdv", "standing", "enforced"),
            "2 followed answers among: second-ve-module",
        ),
        ("msrs", set_cell("msr-0x48", "last", "0x49"), "msr-0x49 overlaps msr-0x48"),
        ("msrs", set_cell("msr-0x8c", "first", "0x90"), "msr-0x8c: not a range of MSR indices"),
        ("msrs", set_cell("msr-0x48", "first", ""), "msr-0x48: not a range of MSR indices"),
        ("msrs", set_cell("msr-0x48", "last", "banana"), "'banana' is not a number"),
        ("msrs", set_cell("msr-0x48", "last", "1_0"), "'1_0' is not a number"),
        ("msrs", set_cell("msr-0x48", "last", "9" * 5000), "is not a number"),
        (
            "msrs",
            set_cell("msr-0x48", "last", "0x10000000000000000"),
            "does not fit in 64 bits",
        ),
        (
            "msrs",
            set_cell("msr-0xc1", "read_feature", ""),
            "msr-0xc1: read native_unless_gp with feature ''",
        ),
        (
            "msrs",
            set_cell("msr-0x48", "write_feature", "tme"),
            "msr-0x48: write native with feature 'tme'",
        ),
        ("cpuid", set_cell("cpuid-0x3", "last", "0x4"), "overlaps cpuid-0x3"),
        ("cpuid", set_cell("cpuid-0x3", "last", "0x2"), "cpuid-0x3: not a range of leaves"),
        ("tdcalls", set_cell("tdcall-1-ok", "status", "TDX_FINE"), "unknown status 'TDX_FINE'"),
        ("tdcalls", set_cell("tdcall-1-ok", "operand", "RZZ"), "unknown operand 'RZZ'"),
        ("statuses", set_cell("ghci-gpa-inuse", "name", "TD\x1b[2J"), "control characters"),
    ],
)
def test_a_planted_fault_is_found(folder, table, change, message):
    edit(folder, table, change)
    problems = [str(problem) for problem in lint_folder(folder)]
    assert problems
    assert all(problem.startswith(f"{table}.csv:") for problem in problems)
    assert any(message in problem for problem in problems), problems


def test_the_line_of_a_fault_is_given(folder):
    edit(folder, "nesting", set_cell("second-ve-module", "source", ""))
    assert only(lint_folder(folder)).startswith("nesting.csv:2: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 'id' is missing"),
        ("id,wings\n", "unknown column 'wings'"),
        ("id,id\n", "a column appears twice"),
        ('"', "not CSV"),
    ],
)
def test_a_broken_header_is_found(folder, text, message):
    (folder / "nesting.csv").write_text(text)
    assert any(message in str(problem) for problem in lint_folder(folder))


def test_a_ragged_row_is_found(folder):
    with (folder / "nesting.csv").open("a") as file:
        file.write("one,two\n")
    assert only(lint_folder(folder)).endswith("2 cells for 9 columns")


def test_a_fifo_is_no_table(folder):
    (folder / "memory.csv").unlink()
    os.mkfifo(folder / "memory.csv")
    assert only(lint_folder(folder)) == "memory.csv:1: not a regular file"


def test_a_missing_table_is_found(folder):
    (folder / "memory.csv").unlink()
    assert only(lint_folder(folder)) == "memory.csv:1: the table is missing"


def test_bytes_that_are_no_text_are_found(folder):
    with (folder / "memory.csv").open("ab") as file:
        file.write(b"\xff\xfe\n")
    problem = only(lint_folder(folder))
    assert problem.endswith(": not UTF-8 text")
    assert not problem.startswith("memory.csv:1:")


def test_a_huge_table_is_not_read_whole(folder):
    with (folder / "memory.csv").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    assert "larger than" in only(lint_folder(folder))


def test_loading_a_faulty_folder_is_one_sentence(folder):
    edit(folder, "nesting", set_cell("nmi-held", "outcome", "maybe"))
    with pytest.raises(BadInputFileError, match=r"nesting.csv:\d+: column 'outcome'.*lint"):
        load_folder(folder)


def test_no_such_version_or_folder(tmp_path):
    with pytest.raises(UsageError, match=r"no rules for TDX module '9.9'; there are 1.5.01"):
        load("9.9")
    with pytest.raises(BadInputFileError, match="not a folder of rule tables"):
        load_folder(tmp_path / "nothing")
    with pytest.raises(BadInputFileError, match="not a folder of rule tables"):
        lint_folder(tmp_path / "nothing")
    assert "no tables for module version" in only(lint("9.9"))


def test_a_folder_loads_as_what_ships(folder):
    loaded, shipped = load_folder(folder), load("1.5.01")
    assert loaded.version == "1.5.01"
    for table in TABLES:
        assert loaded.table(table) == shipped.table(table)
