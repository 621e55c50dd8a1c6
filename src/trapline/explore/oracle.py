"""Is a run's end the reference's end? Registers, memory, and what the rules say of a difference.

Memory is compared page by page, only where one of the two runs wrote; differences are looked
at in words of 8 bytes, and each word is judged once per window.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from trapline.cpu.engine import Reg, Vcpu
from trapline.explore.datamap import DataMap
from trapline.linux.noise import NoiseRule

PAGE: Final = 4096
WORD: Final = 8
_COLUMNS: Final = PAGE // WORD
_ALL_BITS: Final = (1 << 64) - 1
_PAGE_TABLE_NOISE: Final = 0x60  # accessed and dirty
_Words = npt.NDArray[np.uint64]
_MAX_NAMED: Final = 12
# Status flags and IF, DF, NT, AC; RF is for the processor, the others are fixed.
_RFLAGS: Final = 0x3F7FD7 & ~(1 << 16)
_SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs")
_MSRS: Final = {"FS.base": 0xC0000100, "GS.base": 0xC0000101, "KERNEL_GS_BASE": 0xC0000102}


class Difference(NamedTuple):
    """What the memory of two ends differs in.

    `corrupt` are words that nothing declares, `handled` the names of declared effects,
    `missing` sentences about demanded effects that are not there.
    """

    corrupt: tuple[str, ...]
    handled: tuple[str, ...]
    missing: tuple[str, ...]


class Taken(NamedTuple):
    """A copy of pages: their GPAs, sorted, and their words, one row each."""

    pages: list[int]
    words: "_Words"


class _Demand(NamedTuple):
    """A number that grows by `rule.by` for each event."""

    rule: NoiseRule
    gpa: int
    size: int
    before: int


def registers(vcpu: Vcpu) -> dict[str, int]:
    """Take all registers that code can tell apart."""
    values = {reg.name: int(vcpu.regs[reg]) for reg in Reg}
    values["RFLAGS"] = vcpu.rflags & _RFLAGS
    values["CPL"] = vcpu.cpl
    values |= {name: vcpu.segment(name).selector & 0xFFFF for name in _SEGMENTS}
    values |= {name: vcpu.msr(index) for name, index in _MSRS.items()}
    # An NMI between a page fault and its handler must leave CR2 alone.
    values |= {f"CR{number}": vcpu.cr(number) for number in (0, 2, 3, 4)}
    values["NMI blocked"] = int(vcpu.nmi_blocked)
    return values


def differing_registers(
    reference: dict[str, int], found: dict[str, int], events: Collection[str]
) -> tuple[str, ...]:
    """Describe registers that differ, but for those that one of the events may change.

    An interrupt handler may fault: interrupts are off until a page fault's own has read CR2.
    """
    ignored = {"CR2"} if any(event.startswith(("irq:", "int80")) for event in events) else set()
    return tuple(
        f"{name} is {found[name]:#x}, {value:#x} expected"
        for name, value in reference.items()
        if found[name] != value and name not in ignored
    )


class _Sheet:
    """What is expected of each page that came up so far, for runs with the same events.

    Rows are pages, columns words. `ignored` are the bits that may differ, `handled` those of
    them whose difference is an effect; both are filled in as differences come up.
    """

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.labels: dict[tuple[int, int], str] = {}  # of handled words, by page and column
        self.expected: _Words = np.zeros((0, _COLUMNS), np.uint64)
        self.ignored: _Words = np.zeros((0, _COLUMNS), np.uint64)
        self.handled: _Words = np.zeros((0, _COLUMNS), np.uint64)
        self._chosen: tuple[list[int], _Words, _Words, _Words] | None = None

    def choose(self, pages: list[int]) -> tuple[_Words, _Words, _Words]:
        """Return expected content, compared bits and effects, one row for each page.

        Most runs of a window touch the same pages: what was chosen last is kept.
        """
        if self._chosen is None or self._chosen[0] != pages:
            rows = np.array([self.rows[page] for page in pages], np.intp)
            self._chosen = pages, self.expected[rows], ~self.ignored[rows], self.handled[rows]
        return self._chosen[1:]

    def allow(self, page: int, column: int, bits: int, label: str | None) -> None:
        """Let bits of a word differ from now on; a label makes that an effect."""
        at = self.rows[page], column
        self.ignored[at] |= np.uint64(bits)
        if label is not None:
            self.handled[at] |= np.uint64(bits)
            self.labels[page, column] = label
        self._chosen = None

    def add(self, pages: list[int], expected: dict[int, bytes], ignored: list[int]) -> None:
        """Add pages, with the bits that are ignored in each word of them."""
        for page in pages:
            self.rows[page] = len(self.rows)
        content = np.frombuffer(b"".join(expected[page] for page in pages), np.uint64)
        bits = np.repeat(np.array(ignored, np.uint64)[:, None], _COLUMNS, axis=1)
        self.expected = np.concatenate((self.expected, content.reshape(-1, _COLUMNS)))
        self.ignored = np.concatenate((self.ignored, bits))
        self.handled = np.concatenate((self.handled, np.zeros_like(bits)))
        self._chosen = None


class MemoryOracle:
    """The reference's end state in memory, and the judgement of others.

    Make it at the reference's end. `pages` are those that the reference wrote.
    """

    def __init__(
        self, vcpu: Vcpu, data: DataMap, rules: Sequence[NoiseRule], pages: Iterable[int]
    ) -> None:
        self._vcpu = vcpu
        self._data = data
        self._expected = {page: self._page(page) for page in pages}
        self._written = frozenset(self._expected)
        self._dynamic = [rule for rule in rules if rule.region == "dynamic"]
        self._words: dict[int, list[NoiseRule]] = {}
        self._masks: dict[int, int] = {}
        self._demands: list[_Demand] = []
        self._sheets: dict[tuple[str, ...], _Sheet] = {}
        for rule in rules:
            self._resolve(rule)

    @property
    def written(self) -> frozenset[int]:
        """GPAs of the pages that the reference wrote."""
        return self._written

    def take(self, pages: Iterable[int]) -> Taken:
        """Copy what a comparison needs: pages of this run, and those of the reference."""
        chosen = sorted(self._written.union(pages))
        # Not kept: memory that is looked at cannot be freed.
        ram = np.frombuffer(self._vcpu.memory.ram, np.uint64).reshape(-1, _COLUMNS)
        return Taken(chosen, ram[np.array(chosen, np.intp) // PAGE])

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

    def compare(self, taken: Taken, delivered: dict[str, int]) -> Difference:
        """Judge the copy of a run's memory.

        `delivered` says how much oftener than in the reference each event was delivered.
        """
        names = tuple(sorted(delivered))
        sheet = self._sheets.setdefault(names, _Sheet())
        new = [page for page in taken.pages if page not in sheet.rows]
        if new:
            tables = self._data.table_pages
            ignored = [_PAGE_TABLE_NOISE if page in tables else 0 for page in new]
            sheet.add(new, self._expected, ignored)
        expected, compared, effects = sheet.choose(taken.pages)
        changed = taken.words ^ expected
        corrupt = []
        unexplained = changed & compared
        if unexplained.any():
            for row, column in np.argwhere(unexplained).tolist():
                text = self._judge(sheet, taken, names, row, column)
                if text is not None:
                    corrupt.append(text)
            effects = sheet.choose(taken.pages)[2]
        changed &= effects
        handled: dict[str, None] = {}
        for row, column in zip(*(part.tolist() for part in changed.nonzero()), strict=True):
            handled[sheet.labels[taken.pages[row], column]] = None
        missing = [text for d in self._demands for text in self._unmet(d, taken, delivered)]
        return Difference(tuple(corrupt[:_MAX_NAMED]), tuple(handled), tuple(missing))

    def _judge(
        self, sheet: _Sheet, taken: Taken, names: tuple[str, ...], row: int, column: int
    ) -> str | None:
        """Judge a word that differs: note that it may, or describe it."""
        page = taken.pages[row]
        gpa = page + column * WORD
        at = sheet.rows[page], column
        found, expected = int(taken.words[row, column]), int(sheet.expected[at])
        rule = self._rule(gpa, names)
        mask = 0 if rule is None else self._masks.get(gpa, _ALL_BITS)
        if (found ^ expected) & ~mask & ~int(sheet.ignored[at]):
            return f"{self._data.describe(gpa)} is {found:#x}, {expected:#x} expected"
        assert rule is not None
        sheet.allow(page, column, mask, rule.label if rule.effect == "handled" else None)
        return None

    def _rule(self, gpa: int, names: tuple[str, ...]) -> NoiseRule | None:
        for rule in self._words.get(gpa, ()):
            if any(rule.applies_to(name) for name in names):
                return rule
        if self._data.is_dynamic(gpa):
            for rule in self._dynamic:
                if any(rule.applies_to(name) for name in names):
                    return rule
        return None

    def _unmet(self, demand: _Demand, taken: Taken, delivered: dict[str, int]) -> Iterator[str]:
        rule, gpa, size, before = demand
        assert rule.by is not None
        times = sum(count for event, count in delivered.items() if rule.applies_to(event))
        mask = (1 << 8 * size) - 1
        now = before
        if gpa & -PAGE in taken.pages:
            row = taken.words[taken.pages.index(gpa & -PAGE)]
            now = int(row[gpa % PAGE // WORD]) >> 8 * (gpa % WORD) & mask
        wanted = before + rule.by * times & mask
        if now != wanted:
            yield f"{rule.label} is {now}, {wanted} expected: {rule.why}"

    def _resolve(self, rule: NoiseRule) -> None:
        for piece in self._data.pieces(rule):
            for gpa, size in self._data.gpas(piece):
                if rule.bits is not None:
                    word = gpa & -WORD
                    self._cover(word, rule, rule.bits << 8 * (gpa - word))
                    break
                if rule.by is not None:
                    # Numbers are aligned to their size.
                    number = min(piece.size, WORD)
                    self._demands.append(_Demand(rule, gpa, number, self._number(gpa, number)))
                    size = number  # noqa: PLW2901 - no more than the number is covered
                for word in range(gpa & -WORD, gpa + size, WORD):
                    low = max(gpa - word, 0) * 8
                    high = min(gpa + size - word, WORD) * 8
                    self._cover(word, rule, (1 << high) - (1 << low))
                if rule.by is not None:
                    break

    def _cover(self, word: int, rule: NoiseRule, bits: int) -> None:
        self._words.setdefault(word, []).append(rule)
        self._masks[word] = self._masks.get(word, 0) | bits

    def _number(self, gpa: int, size: int) -> int:
        return int.from_bytes(self._vcpu.memory.ram[gpa : gpa + size], "little")

    def _page(self, page: int) -> bytes:
        return bytes(self._vcpu.memory.ram[page : page + PAGE])
