"""The reference's end in memory, and which words of another run's end differ from it.

Memory is compared page by page, only where one of the two runs wrote; differences are told in
words of 8 bytes. What cannot be told apart from nothing is excused: dead stack, accessed and
dirty bits, and words whose value is a time.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from trapline.cpu.engine import Vcpu
from trapline.explore.course import FPU_WORD, Context, Word, Words
from trapline.explore.datamap import ACCESSED_DIRTY, PAGE, DataMap
from trapline.explore.stacks import Stacks

WORD: Final = 8
_COLUMNS: Final = PAGE // WORD
_ALL: Final = (1 << 64) - 1
_RECENT: Final = 4  # sets of words that are looked for before a run's own are put together
_Array = npt.NDArray[np.uint64]


class Taken(NamedTuple):
    """A copy of pages: their GPAs, sorted, and their words, one row each."""

    pages: list[int]
    words: _Array
    fpu: int


class Excused:
    """What is not compared: dead words of these stacks, and words that are times."""

    def __init__(self, stacks: Stacks, times: frozenset[int] = frozenset()) -> None:
        self.stacks = stacks
        self.times = times
        self.recent: list[_Known] = []
        self._masks: dict[int, _Array] = {}

    def covers(self, gpa: int) -> bool:
        """Whether a word is excused."""
        return gpa in self.times or self.stacks.is_dead(gpa)

    def mask(self, page: int, data: DataMap) -> _Array:
        """Return the bits of each word of a page that are compared."""
        if page not in self._masks:
            bits = _ALL & ~ACCESSED_DIRTY if page in data.table_pages else _ALL
            mask = np.full(_COLUMNS, bits, np.uint64)
            alive = self.stacks.compared(page) if data.guarded(page) is None else None
            if alive is not None:
                mask &= alive
            for gpa in self.times:
                if gpa & -PAGE == page:
                    mask[gpa % PAGE // WORD] = 0
            self._masks[page] = mask
        return self._masks[page]


class _Known:
    """A set of words that some run's end had, to be recognised in another's at once."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self._values = [word for word in words if word.gpa != FPU_WORD]
        self._fpu = next((word.value for word in words if word.gpa == FPU_WORD), None)
        self._pages = {word.gpa & -PAGE for word in self._values}
        self._placed: tuple[list[int], _Array, _Array, list[tuple[int, int, Word]]] | None = None

    def is_of(self, taken: Taken, excused: Excused, context: Context, ends: "Ends") -> bool:
        if self._placed is None or self._placed[0] != taken.pages:
            if not self._pages <= set(taken.pages):
                return False
            self._placed = self._place(taken.pages, excused, ends)
        _, want, mask, moving = self._placed
        if ((taken.words ^ want) & mask).any() or ends.fpu_word(taken, excused) != self._fpu:
            return False
        return all(
            _kind(word.gpa, int(taken.words[row, column]), context) == word
            for row, column, word in moving
        )

    def _place(
        self, pages: list[int], excused: Excused, ends: "Ends"
    ) -> tuple[list[int], _Array, _Array, list[tuple[int, int, Word]]]:
        rows = {page: row for row, page in enumerate(pages)}
        want, mask = ends.expected(pages).copy(), ends.mask(pages, excused).copy()
        moving = []
        for word in self._values:
            row, column = rows[word.gpa & -PAGE], word.gpa % PAGE // WORD
            if word.kind == "value":
                want[row, column] = np.uint64(word.value)
            else:
                mask[row, column] = np.uint64(0)
                moving.append((row, column, word))
        return pages, want, mask, moving


class Ends:
    """The reference's end. Make it there; `pages` are those that the reference wrote."""

    def __init__(self, vcpu: Vcpu, data: DataMap, pages: Iterable[int], cpl: int) -> None:
        self.data = data
        self._vcpu = vcpu
        self._cpl = cpl
        self._fpu = self._digest()
        self._expected = {page: self._page(page) for page in pages}
        self._written = frozenset(self._expected)

    def take(self, pages: Iterable[int]) -> Taken:
        """Copy what a comparison needs: pages of this run, and those of the reference."""
        chosen = sorted(self._written.union(pages))
        # Not kept: memory that is looked at cannot be freed.
        ram = np.frombuffer(self._vcpu.memory.ram, np.uint64).reshape(-1, _COLUMNS)
        return Taken(chosen, ram[np.array(chosen, np.intp) // PAGE], self._digest())

    def unknown(self, taken: Taken) -> list[int]:
        """Return those of the pages whose expected content is not known yet."""
        return [page for page in taken.pages if page not in self._expected]

    def learn(self, pages: Iterable[int]) -> None:
        """Note the content of pages at the window's start; call with the machine restored.

        What the reference did not write is at its end as it was at its start.
        """
        for page in pages:
            if page not in self._expected:
                self._expected[page] = self._page(page)

    def was(self, gpa: int) -> int:
        """Return what a word holds at the reference's end."""
        if gpa == FPU_WORD:
            return self._fpu
        return int(self._expected[gpa & -PAGE][gpa % PAGE // WORD])

    def differing(self, taken: Taken, excused: Excused, context: Context) -> Words:
        """Return the words that differ, sorted by GPA, but for those excused."""
        for known in excused.recent:
            if known.is_of(taken, excused, context, self):
                if known is not excused.recent[0]:
                    excused.recent.remove(known)
                    excused.recent.insert(0, known)
                return known.words
        words = Words(self._differing(taken, excused, context))
        excused.recent.insert(0, _Known(words))
        del excused.recent[_RECENT:]
        return words

    def changed(self, one: Taken, other: Taken) -> frozenset[int]:
        """Return the GPAs of words that two runs left different, excused or not."""
        found = set()
        pages = sorted({*one.pages, *other.pages})
        changed = self._whole(one, pages) ^ self._whole(other, pages)
        for row, column in zip(*(part.tolist() for part in changed.nonzero()), strict=True):
            found.add(pages[row] + WORD * column)
        if one.fpu != other.fpu:
            found.add(FPU_WORD)
        return frozenset(found)

    def expected(self, pages: list[int]) -> _Array:
        """Return what pages hold at the reference's end, one row each."""
        return np.stack([self._expected[page] for page in pages])

    def mask(self, pages: list[int], excused: Excused) -> _Array:
        """Return the bits of pages that are compared, one row each."""
        return np.stack([excused.mask(page, self.data) for page in pages])

    def fpu_word(self, taken: Taken, excused: Excused) -> int | None:
        """Return the digest of x87 and SSE if that is judged here, and differs."""
        if self._cpl != 0 or FPU_WORD in excused.times or taken.fpu == self._fpu:
            return None
        return taken.fpu

    def _differing(self, taken: Taken, excused: Excused, context: Context) -> Iterator[Word]:
        fpu = self.fpu_word(taken, excused)
        if fpu is not None:
            yield Word(FPU_WORD, "value", fpu)
        changed = taken.words ^ self.expected(taken.pages)
        changed &= self.mask(taken.pages, excused)
        for row, column in zip(*(part.tolist() for part in changed.nonzero()), strict=True):
            value = int(taken.words[row, column])
            yield _kind(taken.pages[row] + WORD * column, value, context)

    def _whole(self, taken: Taken, pages: list[int]) -> _Array:
        rows = {page: row for row, page in enumerate(taken.pages)}
        return np.stack(
            [taken.words[rows[page]] if page in rows else self._expected[page] for page in pages]
        )

    def _digest(self) -> int:
        if self._cpl != 0:
            return 0
        return int.from_bytes(hashlib.blake2b(self._vcpu.fpu, digest_size=WORD).digest())

    def _page(self, page: int) -> _Array:
        return np.frombuffer(bytes(self._vcpu.memory.ram[page : page + PAGE]), np.uint64)


def _kind(gpa: int, value: int, context: Context) -> Word:
    if value in context.rips:
        return Word(gpa, "rip", 0)
    if value in context.flags:
        return Word(gpa, "flags", 0)
    if any(value in stack for stack in context.stacks):
        return Word(gpa, "stack", 0)
    return Word(gpa, "value", value)
