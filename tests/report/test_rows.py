import csv
import io

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import golden_documents as golden
from golden_documents import GOLDEN
from reports import rendered
from scan_documents import document, site
from trapline.base.printable import printable
from trapline.report.records import RECORDS

RESULTS = {
    name: make
    for name, (make, _) in GOLDEN.items()
    if type(make()) in {record.document for record in RECORDS}
}


def read(result):
    return list(csv.DictReader(io.StringIO(rendered(result, "csv").decode(), newline="")))


@pytest.mark.parametrize("name", RESULTS)
def test_every_list_of_every_document_gives_flat_rows(name):
    result = RESULTS[name]()
    assert result.lists
    assert result.rows() == result.rows(result.lists[0])
    for one in result.lists:
        rows = result.rows(one)
        assert len(rows) >= len(getattr(result, one))
        for row in rows:
            assert tuple(row) == result.columns(one)
            assert all(v is None or type(v) in {str, int, float, bool} for v in row.values())


@pytest.mark.parametrize("record", [each for each in RECORDS if each.lines])
def test_what_has_lines_has_rows(record):
    assert set(record.lines.parts) <= set(record.document.lists)


def test_an_unknown_list_is_named():
    with pytest.raises(ValueError, match="no list 'nothing'; there are sites, mappings, drivers"):
        document().rows("nothing")


def test_columns_are_known_without_rows():
    empty = golden.verify(findings=(), refused=())
    assert empty.columns() == golden.verify().columns()
    assert rendered(empty, "csv").decode().splitlines() == [",".join(empty.columns())]


def test_keys_are_those_of_json():
    (row,) = document(sites=(site(),)).rows()
    assert tuple(row) == tuple(msgspec.to_builtins(site()))


def test_lists_become_texts_and_parts_cells():
    (row,) = document(sites=(site(),)).rows()
    assert row["inlined"] == (
        "readl arch/x86/include/asm/io.h:59; hpet_readl arch/x86/kernel/hpet.c:78"
    )
    driver = golden.filtered().rows()[0]
    assert driver["reach.mmio"] == golden.filtered().drivers[0].reach.mmio


def test_a_run_knows_its_instruction():
    row = golden.explore([golden.run(2, "same")]).rows()[0]
    assert (row["function"], row["offset"], row["instruction"]) == ("work", 2, "nop")


# CSV.


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx"])
def test_no_text_is_a_formula(text):
    (row,) = read(document(sites=(site(function=text),)))
    assert row["function"] == f"'{printable(text)}"


def test_numbers_and_other_texts_are_left_alone():
    (row,) = read(document(sites=(site(function="a=b", line=-1, width=8),)))
    assert (row["function"], row["line"], row["width"]) == ("a=b", "-1", "8")


@given(st.text(max_size=60), st.booleans())
@example("\r", True)  # a CR in a cell is not quoted by the csv module of Python 3.11
def test_csv_reads_back(text, emulable):
    (row,) = read(document(sites=(site(function=text, emulable=emulable),)))
    assert row["function"].removeprefix("'") == printable(text).removeprefix("'")
    assert row["emulable"] == ("true" if emulable else "false")
    assert not row["function"].startswith(("=", "+", "-", "@", "\t", "\r"))


def test_names_that_are_not_utf_8_are_legible():
    (row,) = read(document(sites=(site(file="caf\udce9.c"),)))
    assert row["file"] == "caf\\udce9.c"
