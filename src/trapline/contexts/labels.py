"""Reasons why a gate is closed, in a text file that is carried from kernel to kernel.

[[closed]]
function = "panic"
reason = "the kernel is lost already"
source = "kernel/panic.c, panic()"
contexts = ["nmi", "ve-before"]     # all where it is left out
indirect = true                     # what it calls through a pointer, not the function itself
"""

import tomllib
from importlib.resources import files as resources
from typing import TYPE_CHECKING, Final

import msgspec

from trapline.base import files
from trapline.base.errors import BadInputFileError

if TYPE_CHECKING:
    from pathlib import Path

_MAX_SIZE: Final = 4 << 20
OURS: Final = "trapline"


class Label(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why nothing comes through a function; `contexts` are ids, all where it is empty."""

    function: str
    reason: str
    source: str
    contexts: tuple[str, ...] = ()
    indirect: bool = False
    by: str = OURS

    def holds_in(self, context: str) -> bool:
        """Whether it is meant for a context."""
        return not self.contexts or context in self.contexts


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    closed: tuple[Label, ...] = ()


class Labels:
    """All reasons; of two for one function the later counts, so the user's before trapline's."""

    def __init__(self, labels: tuple[Label, ...]) -> None:
        self._labels = labels

    def of(self, context: str, function: str, *, indirect: bool = False) -> Label | None:
        """Return the reason why a function, or what it calls through pointers, is closed."""
        return next(
            (
                label
                for label in reversed(self._labels)
                if label.function == function
                and label.indirect == indirect
                and label.holds_in(context)
            ),
            None,
        )

    def functions(self, context: str) -> frozenset[str]:
        """Return the functions that are closed in a context."""
        return frozenset(
            label.function
            for label in self._labels
            if not label.indirect and label.holds_in(context)
        )


def read_labels(path: "Path | None" = None) -> Labels:
    """Read trapline's own reasons, and those of a file. Raises BadInputFileError."""
    shipped = resources("trapline.linux").joinpath("gates.toml").read_bytes()
    found = _parse(shipped, "gates.toml")
    if path is not None:
        name = str(path)
        theirs = _parse(files.read(path, limit=_MAX_SIZE, what="a file of labels"), name)
        found += tuple(msgspec.structs.replace(label, by=name) for label in theirs)
    return Labels(found)


def _parse(data: bytes, name: str) -> tuple[Label, ...]:
    try:
        raw = tomllib.loads(data.decode("utf-8"))
        labels = msgspec.convert(raw, _File, strict=True).closed
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise BadInputFileError(
            f"{name}: is no file of labels: {error}; docs/contexts.md shows one."
        ) from None
    for label in labels:
        if not (label.function and label.reason.strip() and label.source.strip()):
            raise BadInputFileError(
                f"{name}: the label of {label.function or 'a function'} has no reason or source."
            )
    return labels
