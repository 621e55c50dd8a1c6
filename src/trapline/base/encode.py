"""Whatever is written as JSON, from documents to traces, and texts in TOML: one encoder."""

from typing import Final

import msgspec

_ENCODER: Final = msgspec.json.Encoder()


def json(value: object) -> bytes:
    r"""Return a document, or part of one, as JSON.

    Names of files and command lines may hold bytes that are not UTF-8, which Python keeps as lone
    surrogates and JSON cannot have: they are written as "\\udcff".
    """
    try:
        return _ENCODER.encode(value)
    except UnicodeEncodeError:
        return _ENCODER.encode(_legible(msgspec.to_builtins(value)))


def toml_text(text: str) -> str:
    """Return a text as TOML has it: a JSON string, but for the one more control it escapes."""
    return json(text).decode().replace("\x7f", "\\u007f")


def _legible(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_legible(key): _legible(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_legible(each) for each in value]
    return value
