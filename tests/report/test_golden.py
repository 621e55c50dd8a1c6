"""Reports, byte for byte: a text that a mail quotes, or a file that a tool reads, does not drift.

Where a change is meant, TRAPLINE_GOLDEN=write makes the files anew; the commit says why.
"""

import os
from pathlib import Path

import pytest

from golden_documents import GOLDEN
from trapline.allowlist.entries import AllowList
from trapline.report.records import ALLOW_LIST, RECORDS, record_of

FOLDER = Path(__file__).parent / "golden"
# The formats whose bytes are kept beside the text, and documents that are small in them.
_OTHERS = (
    ("scan", "jsonl"),
    ("scan", "sarif"),
    ("contexts", "sarif"),
    ("scan", "csv"),
    ("scan-labelled", "sarif"),
    ("gate", "ktap"),
    ("boot", "csv"),
    ("explore-small", "jsonl"),
    ("explore-small", "ktap"),
    ("explore-small", "csv"),
    ("explore-baseline", "ktap"),
    ("verify", "jsonl"),
    ("verify", "csv"),
    ("rules-msrs", "csv"),
)
CASES = [
    *((name, "text", verbosity) for name, (_, levels) in GOLDEN.items() for verbosity in levels),
    *((name, form, 0) for name, form in _OTHERS),
]


def file_of(name, form, verbosity):
    suffix = f"-{'v' * verbosity}" if verbosity else ""
    return FOLDER / f"{name}{suffix}.{'txt' if form == 'text' else form}"


def rendered(name, form, verbosity):
    document = GOLDEN[name][0]()
    record = ALLOW_LIST if isinstance(document, AllowList) else record_of(document)
    return b"".join(record.render(document, form, verbosity))


@pytest.mark.parametrize(("name", "form", "verbosity"), CASES)
def test_a_report_is_what_it_was(name, form, verbosity):
    path, found = file_of(name, form, verbosity), rendered(name, form, verbosity)
    if os.environ.get("TRAPLINE_GOLDEN") == "write":
        path.write_bytes(found)
    assert found.decode() == path.read_text("utf-8")


def test_every_file_is_compared():
    assert {path.name for path in FOLDER.iterdir()} == {file_of(*case).name for case in CASES}


def test_every_kind_of_document_has_a_golden_report():
    kinds = {type(make()) for make, _ in GOLDEN.values()}
    assert kinds >= {record.document for record in RECORDS}
