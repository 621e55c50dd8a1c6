"""What is left of a guest that died: registers, back trace, last traps, and how to see it again.

Part of the result of `trapline boot`; reports show it in the kernel's own form.
Registers and addresses are hexadecimal strings, as JSON numbers lose bits above 2**53.
"""

from typing import TYPE_CHECKING

import msgspec

from trapline.results.document import Document
from trapline.results.scan import Frame

if TYPE_CHECKING:
    from collections.abc import Iterator


class Registers(Document, frozen=True, kw_only=True):
    """What __show_regs() of arch/x86/kernel/process_64.c prints.

    `general` maps lower-case names (rax … r15, rsp) to values; `rip` is a `Place`'s label.
    `control` and `bases` are empty for registers that were found on the stack.
    """

    rip: str
    cs: str
    ss: str
    rflags: str
    general: dict[str, str]
    segments: dict[str, str] = msgspec.field(default_factory=dict)
    bases: dict[str, str] = msgspec.field(default_factory=dict)
    control: dict[str, str] = msgspec.field(default_factory=dict)
    debug: dict[str, str] = msgspec.field(default_factory=dict)


class Place(Document, frozen=True, kw_only=True):
    """One line of a back trace.

    `label` is `function+0x12/0x80`, with ` [module]`; `address` is the run-time address and
    `link_address` the one in `image`. `frames` run from the innermost outwards; the last is the
    function itself. A guess was only found on the stack. `registers` are what was interrupted.
    """

    address: str
    label: str
    image: str
    link_address: str | None = None
    frames: tuple[Frame, ...] = ()
    is_guess: bool = False
    registers: Registers | None = None


def trace_lines(place: Place) -> "Iterator[str]":
    """Yield a line of a back trace as the kernel writes it, and where its functions come from.

    Inlined functions are on lines of their own. Names are as the kernel image has them: whoever
    prints them makes them safe.
    """
    mark = "? " if place.is_guess else ""
    yield f" {mark}{place.label}"
    if place.is_guess:
        return
    for index, frame in enumerate(place.frames):
        source = "??" if frame.file is None else f"{frame.file}:{frame.line or '?'}"
        inlined = index < len(place.frames) - 1
        yield f"     {source}" + (f" {frame.function} (inlined)" if inlined else "")


class Task(Document, frozen=True, kw_only=True):
    """One task of the guest: `state` is a letter as in ps, `trace` labels, innermost first."""

    pid: int
    comm: str
    state: str
    is_running: bool
    trace: tuple[str, ...]


class Code(Document, frozen=True, kw_only=True):
    """Bytes around RIP in hexadecimal; `at` is the index of RIP's. Empty where unreadable."""

    bytes: str
    at: int


class Splat(Document, frozen=True, kw_only=True):
    """The last state of a guest.

    `banner` is the first line of what the kernel would say, `injected` describes each event
    that trapline itself put in (it is announced before all else). `complete` tells whether the
    walk reached the end of the stack. `traps` are lines, oldest first. `reproduce` is the
    command that does it again.
    """

    banner: str
    injected: tuple[str, ...]
    registers: Registers
    code: Code
    place: Place
    trace: tuple[Place, ...]
    complete: bool
    traps: tuple[str, ...]
    reproduce: str

    def summary(self) -> str:
        """Say it in one cell of a row."""
        return self.banner
