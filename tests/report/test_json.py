import json

import msgspec

from reports import rendered
from scan_documents import document, kernel
from trapline.results.scan import ScanResult


def test_document_starts_with_schema_and_version_and_reads_back():
    text = rendered(document(), "json")
    assert text.startswith(b'{"schema":"trapline/scan","version":2,')
    assert text.endswith(b"}\n")
    assert msgspec.json.decode(text, type=ScanResult) == document()


def test_site_is_called_class_in_json():
    first = json.loads(rendered(document(), "json"))["sites"][0]
    assert first["class"] == "mmio"
    assert "trap" not in first


def test_lines_lose_nothing():
    whole = document()
    lines = [json.loads(line) for line in rendered(whole, "jsonl").splitlines()]
    head, findings = lines[0], lines[1:]
    assert list(head)[:4] == ["schema", "version", "generator", "kernel"]
    by_type = {"site": [], "mapping": [], "driver": []}
    for line in findings:
        by_type[line.pop("type")].append(line)
    rebuilt = head | {f"{kind}s": rows for kind, rows in by_type.items()}
    assert msgspec.convert(rebuilt, ScanResult) == whole


def test_each_line_is_one_object():
    report = rendered(document(), "jsonl")
    assert report.endswith(b"}\n")
    for line in report.splitlines():
        assert isinstance(json.loads(line), dict)


def test_type_comes_first_on_every_line_but_the_first():
    lines = rendered(document(), "jsonl").splitlines()
    assert lines[0].startswith(b'{"schema":')
    assert all(line.startswith(b'{"type":"') for line in lines[1:])


def test_names_that_are_not_utf_8_are_legible():
    result = document(generator="trapline \udcff", kernel=kernel(release="6.12\ud800"))
    read = json.loads(rendered(result, "json"))
    assert read["generator"] == "trapline \\udcff"
    assert read["kernel"]["release"] == "6.12\\ud800"
