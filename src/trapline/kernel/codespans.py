"""Which bytes of a kernel are code, by all that describes code, and not by section flags alone.

A section header may say that data are executable: one input section with the flag is enough, and
Linux 7.2 and 7.3 as Debian builds them have a `.data` of 3.5 MB that is writable and executable by
its flags. What a program header says is no better: all that is freed after boot, `.init.text`
included, is in a segment that is writable. So a byte of vmlinux is code where something says so
that is made from the code itself:

- a function symbol with a size, of C or of assembly (SYM_FUNC_END, SYM_CODE_END);
- an entry of the ORC unwind table;
- the address range of a compilation unit in DWARF, in assembly where nothing can be written;
- an entry of `.altinstructions`, for what replaces other code.

Kernels for x86-64 have no `.eh_frame` to ask: vmlinux.lds.S throws it away. A stripped kernel has
no symbols but those of /proc/kallsyms, which have no sizes, and a type that is the section's: its
sections are taken at their word, but for those that can be written to. In a module the section
flags are what the module loader goes by.
"""

from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from trapline.kernel.live.orc import orc_spans

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from trapline.kernel.binary import Binary

_NONE: "Final[NDArray[np.uint64]]" = np.zeros(0, np.uint64)


class CodeSpans:
    """Disjoint address spans, sorted: `starts` and `ends`, both of shape (n,)."""

    def __init__(self, starts: "NDArray[np.uint64]", ends: "NDArray[np.uint64]") -> None:
        self.starts = starts
        self.ends = ends

    @classmethod
    def union(cls, spans: "Iterable[tuple[NDArray[Any], NDArray[Any]]]") -> Self:
        """Join arrays of starts and ends that may overlap."""
        pairs = list(spans)
        starts = np.concatenate([np.asarray(pair[0], np.uint64) for pair in pairs] or [_NONE])
        ends = np.concatenate([np.asarray(pair[1], np.uint64) for pair in pairs] or [_NONE])
        filled = starts < ends
        starts, ends = starts[filled], ends[filled]
        order = np.argsort(starts, kind="stable")
        starts, reach = starts[order], np.maximum.accumulate(ends[order])
        first = np.ones(len(starts), np.bool_)
        first[1:] = starts[1:] > reach[:-1]
        last = np.append(first[1:], True)[: len(starts)]
        return cls(starts[first], reach[last])

    def __len__(self) -> int:
        return len(self.starts)

    def hold(self, addresses: "NDArray[np.uint64]") -> "NDArray[np.bool_]":
        """Say of each address whether it is within a span."""
        if not len(self.starts):
            return np.zeros(len(addresses), np.bool_)
        places = np.searchsorted(self.starts, addresses, "right") - 1
        inside: NDArray[np.bool_] = (places >= 0) & (addresses < self.ends[np.maximum(places, 0)])
        return inside

    def size_within(self, start: int, end: int) -> int:
        """Return how many bytes of an address range the spans hold."""
        low = np.clip(self.starts, np.uint64(start), np.uint64(end))
        high = np.clip(self.ends, np.uint64(start), np.uint64(end))
        return int((high - low).sum())


def described_code(binary: "Binary") -> CodeSpans:
    """Return what is code of a vmlinux."""
    found = [orc_spans(binary.elf), binary.alternatives.spans()]
    fixed = [section for section in binary.text if not section.is_writable]
    starts = np.array([section.address for section in fixed], np.uint64)
    ends = np.array([section.end for section in fixed], np.uint64)
    found.append(binary.functions.spans() if binary.has_typed_symbols else (starts, ends))
    if binary.units is not None:
        found.append(binary.units.spans(assembly=False))
        # The assembler gives a unit all of a section with the flag of code, data included.
        first, last = binary.units.spans(assembly=True)
        believed = CodeSpans.union([(starts, ends)]).hold(first)
        found.append((first[believed], last[believed]))
    return CodeSpans.union(found)
