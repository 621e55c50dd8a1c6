"""What one run is asked to do, and what came of it, before anybody judges it."""

from typing import Literal, NamedTuple

from trapline.results.explore import Verdict


class Run(NamedTuple):
    """What one run injects: `nested` comes `nested_at` instructions after `event`.

    A boundary as large as the window's number of instructions is its compare point.
    """

    event: str
    boundary: int
    nested: str | None = None
    nested_at: int | None = None


class Word(NamedTuple):
    """8 bytes of memory that differ from the reference's end.

    `value` is what they hold; for "rip" the word holds the address of the interrupted
    instruction, whatever that is, for "flags" its RFLAGS, and for "stack" it points into the
    interrupted stack. (The interrupted CS is one number for each mode.)
    """

    gpa: int
    kind: Literal["value", "rip", "flags", "stack"]
    value: int


#: Not a word of memory: a digest of the x87 and SSE registers, where kernel code runs.
FPU_WORD = -1


class Words(tuple[Word, ...]):  # noqa: SLOT001 - a tuple has no slots to keep a hash in
    """Words by GPA. Thousands of runs end with the same object: its hash is told once."""

    def __hash__(self) -> int:
        """Return the hash that any tuple of these words has."""
        found: int | None = vars(self).get("hash")
        if found is None:
            found = vars(self)["hash"] = super().__hash__()
        return found


NO_WORDS = Words()


class Context(NamedTuple):
    """What the events interrupted: RIPs, RFLAGS, and the stacks (GLAs) that were in use."""

    rips: frozenset[int]
    flags: frozenset[int]
    stacks: tuple[range, ...]


NO_CONTEXT = Context(frozenset(), frozenset(), ())


class Course(NamedTuple):
    """One run, from its event to its end.

    `verdict` is None at the compare point; there `words` are those that differ (sorted), `wrong`
    sentences on registers. `place` is the boundary at which the event was delivered, None where the
    window's own code was not at hand. `delivered` says of the event, and of the nested one, whether
    it was delivered oftener than in the reference. `first` is when (instructions since the event)
    and where (RIP) the event was delivered.
    """

    run: Run
    verdict: Verdict | None
    detail: str
    executed: int
    first: tuple[int, int] | None
    place: int | None
    delivered: tuple[bool, bool]
    words: Words
    context: Context
    wrong: tuple[str, ...]
