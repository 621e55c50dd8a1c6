"""Text, TOML, CSV and JSON of unknown origin, made into objects.

One decoder a form. Each turns all that its library raises into BadInputFileError, so that no
input of any kind can end in an internal error: bytes that are not UTF-8, numbers of thousands of
digits, nesting without end.
"""

import tomllib
from typing import Any, Final, TypeVar

import msgspec

from trapline.base.errors import BadInputFileError
from trapline.base.printable import printable

_T = TypeVar("_T")
_LONGEST: Final = 300  # characters of somebody else's message


def text(data: bytes, source: str) -> str:
    """Decode UTF-8; `source` is what messages call the file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInputFileError(f"{source}: line {line} is not UTF-8 text.") from None


def toml(data: bytes, source: str) -> dict[str, Any]:
    """Decode a TOML document."""
    try:
        return tomllib.loads(text(data, source))
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        raise BadInputFileError(f"{source}: is not valid TOML: {_said(error)}.") from None
    except RecursionError:
        raise BadInputFileError(f"{source}: is not valid TOML: it is nested too deeply.") from None


def convert(value: object, kind: type[_T], source: str) -> _T:
    """Make a document of what `toml` gave."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.MsgspecError, ValueError, OverflowError) as error:
        raise BadInputFileError(f"{source}: {_said(error)}.") from None
    except RecursionError:
        raise BadInputFileError(f"{source}: is nested too deeply.") from None


def json(data: bytes, kind: type[_T], source: str, what: str) -> _T:
    """Decode a JSON document; `what` says what it should be ("a result of trapline explore")."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, OverflowError) as error:
        raise BadInputFileError(f"{source}: is not {what}: {_said(error)}.") from None
    except RecursionError:
        raise BadInputFileError(f"{source}: is not {what}: it is nested too deeply.") from None


def _said(error: Exception) -> str:
    message = printable(str(error)).rstrip(".")
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…"
