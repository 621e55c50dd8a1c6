"""Progress as a bar on a terminal. Apart from the rest, as rich takes long to load."""

from typing import TYPE_CHECKING

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
    from rich.progress import Task

    from trapline.api.progress import Progress as Step


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


class Bar:
    """A bar on standard error from the first step on; rich honours NO_COLOR."""

    def __init__(self) -> None:
        self._label = ""
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeElapsedColumn(),
            LeftColumn(),
            console=Console(stderr=True),
            transient=True,
        )

    def announce(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: "Step") -> None:
        """Show a step; each piece of work has a bar of its own."""
        if step.label != self._label:
            self._label = step.label
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            self._progress.add_task(step.label, total=step.total, more=step.more)
            self._progress.start()
        label = f"{step.label} ({step.more})" if step.more else step.label
        self._progress.update(
            self._progress.task_ids[0],
            description=label,
            completed=step.done,
            total=step.total,
            more=step.more,
        )

    def stop(self) -> None:
        """Take the bar away."""
        self._progress.stop()
