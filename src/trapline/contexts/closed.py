"""Which gates are closed, and why: by trapline's own reasons, and by a file of labels.

In a file of labels an entry with a `gate`, or with the id of one, closes it if its label settles
what it says; the user's word counts before trapline's.
"""

from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from trapline.base import decode, files
from trapline.results.labels import SETTLED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trapline.results.labels import LabelEntry

OURS: Final = "trapline"


class Reason(NamedTuple):
    """Why a gate is closed: `source` shows it, `by` says it."""

    reason: str
    source: str | None
    by: str


class Known(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A reason that trapline ships; `contexts` are ids, all where it is empty."""

    function: str
    reason: str
    source: str
    contexts: tuple[str, ...] = ()


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    closed: tuple[Known, ...]


@cache
def shipped() -> tuple[Known, ...]:
    """Read trapline's own reasons: linux/gates.toml."""
    data = files.shipped("trapline.linux", "gates.toml")
    return decode.convert(decode.toml(data, "gates.toml"), _File, "gates.toml").closed


class Closed:
    """All reasons for one kernel."""

    def __init__(
        self, entries: "Iterable[LabelEntry]" = (), known: "tuple[Known, ...] | None" = None
    ) -> None:
        """Take the entries of a file of labels; `known` are other reasons than trapline's own."""
        self._entries = [
            entry for entry in entries if entry.label in SETTLED and entry.carried is None
        ]
        self._known = shipped() if known is None else known

    def why(self, context: str, function: str, identity: str) -> Reason | None:
        """Return why a gate is closed in a context; `identity` is the gate's id."""
        for entry in self._entries:
            is_meant = entry.id == identity or (
                entry.id is None and entry.gate is not None and fnmatchcase(function, entry.gate)
            )
            if is_meant:
                return _theirs(entry)
        for known in self._known:
            if known.function == function and (not known.contexts or context in known.contexts):
                return Reason(known.reason, known.source, OURS)
        return None

    def by_id(self, identity: str) -> Reason | None:
        """Return what a file of labels says of the thing with an id."""
        for entry in self._entries:
            if entry.id == identity:
                return _theirs(entry)
        return None

    def names(self) -> frozenset[str]:
        """Return the functions that trapline's own reasons are about."""
        return frozenset(known.function for known in self._known)

    def patterns(self) -> frozenset[str]:
        """Return what the gates are like that a file of labels closes by name."""
        return frozenset(entry.gate for entry in self._entries if entry.gate is not None)


def _theirs(entry: "LabelEntry") -> Reason:
    return Reason(entry.reason, None, f"{entry.owner}, {entry.date.isoformat()}")
