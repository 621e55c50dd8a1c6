"""Which function each member of each struct points to in initialised data.

A variable of C is a symbol with a size. Where one holds pointers to functions, its type is a
struct of that size, or an array of one, that has a function pointer of the right prototype wherever
the variable has a pointer to a function. So an operations table is known by its contents, in a
kernel without DWARF, too; where several structs fit equally well, all count. What no struct fits is
`loose`: such a pointer may belong to any struct that fits at some place around it.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

from trapline.kernel.types.layout import Leaf, Place

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trapline.kernel.calls.pointers import Pointers
    from trapline.kernel.types.layout import Layouts

_WORD: Final = 8
_NONE: "Final[frozenset[int]]" = frozenset()
_MAX_POINTERS: Final = 4096  # of one variable that are held against types


class Member(NamedTuple):
    """The function pointer at an offset of a struct."""

    struct: int
    at: int


class Tables:
    """The variables of some objects, typed by the function pointers in them.

    `members` is what each member points to somewhere; `loose` are the targets of what has no type,
    by the class of the function, None for functions whose prototype is not known.
    """

    def __init__(
        self, pointers: "Pointers", layouts: "Layouts", classes: "Mapping[int, int]"
    ) -> None:
        self._layouts = layouts
        self._classes = classes
        self.members: dict[Member, set[int]] = {}
        self.loose: dict[int | None, set[int]] = {}
        #: Structs that some variable is of, or has in it.
        self.structs: set[int] = set()
        #: Where a variable starts -> the structs that it may be of.
        self.types: dict[int, tuple[int, ...]] = {}
        self._index = self._by_place()
        for start, end, found in pointers.by_variable():
            self._variable(start, end, found)

    def leaves(self, start: int, address: int) -> tuple[Leaf, ...]:
        """Return what lies at an address of the variable at `start`, where its type is known."""
        return tuple(
            leaf
            for struct in self.types.get(start, ())
            for leaf in self._layouts.leaves(
                Place(struct, (address - start) % self._layouts.size(struct))
            )
        )

    def _by_place(self) -> dict[tuple[int, int, int | None], frozenset[int]]:
        """(size, offset, class) -> the structs of that size with such a pointer there."""
        found: dict[tuple[int, int, int | None], set[int]] = {}
        for size, structs in self._layouts.by_size.items():
            for struct in structs:
                for offset, kind in self._layouts.pointers(struct).items():
                    found.setdefault((size, offset, kind), set()).add(struct)
        return {key: frozenset(structs) for key, structs in found.items()}

    def _variable(self, start: int, end: int, found: list[tuple[int, int]]) -> None:
        size = end - start
        best: dict[int, int] = {}
        if 0 < len(found) <= _MAX_POINTERS:
            for each in self._layouts.by_size:
                if size % each == 0:
                    best.update(self._fitting(start, each, found))
        top = max(best.values(), default=0)
        chosen = tuple(sorted(struct for struct, score in best.items() if score == top and score))
        self.types[start] = chosen
        for place, target in found:
            told = False
            for struct in chosen:
                offset = (place - start) % self._layouts.size(struct)
                for leaf in self._layouts.leaves(Place(struct, offset)):
                    if self._layouts.prototype_of(leaf.kind) is not None:
                        self.members.setdefault(Member(leaf.owner, leaf.at), set()).add(target)
                        self.structs.add(leaf.owner)
                        told = True
            if not told and size > _WORD:
                self.loose.setdefault(self._classes.get(target), set()).add(target)

    def _fitting(self, start: int, size: int, found: list[tuple[int, int]]) -> dict[int, int]:
        """Return the structs of one size that explain all pointers, with how many they tell."""
        scores: dict[int, int] | None = None
        for place, target in found:
            offset = (place - start) % size
            kind = self._classes.get(target)
            maybe = self._index.get((size, offset, None), _NONE)
            exact = self._index.get((size, offset, kind), _NONE)
            if kind is None:
                # It fits wherever there is a pointer, and tells nothing.
                maybe = frozenset(
                    struct
                    for struct in (scores or self._layouts.by_size[size])
                    if offset in self._layouts.pointers(struct)
                )
                exact = _NONE
            if scores is None:
                scores = {**dict.fromkeys(maybe, 0), **dict.fromkeys(exact, 1)}
            else:
                scores = {
                    struct: score + (struct in exact)
                    for struct, score in scores.items()
                    if struct in exact or struct in maybe
                }
            if not scores:
                return {}
        return scores or {}
