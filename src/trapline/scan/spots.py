"""Where a finding stands in the source: which function names it, and where in that function.

The function is the innermost that the programmer made one: what the compiler inlined by its own
choice is named by itself, not by where it landed, which another compiler or another configuration
would choose differently. What is declared inline belongs to whom it is called by.
"""

from typing import TYPE_CHECKING, NamedTuple

from trapline.kernel.elf.functions import source_name
from trapline.linux import spelling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trapline.kernel.dwarf.frames import SourceFrame


class Spot(NamedTuple):
    """A place in the source.

    `function` names it; `wrappers` are the inline functions between it and the access, from it
    inwards; `access` the canonical name of the accessor if that is inlined. `calls` is line and
    column of each call on that way, "11:5 2:9", relative to the start of the function it is in,
    `line` the line of the site in the last of them, None for an inlined accessor. `landed` names
    what `function` was inlined into by the compiler, outermost first, `landed_at` where in each;
    both are empty where it was not.
    """

    function: str
    wrappers: tuple[str, ...]
    access: str | None
    calls: str
    line: int | None
    landed: tuple[str, ...]
    landed_at: str


def spot_of(frames: "Sequence[SourceFrame]", line: int | None) -> Spot:
    """Find the spot of an address from its frames, innermost first; `line` is its source line."""
    names = [source_name(frame.function) for frame in frames]
    last = len(frames) - 1
    owner = next((n for n, frame in enumerate(frames) if frame.chosen), last)
    # A function may be a clone of an accessor; then there is nobody else to name it by.
    inner = min(spelling.outermost_access(names), owner)
    declared = frames[0].declared
    calls = [_position(frames[n]) for n in range(owner - 1, inner - 2, -1) if n >= 0]
    return Spot(
        function=names[owner],
        wrappers=tuple(reversed(names[inner:owner])),
        access=spelling.canonical(names[inner - 1]) if inner else None,
        calls=" ".join(calls),
        line=None if inner or line is None or declared is None else line - declared,
        landed=tuple(reversed(names[owner + 1 :])),
        landed_at=" ".join(_position(frames[n]) for n in range(last - 1, owner - 1, -1)),
    )


def _position(frame: "SourceFrame") -> str:
    line, column = frame.line, frame.column
    return f"{'?' if line is None else line}:{'?' if column is None else column}"
