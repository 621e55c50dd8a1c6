"""What may be reached from a context, over all paths: parts of the document of `contexts`.

A gate is a function that most of what is behind a root is reached through. What is reached without
passing one is listed; behind each gate it is counted. A gate is closed by a reason that somebody
wrote down, and open until then.
"""

from trapline.results.document import Document
from trapline.results.trapclass import TrapClass


class Step(Document, frozen=True, kw_only=True):
    """One function of a chain, and how it leads to the next.

    `file` and `line` are where it does; `edge` is the kind of that edge and `targets` how many the
    place has, in the last step None and 0.
    """

    function: str
    file: str | None
    line: int | None
    edge: str | None
    targets: int

    def summary(self) -> str:
        """Say it in one cell of a row."""
        return self.function


class ReachedSite(Document, frozen=True, kw_only=True, rename={"trap": "class"}):
    """A place that may trap and is reached; `id` is that of the scan. `chain` starts at a root."""

    id: str
    trap: TrapClass
    function: str
    file: str | None
    line: int | None
    instruction: str
    accessor: str | None
    emulable: bool
    chain: tuple[Step, ...]


class Gate(Document, frozen=True, kw_only=True):
    """A function behind which more lies; `reason` is None while it is open.

    `source` is a commit or a line that shows it, `by` whose reason it is: trapline's or the file's.
    `functions` and `sites` are what may be reached from it, through other gates, too.
    """

    id: str
    function: str
    file: str | None
    line: int | None
    reason: str | None
    source: str | None
    by: str | None
    functions: int
    sites: int
    chain: tuple[Step, ...]


class Untold(Document, frozen=True, kw_only=True):
    """An indirect branch of which only a guess can be made: `targets` functions fit.

    They are not followed. `reason`, `source` and `by` are as of a gate.
    """

    id: str
    function: str
    file: str | None
    line: int | None
    kind: str
    targets: int
    reason: str | None
    source: str | None
    by: str | None


class Reach(Document, frozen=True, kw_only=True):
    """All that one context may reach.

    `roots` are its functions. `forbidden`: no trap may land there, for the reason `why`.
    `functions` are those reached before the gates. `console` is a shortest way to what a console
    driver writes with, through open gates, empty where none is told. `missing` says what could not
    be looked at.
    """

    id: str
    title: str
    roots: tuple[str, ...]
    forbidden: bool
    why: str
    functions: tuple[str, ...]
    sites: tuple[ReachedSite, ...]
    gates: tuple[Gate, ...]
    untold: tuple[Untold, ...]
    console: tuple[Step, ...]
    missing: tuple[str, ...]

    @property
    def open_gates(self) -> tuple[Gate, ...]:
        """Gates that lead to sites, and that no reason closes."""
        return tuple(gate for gate in self.gates if gate.reason is None and gate.sites)

    @property
    def open_untold(self) -> tuple[Untold, ...]:
        """Branches that may lead to anything that fits, and that no reason closes."""
        return tuple(each for each in self.untold if each.reason is None and each.targets)
