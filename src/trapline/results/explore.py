"""The result document of `trapline explore`: schema "trapline/explore"."""

from typing import ClassVar, Final, Literal

from trapline.results.document import Document, ResultDocument
from trapline.results.labels import Labelled
from trapline.results.rows import Row
from trapline.results.splat import Splat

SCHEMA: Final = "trapline/explore"
VERSION: Final = 1

Verdict = Literal[
    "same",
    "handled",
    "held",
    "oops",
    "panic",
    "double-fault",
    "triple-fault",
    "td-exit",
    "hang",
    "misstep",
    "corrupt",
    "privilege",
]
#: What a run's end was compared with: what the event does at ordinary places, or, where a window
#: has none, in most of the window.
Basis = Literal["ordinary", "most"]
# From harmless to worst; a strip and a baseline comparison show the worse of two.
SEVERITY: Final[tuple[Verdict, ...]] = (
    "same",
    "handled",
    "held",
    "oops",
    "panic",
    "td-exit",
    "double-fault",
    "triple-fault",
    "hang",
    "misstep",
    "corrupt",
    "privilege",
)
# The "event" of a result that needed none: the window itself went wrong.
NOTHING: Final = "nothing"
CLEAN: Final[frozenset[Verdict]] = frozenset({"same", "handled", "held"})


class Boundary(Document, frozen=True, kw_only=True):
    """An instruction of the window: the event comes before it executes.

    `index` counts from 0 at the window's start, `ordinal` counts earlier visits of the same
    instruction, so that function, offset and ordinal name a boundary across rebuilds.
    """

    index: int
    function: str
    offset: int
    ordinal: int
    instruction: str


class Result(Document, frozen=True, kw_only=True):
    """One run: `event` before boundary `boundary`, and what came of it.

    `nested` and `nested_at` name the second event and how many instructions after the first
    it came; both `event` and `rule` are "nothing" where the window goes wrong by itself, with no
    event at all. `rule` is the row of the rules that allowed, held or turned the event; `allowed`
    is false for what only `--beyond-rules` tries. `expected` says that the scenario wants this
    verdict. `detail` is one sentence, empty for "same". `differs` are the registers and
    variables that are not as they should be, `footprint` the id of what the event changed as it
    does elsewhere (empty for nothing), `last` the last instructions, oldest first.
    `instructions` were executed from the event to the end: counted where an event is nested,
    estimated from the bytes of code that ran where none is.
    """

    scenario: str
    event: str
    boundary: int
    nested: str | None
    nested_at: int | None
    allowed: bool
    rule: str
    verdict: Verdict
    expected: bool
    detail: str
    differs: tuple[str, ...]
    footprint: str = ""
    instructions: int
    splat: Splat | None
    last: tuple[str, ...]
    reproduce: str


class Forbidden(Document, frozen=True, kw_only=True):
    """Events that the rules allow nowhere at these boundaries, and the row that says so."""

    event: str
    rule: str
    boundaries: int


class NotTried(Document, frozen=True, kw_only=True):
    """An event that this kernel cannot take as what it is meant to be, and why."""

    event: str
    why: str


class Window(Document, frozen=True, kw_only=True):
    """The instructions between a scenario's start and its end, as the reference run took them."""

    scenario: str
    title: str
    instructions: int
    boundaries: tuple[Boundary, ...]
    forbidden: tuple[Forbidden, ...]
    not_tried: tuple[NotTried, ...] = ()


class FootprintWord(Document, frozen=True, kw_only=True):
    """8 bytes that an event changes by its own nature, by the variable's name where it has one.

    `was` is without the event. `now` is with it: a number ("value"), one that varies with the
    virtual time ("time"), the address of the interrupted instruction ("rip"), its RFLAGS
    ("flags"), or some address inside the interrupted stack ("stack").
    """

    name: str
    gpa: int
    kind: Literal["value", "time", "rip", "flags", "stack"]
    was: int
    now: int | None


class Footprint(Document, frozen=True, kw_only=True):
    """What one event changes, in all runs of a window or in one phase of it.

    `event` and `nested` were delivered; `basis` is what that was learnt from. `words` are the
    first 512 of `count`. `boundaries` are the first and last of each stretch of boundaries whose
    runs left these words.
    """

    id: str
    scenario: str
    event: str
    nested: str | None
    basis: Basis
    count: int
    words: tuple[FootprintWord, ...]
    runs: int
    boundaries: tuple[tuple[int, int], ...]


class NotOpened(Document, frozen=True, kw_only=True):
    """A scenario whose window this kernel did not give, and why: nothing was injected there."""

    scenario: str
    why: str


class ExploreResult(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """One campaign. `injected` is how many events were injected in all; a report says so first."""

    lists: ClassVar = ("results", "windows", "footprints", "not_opened")

    schema_: Literal["trapline/explore"] = SCHEMA
    version: Literal[1] = VERSION
    generator: str
    injected: int
    kernel: str
    build_id: str | None
    module_version: str
    beyond_rules: bool
    not_opened: tuple[NotOpened, ...] = ()
    windows: tuple[Window, ...]
    results: tuple[Result, ...]
    footprints: tuple[Footprint, ...] = ()
    counts: dict[str, dict[str, int]]
    worse_than_baseline: tuple[str, ...] | None
    labels: tuple[Labelled, ...] = ()

    def __post_init__(self) -> None:
        """Refuse runs at places that no window has, so that no reader has to expect them."""
        sizes = {window.scenario: len(window.boundaries) for window in self.windows}
        for run in self.results:
            if not 0 <= run.boundary < sizes.get(run.scenario, 0):
                raise ValueError(
                    f"a run at {run.boundary} of {run.scenario}, which has no such place"
                )

    def parts(self, name: str) -> list[Row]:
        """Return the rows of a list; a run comes with the instruction that it was injected at."""
        rows = super().parts(name)
        if name != "results":
            return rows
        windows = {window.scenario: window.boundaries for window in self.windows}
        places = (windows[one.scenario][one.boundary] for one in self.results)
        return [
            row | {"function": at.function, "offset": at.offset, "instruction": at.instruction}
            for row, at in zip(rows, places, strict=True)
        ]
