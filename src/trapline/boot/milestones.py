"""How far a guest came, and when: recognised by traps, breakpoints and console lines.

Traps need nothing of the guest. Breakpoints need symbols, and are set when the kernel proper
takes its first trap: KASLR has then chosen. Console lines are what the guest says itself.
"""

from collections.abc import Callable

from trapline.linux.messages import LINES
from trapline.results.boot import Milestone


class Milestones:
    """Collects milestones; each is noted once. `now` is virtual time in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._found: dict[str, Milestone] = {}
        self._lines = dict(LINES)

    def note(self, name: str, evidence: str) -> None:
        """Note a milestone, unless it was reached before."""
        if name not in self._found:
            self._found[name] = Milestone(name=name, seconds=self._now(), evidence=evidence)

    def console_line(self, line: bytes) -> None:
        """Look at a line of the console."""
        for name, pattern in self._lines.items():
            if pattern.search(line):
                self.note(name, "console")
                del self._lines[name]
                return

    @property
    def reached(self) -> tuple[Milestone, ...]:
        """All milestones in the order of time."""
        return tuple(sorted(self._found.values(), key=lambda milestone: milestone.seconds))
