"""Static calls: direct calls that the kernel patches to whatever their key points to.

The table of their sites says which key each has, the key which function it points to at first.
Later ones are set by a call that has the key and the function among its arguments. Source:
include/linux/static_call_types.h, struct static_call_site and static_call_key.
"""

import struct
from typing import TYPE_CHECKING, Final

from iced_x86 import Register

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.kernel.binary import Binary
    from trapline.kernel.calls.codemap import CodeMap
    from trapline.kernel.calls.conventions import CallNames
    from trapline.kernel.calls.resolve import Resolver
    from trapline.kernel.calls.survey import Survey

_SITE: Final = struct.Struct("<ii")
_FLAGS: Final = 3  # lowest bits of the key's address: tail call, of an init section
_MASK: Final = (1 << 64) - 1
_POINTER: Final = 8
_MAX_SITES: Final = 1_000_000


def static_sites(binary: "Binary", names: "CallNames") -> dict[int, int]:
    """Return site -> key of the static calls of a vmlinux; empty where there is no table."""
    start, end = (binary.address_of(name) for name in names.static_calls)
    if start is None or end is None or not 0 < end - start <= _MAX_SITES * _SITE.size:
        return {}
    data = binary.read(start, end - start)
    if data is None:
        return {}
    found = {}
    for number, (site, key) in enumerate(_SITE.iter_unpack(data[: len(data) // 8 * 8])):
        here = start + number * _SITE.size
        found[(here + site) & _MASK] = (here + 4 + key) & _MASK & ~_FLAGS
    return found


def static_targets(
    code: "CodeMap", survey: "Survey", resolver: "Resolver", keys: "set[int]", update: int | None
) -> dict[int, set[int]]:
    """Return key -> the functions it may point to, now or later."""
    found: dict[int, set[int]] = {key: set() for key in keys}
    for key in keys:
        pointer = code.binary.read(key, _POINTER)
        target = 0 if pointer is None else int.from_bytes(pointer, "little")
        if code.is_function(target):
            found[key].add(target)
    for key, targets in _updates(code, survey, resolver, update):
        if key in found:
            found[key] |= targets
    return found


def _updates(
    code: "CodeMap", survey: "Survey", resolver: "Resolver", update: int | None
) -> "Iterator[tuple[int, frozenset[int]]]":
    if update is None:
        return
    branches = code.branches
    for site in branches.sites[branches.targets == update].tolist():
        owner = code.owner(site)
        if owner < 0:
            continue
        origins = survey.origins(owner)
        functions = origins.of_register(site, Register.RDX)
        for key in origins.of_register(site, Register.RDI):
            if key.source == "constant" and key.what:
                yield key.what, resolver.of_values(functions, ())[1]
