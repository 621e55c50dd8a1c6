"""What a guest's kernel complained of and lived on: oopses, BUGs, WARNs, stalls.

Each is told by the message that the kernel prints, as `vprintk_emit()` gets it; where that cannot
be watched (no symbols, a debugger's breakpoints), by lines of the console.
"""

from collections.abc import Callable

from msgspec.structs import replace

from trapline.linux import messages
from trapline.results.boot import Complaint, ComplaintKind
from trapline.results.splat import Splat

_MAX_TEXT = 200


class Complaints:
    """Counts complaints by kind.

    `now` is virtual time in seconds. `take` takes down the state of the guest, whose kernel is
    about to print the sentence it is given: it is called at the first complaint of each kind.
    """

    def __init__(
        self, now: Callable[[], float], take: Callable[[str, ComplaintKind], Splat]
    ) -> None:
        self._now = now
        self._take = take
        self._found: dict[ComplaintKind, Complaint] = {}
        self._is_open = False  # the last one's oops is yet to be printed

    def message(self, message: bytes, level: int | None, text: Callable[[], str]) -> None:
        """Look at a message: its format string or its line, and what it says."""
        complaint = messages.complaint(message, level)
        if complaint is None:
            return
        if complaint.is_oops and self._is_open:
            self._is_open = False
            return
        self._is_open = complaint.is_forerunner
        self._add(complaint.kind, text()[:_MAX_TEXT])

    def _add(self, kind: ComplaintKind, text: str) -> None:
        known = self._found.get(kind)
        if known is None:
            self._found[kind] = Complaint(
                kind=kind,
                count=1,
                seconds=self._now(),
                text=text,
                fails=True,
                splat=self._take(text, kind),
            )
        else:
            self._found[kind] = replace(known, count=known.count + 1)

    def result(self, fail_on: frozenset[ComplaintKind]) -> tuple[Complaint, ...]:
        """Return one complaint of each kind, first things first; `fail_on` are not put up with."""
        found = sorted(self._found.values(), key=lambda complaint: complaint.seconds)
        return tuple(replace(one, fails=one.kind in fail_on) for one in found)
