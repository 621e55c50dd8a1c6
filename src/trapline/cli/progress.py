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

from trapline.base.printable import printable

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Task

    from trapline.api.progress import Progress as Step

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

    def __init__(self) -> None:
        self._label = ""
        self._bar: Progress | None = None
        self._shown = 0
        self._start = 0.0
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
        text = printable(text)
        if self._bar is None:
            click.echo(f"trapline: {text}", err=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: "Step") -> None:
        """Show how far the work is.

        While it is not known how much more there is to do, no time left is given.
        """
        if step.label != self._label:
            self._begin(step)
        if self._bar is None:
            # The total may grow: lines are for so much more, not for so much of it.
            news = step.done - self._shown
            if news > 0 and (step.done >= step.total or _LINES * news >= step.total):
                self._shown = step.done
                pace = self._pace(step)
                self.announce(f"{step.label}: {step.done:,} of {step.total:,}{pace}")
            return
        label = f"{step.label} ({step.more})" if step.more else step.label
        task = self._bar.tasks[0].id
        self._bar.update(
            task, description=label, completed=step.done, total=step.total, more=step.more
        )

    def _begin(self, step: "Step") -> None:
        """Go over to another piece of work, or to the first one."""
        self._label, self._shown = step.label, 0
        if self._bar is None:
            self._start = time.monotonic()
            return
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.add_task(step.label, total=step.total, more=step.more)
        self._bar.start()

    def _pace(self, step: "Step") -> str:
        """Say how fast it goes and how long it will take, once it has taken a while."""
        seconds = time.monotonic() - self._start
        if seconds < _A_WHILE or (step.done == step.total and not step.more):
            return f" ({step.more})" if step.more else ""
        rate = f"{step.done / seconds:,.0f}/s"
        if step.more:
            return f" ({rate}, {step.more})"
        return f" ({rate}, {seconds * (step.total - step.done) / step.done:,.0f} s left)"
