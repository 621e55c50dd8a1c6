"""Finding ids: the same place in the source has the same id in the next build of the kernel.

An id is a hash of what a developer would say to name the place: the object file, the function, the
inline functions between it and the access, the accessor. The compiler's choices are left out:
registers, displacements and encodings, tail calls, clones (`.part.0`, `.constprop.0`), and into
which function it inlined one that nobody declared inline. So are the names that kernels give one
accessor (`trapline.linux.spelling`). The object stands for the module, so that a driver that is
built in elsewhere keeps its ids.

Where all that is the same, likes are told apart by where they stand in the source: line and column
of each call from the function on inwards, relative to where the function starts. So an id never
passes from one place to another: where an edit above moves likes, their ids change. Copies that a
compiler made of one place are told apart by where they landed, then by their order.
"""

import hashlib
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

_SEPARATOR: Final = "\x1f"
_DIGEST_BYTES: Final = 8  # two of 50,000 sites have the same id once in ten billion kernels


class Key(NamedTuple):
    """What an id is made from.

    `name` says it without lines. What tells likes apart is taken in where it is needed only, one
    after the other: `calls` and `line`, where in the source they are, and `landed` and `landed_at`,
    which copy of that it is. They are empty where they are not known.
    """

    name: tuple[str, ...]
    calls: str = ""
    line: str = ""
    landed: str = ""
    landed_at: str = ""


def ids(keys: "Iterable[Key]") -> list[str]:
    """Return an id for each key, in order; equal keys are told apart by their order."""
    keys = list(keys)
    followers: defaultdict[tuple[object, ...], set[str]] = defaultdict(set)
    for key in keys:
        for length in range(1, len(key)):
            followers[key[:length]].add(str(key[length]))
    seen: Counter[Key] = Counter()
    found = []
    for key in keys:
        needed = [
            str(key[length]) if len(followers[key[:length]]) > 1 else ""
            for length in range(1, len(key))
        ]
        text = _SEPARATOR.join((*key.name, "", *needed, str(seen[key])))
        seen[key] += 1
        found.append(hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest())
    return found
