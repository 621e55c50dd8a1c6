"""Allow lists: the shipped one, every way a file can be wrong, and hostile input."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trapline.allowlist import listfile
from trapline.allowlist.entries import AllowList
from trapline.base.errors import BadInputFileError, ExitCode

HEAD = 'schema = "trapline/allow-list"\nversion = 1\ntitle = "test"\n'
ENTRY = '[[allow]]\nid = "1af4:1041"\nname = "virtio network card"\n'
# The list in the mail of 2 April 2021: id, and the comment beside it.
QUOTED = {
    "1af4:1000": "Virtio NET",
    "1af4:1001": "Virtio block",
    "1af4:1003": "Virtio console",
    "1af4:1009": "Virtio FS",
    "1af4:1041": "Virtio 1.0 NET",
    "1af4:1042": "Virtio 1.0 block",
    "1af4:1043": "Virtio 1.0 console",
    "1af4:1049": "Virtio 1.0 FS",
}


def test_the_default_is_exactly_the_quoted_list():
    entries = listfile.load().entries
    assert [entry.id for entry in entries] == list(QUOTED)
    for entry in entries:
        assert f'"{QUOTED[entry.id]}"' in entry.note


def test_id_9_is_named_for_what_it_is():
    for entry in listfile.load().entries:
        if entry.id in {"1af4:1009", "1af4:1049"}:
            assert "9P" in entry.name
            assert "105a" in entry.note
    assert listfile.load().matching("pci:v00001AF4d0000105Asv00001AF4sd00001100bc01sc80i00") is None


def test_a_list_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + ENTRY + '[[allow]]\nid = "class:0c03"\nname = "USB"\nnote = "why"\n')
    allow = listfile.load(path)
    assert allow.title == "test"
    assert allow.source == str(path)
    assert [(e.id, e.note) for e in allow.entries] == [("1af4:1041", None), ("class:0c03", "why")]


def test_an_empty_list_is_a_list():
    assert listfile.parse((HEAD + "allow = []").encode(), "x").entries == ()


WRONG = {
    "": "no schema line",
    'version = 1\ntitle = "x"\nallow = []': "no schema line",
    'schema = "trapline/scan"\nversion = 1\ntitle = "x"\nallow = []': "schema: ",
    'schema = "trapline/allow-list"\nversion = 2\ntitle = "x"\nallow = []': "version: ",
    HEAD: "there is no field `allow`",
    HEAD + "extra = 1\nallow = []": "unknown field `extra`",
    HEAD + 'allow = "x"': "allow: ",
    HEAD + "allow = [1]": "entry 1: ",
    HEAD + "[[allow]]\nid = 3\nname = 'x'": "entry 1: id: ",
    HEAD + ENTRY + "[[allow]]\nid = '1af4:1042'": "entry 2: there is no field `name`",
    HEAD + ENTRY + "colour = 'red'": "entry 1: there is an unknown field `colour`",
    HEAD + ENTRY + ENTRY: "entry 2: id 1af4:1041 is already entry 1",
    HEAD + "[[allow]]\nid = '1AF4:1041'\nname = 'x'": "lower case",
    HEAD + "[[allow]]\nid = '1af4'\nname = 'x'": "is none of",
    HEAD + "[[allow]]\nid = '1af4:10g1'\nname = 'x'": "is none of",
    HEAD + "[[allow]]\nid = '0x1af4:0x1041'\nname = 'x'": "is none of",
    HEAD + "[[allow]]\nid = '*:*'\nname = 'x'": "is none of",
    HEAD + "[[allow]]\nid = 'class:0'\nname = 'x'": "is none of",
    HEAD + "[[allow]]\nid = 'virtio:0x1'\nname = 'x'": "is none of",
    HEAD + "[[allow]]\nid = '1af4:1041\\n'\nname = 'x'": "is none of",
    HEAD + "[[allow]]\nid = '1af4:1041'\nname = ''": "entry 1: name: ",
    "[[[": "is not valid TOML",
    "x = 99" + "9" * 5000: "is not valid TOML",
    "x = " + "[" * 5000: "nested too deeply",
}


@pytest.mark.parametrize("text", WRONG, ids=[f"{n}" for n in range(len(WRONG))])
def test_a_bad_list_is_one_sentence(text):
    with pytest.raises(BadInputFileError) as caught:
        listfile.parse(text.encode(), "list.toml")
    message = str(caught.value)
    assert WRONG[text] in message
    assert message.startswith("list.toml: ")
    assert message.endswith(".")
    assert message.isprintable()
    assert caught.value.exit_code == ExitCode.BAD_INPUT_FILE


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInputFileError, match="cannot be read: no such file"):
        listfile.load(tmp_path / "none.toml")
    with pytest.raises(BadInputFileError, match="not a regular file"):
        listfile.load(tmp_path)
    with pytest.raises(BadInputFileError):
        listfile.load(Path("a\0b"))
    (tmp_path / "big.toml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(BadInputFileError, match="larger than 1 MiB"):
        listfile.load(tmp_path / "big.toml")
    (tmp_path / "latin1.toml").write_bytes(b"title = '\xe9'")
    with pytest.raises(BadInputFileError, match="line 1 is not UTF-8"):
        listfile.load(tmp_path / "latin1.toml")


def test_the_schema_and_the_loader_agree():
    """What the schema says of a document that is TOML, the loader says too."""
    validator = jsonschema.Draft202012Validator(listfile.schema())
    for text in [*WRONG, HEAD + ENTRY, HEAD + "allow = []"]:
        try:
            document = tomllib.loads(text)
        except (ValueError, RecursionError):
            continue
        valid = validator.is_valid(document)
        if "already entry" in WRONG.get(text, ""):
            assert valid  # JSON Schema cannot say "unique by id"
        else:
            assert valid == (text not in WRONG), text


def outcome(data):
    """Return what parsing gave, None for one sentence; anything else that is raised fails."""
    try:
        return listfile.parse(data, "f")
    except BadInputFileError as error:
        message = str(error)
    assert message.isprintable()
    return None


@given(st.binary(max_size=400))
def test_any_bytes_are_a_list_or_one_sentence(data):
    result = outcome(data)
    assert result is None or isinstance(result, AllowList)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return '""' if value is None else json.dumps(value).replace("NaN", "nan").replace("Inf", "inf")


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(values, values)
def test_any_structure_is_a_list_or_one_sentence(first, second):
    text = HEAD + f"allow = [{toml(first)}, {{id = {toml(second)}, name = {toml(first)}}}]"
    result = outcome(text.encode("utf-8", "replace"))
    assert result is None or len(result.entries) == 2
