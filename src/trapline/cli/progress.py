"""Progress of long work, on standard error: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import TYPE_CHECKING, Protocol, Self

import click

from trapline.base.printable import printable

if TYPE_CHECKING:
    from trapline.api.progress import Progress as Step

_LINES = 4  # plain lines for the whole of the work
_A_WHILE = 2.0  # seconds


class _Display(Protocol):
    """What shows progress."""

    def announce(self, text: str) -> None: ...
    def advance(self, step: "Step") -> None: ...
    def stop(self) -> None: ...


class ProgressReport:
    """Shows how far work is; a context manager, so that a bar goes away."""

    def __init__(self) -> None:
        self._display = _bar() if sys.stderr.isatty() else _Lines()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._display.stop()

    def announce(self, text: str) -> None:
        """Say one thing in one line, such as what is about to be downloaded."""
        self._display.announce(printable(text))

    def advance(self, step: "Step") -> None:
        """Show how far the work is.

        While it is not known how much more there is to do, no time left is given.
        """
        self._display.advance(step)


def _bar() -> _Display:
    from trapline.cli.bar import Bar  # noqa: PLC0415 - rich takes longer to load than click

    return Bar()


class _Lines:
    """A few plain lines for each piece of work, as in the log of a build."""

    def __init__(self) -> None:
        self._label = ""
        self._shown = 0
        self._start = 0.0

    def announce(self, text: str) -> None:
        click.echo(f"trapline: {text}", err=True)

    def advance(self, step: "Step") -> None:
        if step.label != self._label:
            self._label, self._shown, self._start = step.label, 0, time.monotonic()
        # The total may grow: lines are for so much more, not for so much of it.
        news = step.done - self._shown
        if news > 0 and (step.done >= step.total or _LINES * news >= step.total):
            self._shown = step.done
            pace = self._pace(step)
            self.announce(f"{step.label}: {step.done:,} of {step.total:,}{pace}")

    def stop(self) -> None:
        pass

    def _pace(self, step: "Step") -> str:
        """Say how fast it goes and how long it will take, once it has taken a while."""
        seconds = time.monotonic() - self._start
        if seconds < _A_WHILE or (step.done == step.total and not step.more):
            return f" ({step.more})" if step.more else ""
        rate = f"{step.done / seconds:,.0f}/s"
        if step.more:
            return f" ({rate}, {step.more})"
        return f" ({rate}, {seconds * (step.total - step.done) / step.done:,.0f} s left)"
