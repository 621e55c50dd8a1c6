"""No bytes of any form end in anything but a sentence about the file."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.base import decode, encode
from trapline.base.errors import BadInputFileError


class Kind(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    number: int = 0
    below: "Kind | None" = None


def a_json(data):
    return decode.json(data, Kind, "file", "a kind")


def a_toml(data):
    return decode.convert(decode.toml(data, "file"), Kind, "file")


BAD_JSON = {
    "empty": b"",
    "cut off": b'{"name": "a',
    "not UTF-8": b'{"name": "\xff"}',
    "half a surrogate": b'{"name": "\\ud800"}',
    "a number of 5,000 digits": b'{"name": "a", "number": ' + b"9" * 5000 + b"}",
    "a huge exponent": b'{"name": "a", "number": 1e999999999}',
    "nested without end": b'{"name": "a", "below": ' * 100_000,
    "an escape sequence": b'{"name": "a", "\\u001b]0;owned\\u0007": 1}',
    "a line break": b'{"name": "a", "one\\ntwo": 1}',
    "a name of a megabyte": b'{"name": "a", "' + b"x" * (1 << 20) + b'": 1}',
}
BAD_TOML = {
    "cut off": b'name = "a',
    "not UTF-8": b'name = "\xff"',
    "a number of 5,000 digits": b'name = "a"\nnumber = ' + b"9" * 5000,
    "a date that is none": b"name = 2021-99-99",
    "nested without end": b"name = " + b"[" * 100_000,
    "an escape sequence": b'name = "a"\n"\\u001b]0;owned\\u0007" = 1',
    "a line break": b'name = "a"\n"one\\ntwo" = 1',
}


def refused(decoder, data):
    with pytest.raises(BadInputFileError) as error:
        decoder(data)
    message = str(error.value)
    assert message.startswith("file: ")
    assert message.isprintable()
    assert len(message) < 500


@pytest.mark.parametrize("data", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json(data):
    refused(a_json, data)


@pytest.mark.parametrize("data", BAD_TOML.values(), ids=BAD_TOML)
def test_bad_toml(data):
    refused(a_toml, data)


def test_what_is_sound_is_decoded():
    assert a_json(b'{"name": "a", "number": 7}') == Kind("a", 7)
    assert a_toml(b'name = "a"\nnumber = 7\nbelow = { name = "b" }') == Kind("a", 7, Kind("b"))


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes(data):
    for decoder in (a_json, a_toml):
        try:
            decoder(data)
        except BadInputFileError as error:
            said = str(error)
        else:
            said = ""
        assert not said or said.isprintable()


def test_names_that_are_not_utf8_are_written_and_read_back():
    data = encode.json({"path": "caf\udce9.ko", "caf\udce9": ["\udce9"]})
    assert data == rb'{"path":"caf\\udce9.ko","caf\\udce9":["\\udce9"]}'
    assert decode.json(data, dict, "file", "a dict")["path"] == "caf\\udce9.ko"
