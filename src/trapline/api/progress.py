"""What a caller may be told while a function works; both callbacks may be `print`."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a piece of work is: `done` of `total` objects, runs or cases are finished.

    `label` says what becomes of them ("scanned"). `total` may grow; `more` says by what, and is
    empty where it will not.
    """

    label: str
    done: int
    total: int
    more: str = ""

    def __str__(self) -> str:
        return f"{self.label}: {self.done:,} of {self.total:,}" + (
            f" ({self.more})" if self.more else ""
        )


#: Told how far the work is.
OnProgress = Callable[[Progress], None]
#: Told one thing in one line, such as what is about to be downloaded.
Announce = Callable[[str], None]


def steps(label: str, report: OnProgress | None) -> Callable[[int, int], None] | None:
    """Make what the rooms report to, (done, total), from a caller's callback."""
    if report is None:
        return None
    return lambda done, total: report(Progress(label, done, total))
