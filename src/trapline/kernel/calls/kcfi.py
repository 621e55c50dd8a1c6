"""The hashes of prototypes that clang puts before functions and checks before indirect calls.

A call reads `mov $-HASH,%r10d; add -N(%reg),%r10d; je 1f; ud2; 1: call *%reg`, so it says where the
hash of its target is, and which one it takes. Source: LLVM, X86AsmPrinter::LowerKCFI_CHECK.
"""

import re
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from trapline.kernel.calls.codemap import CodeMap

_CHECK: Final = re.compile(
    rb"\x41\xba(?P<hash>....)[\x44\x45]\x03[\x40-\x7f](?P<at>.)\x74\x02\x0f\x0b\Z", re.DOTALL
)
_LONGEST: Final = 14
_HASH: Final = struct.Struct("<I")


class Kcfi:
    """The hashes of one object; a kernel that was built without them has none."""

    def __init__(self, code: "CodeMap") -> None:
        self._code = code
        self._by_hash: dict[int, dict[int, set[int]]] = {}

    def targets(self, site: int, taken: frozenset[int]) -> frozenset[int] | None:
        """Return those of some functions that a call may lead to; None where it is not checked."""
        check = _CHECK.search(self._code.bytes_before(site, _LONGEST))
        if check is None:
            return None
        wanted = -_HASH.unpack(check["hash"])[0] & 0xFFFFFFFF
        at = int.from_bytes(check["at"], signed=True)
        if at not in self._by_hash:
            self._by_hash[at] = self._index(at, taken)
        return frozenset(self._by_hash[at].get(wanted, ()))

    def _index(self, at: int, taken: frozenset[int]) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {}
        for function in taken:
            data = self._code.bytes_before(function, -at)[: _HASH.size]
            if len(data) == _HASH.size:
                found.setdefault(_HASH.unpack(data)[0], set()).add(function)
        return found
