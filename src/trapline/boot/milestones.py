"""How far a guest came, and when: recognised by traps, breakpoints and console lines.

Traps need nothing of the guest. Breakpoints need symbols, and are set when the kernel proper
takes its first trap: KASLR has then chosen. Console lines are what the guest says itself.
"""

import re
from collections.abc import Callable
from typing import Final

from trapline.results.boot import Milestone

# Symbol to name.
BREAKPOINTS: Final = {
    "start_kernel": "start_kernel",
    "do_one_initcall": "first initcall",
}
_LINES: Final = (
    (
        "decompressor's first message",
        re.compile(rb"^(early console in extract_kernel|Decompressing|(Physical )?KASLR disabled)"),
    ),
    ("kernel banner", re.compile(rb"Linux version \d")),
    ("TDX detected", re.compile(rb"tdx: Guest detected")),
    ("/init started", re.compile(rb"Run \S*init as init process")),
    ("self-test passed", re.compile(rb"^init: self-test passed")),
    ("power off", re.compile(rb"reboot: (Power down|Restarting system)")),
)


class Milestones:
    """Collects milestones; each is noted once. `now` is virtual time in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._found: dict[str, Milestone] = {}
        self._lines = dict(_LINES)

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
