"""What the builder of a call graph must be told of the kernel's conventions: see `linux.calls`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class CallNames:
    """Symbols that the compiler, objtool and the kernel's own patching go by.

    `thunks` are called or jumped to in place of an indirect branch, by the register it goes
    through. Of `returns`, a jump is a return. `untraced` are called at the start of functions, by
    nobody once the kernel has booted. `static_calls` are the bounds of the table of calls that are
    patched at boot, `static_update` sets one. `paravirt` is the table of what is called in place of
    instructions, `per_cpu` where the per-CPU variables start.
    """

    thunks: "Mapping[str, int]"
    returns: tuple[str, ...]
    untraced: tuple[str, ...]
    static_calls: tuple[str, str]
    static_update: str
    paravirt: str
    per_cpu: str
