"""Is a run's end the reference's end? Registers, memory, and what the rules say of a difference.

Memory is compared page by page, only where one of the two runs wrote; differences are looked
at in words of 8 bytes, and each word is judged once per window.
"""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

from trapline.explore.datamap import DataMap
from trapline.explore.noise import NoiseRule
from trapline.td.engine import Engine, Reg

PAGE: Final = 4096
WORD: Final = 8
_PAGE_TABLE_NOISE: Final = 0x60  # accessed and dirty
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


class _Demand(NamedTuple):
    """A number that grows by `rule.by` for each event."""

    rule: NoiseRule
    gpa: int
    size: int
    before: int


def registers(engine: Engine) -> dict[str, int]:
    """Take all registers that code can tell apart."""
    values = {reg.name: int(engine.regs[reg]) for reg in Reg}
    values["RFLAGS"] = engine.rflags & _RFLAGS
    values["CPL"] = engine.cpl
    values |= {name: engine.segment(name).selector & 0xFFFF for name in _SEGMENTS}
    values |= {name: engine.msr(index) for name, index in _MSRS.items()}
    # CR2 is left as the last fault had it: a handler that faults changes it.
    values |= {f"CR{number}": engine.cr(number) for number in (0, 3, 4)}
    values["NMI blocked"] = int(engine.nmi_blocked)
    return values


def differing_registers(reference: dict[str, int], found: dict[str, int]) -> tuple[str, ...]:
    """Describe registers that differ."""
    return tuple(
        f"{name} is {found[name]:#x}, {value:#x} expected"
        for name, value in reference.items()
        if found[name] != value
    )


class MemoryOracle:
    """The reference's end state in memory, and the judgement of others.

    Make it at the reference's end; `end` has been compared by then, `start` is asked for the
    content of pages that the reference did not write, while the machine is at the start.
    """

    def __init__(
        self, engine: Engine, data: DataMap, rules: Sequence[NoiseRule], pages: Iterable[int]
    ) -> None:
        self._engine = engine
        self._data = data
        self._expected = {page: self._page(page) for page in pages}
        self._written = frozenset(self._expected)
        self._dynamic = [rule for rule in rules if rule.region == "dynamic"]
        self._words: dict[int, list[NoiseRule]] = {}
        self._masks: dict[int, int] = {}
        self._demands: list[_Demand] = []
        self._judged: dict[tuple[tuple[str, ...], int], NoiseRule | None] = {}
        for rule in rules:
            self._resolve(rule)

    @property
    def written(self) -> frozenset[int]:
        """GPAs of the pages that the reference wrote."""
        return self._written

    def take(self, pages: Iterable[int]) -> dict[int, bytes]:
        """Copy what a comparison needs: pages of this run, and those of the reference."""
        return {page: self._page(page) for page in self._written.union(pages)}

    def learn(self, pages: Iterable[int]) -> None:
        """Note the content of pages at the window's start; call with the machine restored."""
        for page in pages:
            if page not in self._expected:
                self._expected[page] = self._page(page)

    def unknown(self, pages: Iterable[int]) -> list[int]:
        """Return those of the pages whose expected content is not known yet."""
        return [page for page in pages if page not in self._expected]

    def compare(self, found: dict[int, bytes], delivered: dict[str, int]) -> Difference:
        """Judge the copy of a run's memory.

        `delivered` says how much oftener than in the reference each event was delivered.
        """
        corrupt: list[str] = []
        handled: dict[str, None] = {}
        names = tuple(sorted(delivered))
        for page in sorted(found):
            expected = self._expected[page]
            if found[page] == expected:
                continue
            self._compare_page(page, expected, found[page], names, corrupt, handled)
        missing = [text for d in self._demands for text in self._unmet(d, found, delivered)]
        return Difference(tuple(corrupt[:_MAX_NAMED]), tuple(handled), tuple(missing))

    def _compare_page(
        self,
        page: int,
        expected: bytes,
        found: bytes,
        names: tuple[str, ...],
        corrupt: list[str],
        handled: dict[str, None],
    ) -> None:
        is_table = page in self._data.table_pages
        old, new = np.frombuffer(expected, np.uint64), np.frombuffer(found, np.uint64)
        for index in np.flatnonzero(old != new).tolist():
            gpa = page + index * WORD
            changed = int(old[index]) ^ int(new[index])
            if is_table and not changed & ~_PAGE_TABLE_NOISE:
                continue
            rule = self._judge(gpa, names)
            if rule is None or changed & ~self._mask(gpa):
                values = f"{int(new[index]):#x}, {int(old[index]):#x} expected"
                corrupt.append(f"{self._data.describe(gpa)} is {values}")
            elif rule.effect == "handled":
                handled[rule.label] = None

    def _judge(self, gpa: int, names: tuple[str, ...]) -> NoiseRule | None:
        key = names, gpa
        if key not in self._judged:
            rules = [r for r in self._words.get(gpa, ()) if any(r.applies_to(n) for n in names)]
            if not rules and self._data.is_dynamic(gpa):
                rules = [r for r in self._dynamic if any(r.applies_to(n) for n in names)]
                self._masks[gpa] = (1 << 64) - 1
            self._judged[key] = rules[0] if rules else None
        return self._judged[key]

    def _mask(self, gpa: int) -> int:
        return self._masks.get(gpa, 0)

    def _unmet(
        self, demand: _Demand, found: dict[int, bytes], delivered: dict[str, int]
    ) -> Iterable[str]:
        rule, gpa, size, before = demand
        assert rule.by is not None
        times = sum(count for event, count in delivered.items() if rule.applies_to(event))
        content = found.get(gpa & -PAGE)
        mask = (1 << 8 * size) - 1
        now = before
        if content is not None:
            now = int.from_bytes(content[gpa % PAGE : gpa % PAGE + size], "little")
        wanted = before + rule.by * times & mask
        if now != wanted:
            yield f"{rule.label} is {now}, {wanted} expected: {rule.why}"

    def _resolve(self, rule: NoiseRule) -> None:
        if rule.bits is not None:
            self._resolve_bits(rule, rule.bits)
            return
        for piece in self._data.pieces(rule):
            if rule.by is not None:
                gpa = next(iter(self._data.gpas(piece)), None)
                if gpa is not None:
                    size = min(piece.size, 8)
                    before = self._number(gpa[0], size)
                    self._demands.append(_Demand(rule, gpa[0], size, before))
                    self._cover(gpa[0], size, rule)
                continue
            for gpa_start, size in self._data.gpas(piece):
                self._cover(gpa_start, size, rule)

    def _resolve_bits(self, rule: NoiseRule, bits: int) -> None:
        for piece in self._data.pieces(rule):
            for gpa, _ in self._data.gpas(piece):
                word = gpa & -WORD
                self._words.setdefault(word, []).append(rule)
                self._masks[word] = self._masks.get(word, 0) | bits << 8 * (gpa - word)

    def _cover(self, gpa: int, size: int, rule: NoiseRule) -> None:
        """Note each word that a range touches, with a mask of the bits inside."""
        for word in range(gpa & -WORD, gpa + size, WORD):
            low = max(gpa - word, 0) * 8
            high = min(gpa + size - word, WORD) * 8
            self._words.setdefault(word, []).append(rule)
            self._masks[word] = self._masks.get(word, 0) | (1 << high) - (1 << low)

    def _number(self, gpa: int, size: int) -> int:
        return int.from_bytes(self._engine.ram[gpa : gpa + size], "little")

    def _page(self, page: int) -> bytes:
        return bytes(self._engine.ram[page : page + PAGE])
