"""Finding ids: the same site has the same id in the next build of the kernel.

An id is a hash of what a developer would say to name the site: the source object, the function,
the functions inlined there, the accessor, the instruction without addresses and registers, and,
where all that is the same, "the second one". No line number goes in. The object stands for the
module, so that a driver that is built in elsewhere keeps its ids.
"""

import hashlib
import re
from collections import Counter
from typing import TYPE_CHECKING, Final

from trapline.kernel.elf.functions import source_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trapline.results.scan import Frame

_SEPARATOR: Final = "\x1f"
# Which registers a function uses changes with every line that is added to it.
_REGISTER: Final = re.compile(r"%[a-z0-9]+")
_DIGEST_BYTES: Final = 8  # two of 50,000 sites have the same id once in ten billion kernels

#: What an id is made from, the ordinal excepted.
Key = tuple[str, ...]


def key(
    kind: str,
    place: str,
    function: str,
    inlined: "Iterable[Frame]",
    accessor: str | None,
    instruction: str,
) -> Key:
    """Return the key of a finding.

    `kind` is the form of the site, or "mapping"; `place` the object file, or the module where
    that is not known; `instruction` its normalised text.
    """
    chain = (source_name(frame.function) for frame in inlined)
    instruction = _REGISTER.sub("%", instruction)
    return (kind, place, source_name(function), *chain, "", accessor or "", instruction)


def ids(keys: "Iterable[Key]") -> list[str]:
    """Return an id for each key, in order; equal keys are told apart by their order."""
    seen: Counter[Key] = Counter()
    found = []
    for parts in keys:
        text = _SEPARATOR.join((*parts, str(seen[parts])))
        seen[parts] += 1
        found.append(hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest())
    return found
