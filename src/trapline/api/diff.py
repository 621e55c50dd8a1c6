"""`diff`: what is different between two results, or two kernels."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from trapline.api.known_scan import scanned
from trapline.api.label import known_labels
from trapline.base.errors import BadInputFileError
from trapline.base.files import read_start
from trapline.diff.changes import compare
from trapline.results.document import ResultDocument
from trapline.results.reading import read_result

if TYPE_CHECKING:
    from trapline.api.allow import AnyAllowList
    from trapline.api.kernel import AnyKernel
    from trapline.api.label import AnyLabels
    from trapline.api.progress import Announce, OnProgress
    from trapline.results.diff import DiffResult


def diff(
    old: "ResultDocument | AnyKernel",
    new: "ResultDocument | AnyKernel",
    *,
    labels: "AnyLabels" = None,
    allow: "AnyAllowList" = None,
    progress: "OnProgress | None" = None,
    announce: "Announce | None" = None,
) -> "DiffResult":
    """Compare two results of one command, or the scans of two kernels.

    Each is a result document, the file of one (JSON), or a kernel, which is scanned with `allow`;
    a scan that was made before is taken from the cache. `labels` say which changes are all right.

    Raises BadInputFileError where they are results of two commands, and what `scan` raises.
    """
    known = known_labels(labels)
    sides = [
        side if isinstance(side, ResultDocument) else _read(side, allow, progress, announce)
        for side in (old, new)
    ]
    return compare(sides[0], sides[1], names=(_name(old), _name(new)), labels=known)


def _read(
    side: "AnyKernel",
    allow: "AnyAllowList",
    progress: "OnProgress | None",
    announce: "Announce | None",
) -> ResultDocument:
    if isinstance(side, str | os.PathLike) and _is_document(Path(side)):
        return read_result(side)
    return scanned(side, allow=allow, progress=progress, announce=announce)


def _is_document(path: Path) -> bool:
    """Whether a file holds JSON: no kernel starts so."""
    try:
        return path.is_file() and read_start(path, 64).lstrip()[:1] in {b"{", b"["}
    except (OSError, BadInputFileError):
        return False


def _name(side: "ResultDocument | AnyKernel") -> str:
    if isinstance(side, str | os.PathLike):
        return os.fspath(side)
    return "the document" if isinstance(side, ResultDocument) else side.name
