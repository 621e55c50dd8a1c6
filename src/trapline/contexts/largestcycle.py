"""The core of a kernel: the functions that can all reach each other.

Most of a kernel can call most of it: its largest cycle of calls has thousands of functions, and
whoever reaches one of them reaches all, and all that is behind. So the question what a root reaches
has two answers: the little that is on this side of the core, and the core. A gate is a function of
the core that is called from this side.
"""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

#: A cycle of fewer functions is no core, and may be read.
SMALLEST_CORE: Final = 100


def core(functions: "Iterable[int]", callees: "Callable[[int], Iterable[int]]") -> frozenset[int]:
    """Return the largest set of functions that can all call each other; empty for a small one."""
    cycles = _Cycles(callees)
    best: list[int] = []
    for root in sorted(functions):
        for found in cycles.of(root):
            if len(found) > len(best):
                best = found
    return frozenset(best) if len(best) >= SMALLEST_CORE else frozenset()


class _Cycles:
    """Strongly connected components, after R. Tarjan (1972), without recursion."""

    def __init__(self, callees: "Callable[[int], Iterable[int]]") -> None:
        self._callees = callees
        self._index: dict[int, int] = {}
        self._low: dict[int, int] = {}
        self._path: list[int] = []
        self._waiting: set[int] = set()

    def of(self, root: int) -> "Iterator[list[int]]":
        """Yield the components that are reached from a function, each once in all."""
        if root in self._index:
            return
        work = [(root, self._enter(root))]
        while work:
            function, rest = work[-1]
            callee = next(rest, None)
            if callee is None:
                work.pop()
                if work:
                    self._lower(work[-1][0], self._low[function])
                if self._low[function] == self._index[function]:
                    yield self._leave(function)
            elif callee not in self._index:
                work.append((callee, self._enter(callee)))
            elif callee in self._waiting:
                self._lower(function, self._index[callee])

    def _enter(self, function: int) -> "Iterator[int]":
        self._index[function] = self._low[function] = len(self._index)
        self._path.append(function)
        self._waiting.add(function)
        return iter(self._callees(function))

    def _lower(self, function: int, value: int) -> None:
        self._low[function] = min(self._low[function], value)

    def _leave(self, function: int) -> list[int]:
        place = len(self._path) - 1
        while self._path[place] != function:
            place -= 1
        found = self._path[place:]
        del self._path[place:]
        self._waiting.difference_update(found)
        return found
