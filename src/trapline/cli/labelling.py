"""What --labels does: read before the work, applied after it."""

from typing import TYPE_CHECKING, TypeVar

import trapline

if TYPE_CHECKING:
    from pathlib import Path

    from trapline.results.document import ResultDocument

_D = TypeVar("_D", bound="ResultDocument")


class Labelling:
    """Gives results their labels; the file is read when it is made. Raises BadInputFileError."""

    def __init__(self, path: "Path | None") -> None:
        self._labels = None if path is None else trapline.load_labels(path)

    def __call__(self, result: _D) -> _D:
        """Return the result with what was said of its parts."""
        return result if self._labels is None else trapline.labelled(result, self._labels)
