"""The result document of `trapline contexts`: schema "trapline/contexts".

Where a trap may land. A gap is code that runs while a #VE, or the IRET that ends it, would meet a
kernel that is half entered. It is walked over all paths, so what it says holds for each of them.
"""

from typing import ClassVar, Final, Literal

from trapline.results.document import Document, ResultDocument
from trapline.results.reach import Reach
from trapline.results.trapclass import TrapClass

SCHEMA: Final = "trapline/contexts"
VERSION: Final = 1

Direction = Literal["in", "out"]
#: Whether the rules say #VE, cannot say as a number is not known, or say that it is none.
TrapAnswer = Literal["ve", "may", "no"]
AccessKind = Literal[
    "stack",
    "per-CPU",
    "kernel data",
    "pointer",
    "user stack",
    "user GS",
    "user memory",
    "device",
]
#: Accesses that a host or user mode can make a trap of.
FORBIDDEN_ACCESSES: "Final[frozenset[AccessKind]]" = frozenset(
    ("user stack", "user GS", "user memory", "device")
)
EdgeKind = Literal[
    "indirect call",
    "indirect jump",
    "return",
    "paravirt call",
    "static call",
    "report",
    "exception",
    "no code",
    "too many paths",
    "no origin",
]
#: Edges that hide an unknown part of the gap itself; behind the others is code that is known.
UNREAD_EDGES: "Final[frozenset[EdgeKind]]" = frozenset(
    ("indirect jump", "return", "no code", "too many paths", "no origin")
)


class ContextsKernel(Document, frozen=True, kw_only=True):
    """What was looked at. `name` is what the user called it."""

    name: str
    release: str | None
    build_id: str | None


class Place(Document, frozen=True, kw_only=True):
    """A place in code: `offset` is in bytes from `function`.

    `alternative` is set for code that is copied there at boot; `address` is then where the copy
    comes from.
    """

    function: str
    offset: int
    alternative: bool
    address: str
    file: str | None
    line: int | None

    def summary(self) -> str:
        """Say it in one cell of a row."""
        return f"{self.function}+{self.offset:#x}"


class GapEntry(Document, frozen=True, kw_only=True):
    """One way into a gap. `vector` is that of the gate; `found` says where the kernel has it.

    `like` is another entry of this gap, of which this one's stub is a copy but for what it calls.
    """

    function: str
    vector: int | None
    found: str
    like: str | None = None


class GapInstruction(Document, frozen=True, kw_only=True):
    """One instruction of a gap, with all that does not hold at it on some path."""

    place: Place
    instruction: str
    directions: tuple[Direction, ...]
    conditions: tuple[str, ...]


class GapSite(Document, frozen=True, kw_only=True, rename={"trap": "class"}):
    """An instruction in a gap that leaves the guest by its nature, or an access that may.

    `answer` is what the rules say of it, in the row `rule`; `subject` is the MSR or leaf, where
    it is known. `id` has no address in it.
    """

    id: str
    trap: TrapClass
    answer: TrapAnswer
    rule: str
    subject: str
    place: Place
    instruction: str
    directions: tuple[Direction, ...]
    conditions: tuple[str, ...]
    reason: str


class GapEdge(Document, frozen=True, kw_only=True):
    """Where a path goes on in a way that was not followed."""

    id: str
    kind: EdgeKind
    place: Place
    target: str | None
    reason: str


class Gap(Document, frozen=True, kw_only=True, rename={"in_": "in"}):
    """One gap. `in_` and `out` count its instructions by the way they are run on, once each.

    `by_condition` counts them by what does not hold, `accesses` their memory accesses by kind.
    `paths` are those that were walked, each up to where it ends or meets another; `leaves` the
    instructions by which the kernel was left.
    """

    id: str
    title: str
    entries: tuple[GapEntry, ...]
    instructions: tuple[GapInstruction, ...]
    in_: int
    out: int
    paths: int
    leaves: tuple[str, ...]
    by_condition: dict[str, int]
    accesses: dict[str, int]
    sites: tuple[GapSite, ...]
    edges: tuple[GapEdge, ...]

    @property
    def proved(self) -> bool:
        """Whether no site in it may trap, and nothing of it was left out."""
        return not self.edges and all(site.answer == "no" for site in self.sites)


class ContextsResult(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """Where a trap may land in one kernel.

    `missing` says what could not be looked at, `assumptions` what the proofs take for granted.
    `reach` is by context, in the order of trapline's list.
    """

    lists: ClassVar = ("gaps", "reach")

    schema_: Literal["trapline/contexts"] = SCHEMA
    version: Literal[1] = VERSION
    generator: str
    kernel: ContextsKernel
    module_version: str
    missing: tuple[str, ...]
    assumptions: tuple[str, ...]
    gaps: tuple[Gap, ...]
    reach: tuple[Reach, ...]
