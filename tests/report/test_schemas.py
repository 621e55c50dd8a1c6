import json
from pathlib import Path

import jsonschema
import msgspec
import pytest

from reports import rendered
from scan_documents import clean, document
from trapline.report.records import ALLOW_LIST, RECORDS
from trapline.report.schemas import SCHEMAS, render

FOLDER = Path(__file__).parents[2] / "docs" / "schemas"


def validator(name):
    schema = json.loads(render(name))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_published_file_is_current(name):
    published = (FOLDER / f"{name}.schema.json").read_bytes()
    assert published == render(name), "run tools/schemas.py"


def test_nothing_else_is_published():
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.schema.json" for name in SCHEMAS}


@pytest.mark.parametrize("make", [document, clean])
def test_documents_validate(make):
    validator("scan").validate(json.loads(rendered(make(), "json")))


def test_lines_validate():
    lines = validator("scan-lines")
    for line in rendered(document(), "jsonl").splitlines():
        lines.validate(json.loads(line))


@pytest.mark.parametrize(
    "change",
    [{"version": 1}, {"schema": "trapline/boot"}, {"surprise": 1}, {"sites": [{"class": "mmio"}]}],
)
def test_the_schema_refuses_what_the_reader_refuses(change):
    broken = json.loads(rendered(document(), "json")) | change
    assert not validator("scan").is_valid(broken)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(broken, type(document()))


PAGE = (FOLDER.parent / "schemas.md").read_text("utf-8")


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_is_on_the_page(name):
    assert f"| [`{name}`](schemas/{name}.schema.json) |" in PAGE


@pytest.mark.parametrize("record", [*RECORDS, ALLOW_LIST], ids=lambda record: record.command)
def test_the_formats_of_every_command_are_on_the_page(record):
    formats = ", ".join(f"`{name}`" for name in record.format_names)
    assert f"| `trapline {record.command}` | {formats} |" in PAGE


def test_an_unknown_format_is_a_mistake():
    with pytest.raises(KeyError):
        rendered(document(), "ktap")
