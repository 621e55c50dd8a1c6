"""Result documents that were written as JSON, read back by what they say they are."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from trapline.base import decode, files
from trapline.base.errors import BadInputFileError
from trapline.base.printable import printable
from trapline.results.boot import BootResult
from trapline.results.contexts import ContextsResult
from trapline.results.diff import DiffResult
from trapline.results.explore import ExploreResult
from trapline.results.filter import FilterResult
from trapline.results.filter_live import LiveResult
from trapline.results.scan import ScanResult
from trapline.results.tradeoff import TradeoffResult
from trapline.results.verify import VerifyResult

if TYPE_CHECKING:
    import os

    from trapline.results.document import ResultDocument

MOST: Final = 1 << 30  # bytes; a scan of Debian's full flavour with all modules has 60 MB
#: What has findings and can be compared.
_KINDS: "Final[tuple[type[ResultDocument], ...]]" = (
    ScanResult,
    BootResult,
    ExploreResult,
    VerifyResult,
    ContextsResult,
    TradeoffResult,
    FilterResult,
    LiveResult,
    DiffResult,
)
_LONGEST: Final = 60


class _Head(msgspec.Struct):
    """The two keys that every document starts with."""

    schema: str = ""
    version: int = 0


def read_result(path: "str | os.PathLike[str]") -> "ResultDocument":
    """Read the JSON result of any command.

    Raises BadInputFileError, one sentence, for what is no result, or of another version.
    """
    data = files.read(Path(path), limit=MOST, what="the result of a command")
    source = str(path)
    head = decode.json(data, _Head, source, "a JSON result of trapline")
    kind = _BY_SCHEMA.get(head.schema)
    if kind is None:
        said = f"says {printable(head.schema)[:_LONGEST]!r}" if head.schema else "has no schema"
        raise BadInputFileError(
            f"{source}: is no JSON result of trapline ({said}); write one with --format json -o."
        )
    version = default(kind, "version")
    if head.version != version:
        raise BadInputFileError(
            f"{source}: is version {head.version} of {head.schema}, and this trapline reads "
            f"version {version}; make it anew with this trapline."
        )
    return decode.json(data, kind, source, f"a result of {head.schema}")


def default(kind: "type[ResultDocument]", name: str) -> Any:  # noqa: ANN401 - as the field
    """Return what a field of a document has by default."""
    (field,) = (each for each in msgspec.structs.fields(kind) if each.name == name)
    return field.default


_BY_SCHEMA: "Final[dict[str, type[ResultDocument]]]" = {
    default(kind, "schema_"): kind for kind in _KINDS
}
