"""Progress of long work, on standard error: a bar on a terminal, plain lines elsewhere."""

import sys
from typing import TYPE_CHECKING, Self

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from types import TracebackType

_LINES = 4  # plain lines for the whole of the work


class ProgressReport:
    """Shows how far one piece of work is; a context manager, so that the bar goes away.

    The bar appears with the first `advance`. rich honours NO_COLOR.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Progress | None = None
        self._shown = 0
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
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

    def advance(self, done: int, total: int) -> None:
        """Say that `done` of `total` objects are finished."""
        if self._bar is None:
            quarter = _LINES * done // total if total else 0
            if quarter > self._shown:
                self._shown = quarter
                self.announce(f"{self._label}: {done:,} of {total:,}")
            return
        if not self._bar.tasks:
            self._bar.add_task(self._label, total=total)
            self._bar.start()
        self._bar.update(self._bar.tasks[0].id, completed=done, total=total)
