"""Progress of long work, on standard error: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import TYPE_CHECKING, Self

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Task

_LINES = 4  # plain lines for the whole of the work
_A_WHILE = 2.0  # seconds


class RateColumn(ProgressColumn):
    """How many objects are finished in a second."""

    def render(self, task: "Task") -> Text:
        """Give the rate, or nothing before there is one."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


class LeftColumn(TimeRemainingColumn):
    """How long it will take; nothing while it is not known how much there is to do."""

    def render(self, task: "Task") -> Text:
        """Give the time left."""
        return Text("") if task.fields.get("more") else super().render(task)


class ProgressReport:
    """Shows how far one piece of work is; a context manager, so that the bar goes away.

    The bar appears with the first `advance`. rich honours NO_COLOR.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Progress | None = None
        self._shown = 0
        self._start: float | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                RateColumn(),
                TimeElapsedColumn(),
                LeftColumn(),
                console=Console(stderr=True),
                transient=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: "TracebackType | None",
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def announce(self, text: str) -> None:
        """Say one thing in one line, such as what is about to be downloaded."""
        if self._bar is None:
            click.echo(f"trapline: {text}", err=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, done: int, total: int, more: str = "") -> None:
        """Say that `done` of `total` objects are finished.

        `more` says what will make the total grow; without knowing by how much, no time left is
        given.
        """
        if self._bar is None:
            if self._start is None:
                self._start = time.monotonic()
            # The total may grow: lines are for so much more, not for so much of it.
            news = done - self._shown
            if news > 0 and (done >= total or _LINES * news >= total):
                self._shown = done
                pace = self._pace(done, total, more)
                self.announce(f"{self._label}: {done:,} of {total:,}{pace}")
            return
        if not self._bar.tasks:
            self._bar.add_task(self._label, total=total, more=more)
            self._bar.start()
        label = f"{self._label} ({more})" if more else self._label
        task = self._bar.tasks[0].id
        self._bar.update(task, description=label, completed=done, total=total, more=more)

    def _pace(self, done: int, total: int, more: str) -> str:
        """Say how fast it goes and how long it will take, once it has taken a while."""
        seconds = 0.0 if self._start is None else time.monotonic() - self._start
        if seconds < _A_WHILE or (done == total and not more):
            return f" ({more})" if more else ""
        rate = f"{done / seconds:,.0f}/s"
        if more:
            return f" ({rate}, {more})"
        return f" ({rate}, {seconds * (total - done) / done:,.0f} s left)"
