"""How sources spell an access: one name for what kernels, versions and layers call differently.

`rdmsrl()` became `rdmsrq()` in v6.16, `__outb()` is what `outb()` expands to, and in between come
`native_…()` and `paravirt_…()`, which change with the configuration and with nearly every release.
A finding id must not: it has one canonical name, of the outermost of such functions.
"""

import re
from typing import TYPE_CHECKING, Final

from trapline.linux.accessors import CALLED, INLINED

if TYPE_CHECKING:
    from collections.abc import Sequence

# Inline functions that do nothing but access, under every prefix they ever had.
_INLINE: Final = re.compile(
    r"_*(?:native_|paravirt_|raw_|early_)?_*(?:"
    r"(?:rd|wr)msr[lq]?(?:ns)?(?:_safe)?(?:_regs)?"
    r"|(?:read|write)_(?:msr|pmc|cr[0-8]|dr[0-7])(?:_safe)?"
    r"|(?:in|out)s?[bwl](?:_p)?|slow_down_io|io_delay"
    r"|cpuid(?:_e[abcd]x|_count|_read|_subleaf|_leaf)*"
    r"|(?:read|write)[bwlq](?:_relaxed)?"
    r"|(?:arch_)?(?:safe_)?halt|wbinvd|wbnoinvd|rdpmcl?|mwaitx?|monitorx?|xsetbv"
    r")"
)
_PREFIXES: Final = re.compile(r"^_*(?:native_|paravirt_|raw_|early_)?_*")
# v6.16 renamed the 64-bit accessors of MSRs from l, for "long", to q: rdmsrl, wrmsrl_safe,
# rdmsrl_on_cpu, mce_wrmsrl.
_LONG: Final = re.compile(r"^((?:mce_)?(?:rd|wr)msr)l(?=_|$)")
# v6.13 put underscores before those that fall back: __ioread64_lo_hi.
_HALVES: Final = re.compile(r"^_*(io(?:read|write)64(?:be)?_(?:lo_hi|hi_lo))$")


def is_access(function: str) -> bool:
    """Whether an inline function does nothing but access what its caller says."""
    return function in INLINED or _INLINE.fullmatch(function) is not None


def canonical(accessor: str) -> str:
    """Give the one name of an accessor; what is none keeps its own."""
    if accessor not in CALLED and is_access(accessor):
        accessor = _PREFIXES.sub("", accessor)
    return _HALVES.sub(r"\1", _LONG.sub(r"\1q", accessor))


def outermost_access(functions: "Sequence[str]") -> int:
    """Count those at the start of a chain, innermost first, that only access."""
    return next(
        (number for number, name in enumerate(functions) if not is_access(name)), len(functions)
    )
