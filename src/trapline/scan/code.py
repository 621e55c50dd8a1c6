"""The code of one object, decoded once, for all that is looked for in it."""

from bisect import bisect_left
from functools import cached_property
from typing import TYPE_CHECKING, Final

from trapline.isa.sweep import Sweep
from trapline.isa.traps import classify
from trapline.linux.accessors import CALLED, COPIERS, INLINED, MAPPERS, MAPPING_TABLES
from trapline.results.scan import Outside
from trapline.scan.kernelfacts import PV_OPS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from iced_x86 import Instruction

    from trapline.kernel.binary import Binary
    from trapline.scan.kernelfacts import ScanContext

_POINTER: Final = 8
_FTRACE: Final = "__fentry__"


class Code:
    """All sections of a binary, swept; and the targets that calls are looked for of."""

    def __init__(self, binary: "Binary", context: "ScanContext") -> None:
        self._binary = binary
        self._paravirt = context.paravirt
        entries = binary.functions.entries
        self.sweeps = tuple(
            Sweep(section.data, section.address, entries) for section in binary.text
        )
        #: What reads like instructions that trap, and is no code.
        self.outside = tuple(self._leave_data())
        #: Address -> name of each accessor and mapper that this object could call.
        self.targets: dict[int, str] = {}
        #: The same of functions that copy, fill and compare memory.
        self.copiers: dict[int, str] = {}
        silent = set()
        # At once: each look-up goes through all symbols.
        names = {*CALLED, *MAPPERS, *MAPPING_TABLES, *COPIERS, _FTRACE}
        for address, name in binary.addresses_of(names).items():
            if name in COPIERS:
                # One of two names of the same code, whichever the symbol table has first.
                self.copiers[address] = name.lstrip("_")
            elif name == _FTRACE:
                silent.add(address)
            else:
                self.targets[address] = name
        #: What the compiler calls at the start of each function, which changes no register.
        self.silent = frozenset(silent)

    def _leave_data(self) -> "Iterator[Outside]":
        spans = self._binary.code_spans
        if spans is None:
            return
        for section, sweep in zip(self._binary.text, self.sweeps, strict=True):
            left = sweep.leave_data(spans.hold)
            patterns = [at for at in left if classify(sweep.decode(at)) is not None]
            if patterns:
                size = len(sweep.data) - spans.size_within(section.address, section.end)
                yield Outside(
                    section=section.name,
                    writable=section.is_writable,
                    size=size,
                    patterns=len(patterns),
                )

    @cached_property
    def inlined(self) -> "list[tuple[int, int, str]]":
        """(start, end, name) of each piece of an inlined accessor.

        Without DWARF, of those few that have a symbol because they are called through a pointer.
        """
        symcache = self._binary.symcache
        if symcache is not None:
            return symcache.ranges_of(INLINED)
        functions = self._binary.functions
        return [
            (address, address + symbol.size, name)
            for address, name in sorted(functions.addresses_of(INLINED).items())
            if (symbol := functions.at(address)) is not None and symbol.size
        ]

    @cached_property
    def inlined_mappers(self) -> "list[tuple[int, str]]":
        """(address, name) of mappers that are inlined and call no other mapper themselves."""
        symcache = self._binary.symcache
        if symcache is None:
            return []
        called = sorted(
            address
            for sweep in self.sweeps
            for address in sweep.branch_candidates(
                [address for address, name in self.targets.items() if name in MAPPERS]
            )
        )
        return [
            (instance.spans[0][0], instance.name)
            for instance in symcache.inlined_spans(MAPPERS)
            if not any(
                bisect_left(called, start) < bisect_left(called, end)
                for start, end in instance.spans
            )
        ]

    def calls(
        self, sweep: Sweep, names: "Collection[str]"
    ) -> "Iterator[tuple[int, Instruction, str]]":
        """Yield (address, instruction, name) of calls and jumps to functions of these names."""
        targets = {address: name for address, name in self.targets.items() if name in names}
        for address in sweep.branch_candidates(targets):
            instruction = sweep.decode(address)
            name = targets.get(instruction.near_branch_target)
            # A function may jump to its own start.
            if name is not None and not self._is_within(address, instruction.near_branch_target):
                yield address, instruction, name

    def paravirt_calls(self, sweep: Sweep) -> "Iterator[tuple[int, Instruction, str]]":
        """Yield (address, instruction, member) of calls through members of pv_ops."""
        table = self._table
        if table is None:
            return
        end = table + max(self._paravirt) + _POINTER
        for address in sweep.pointer_candidates(table, end):
            instruction = sweep.decode(address)
            pointer = instruction.memory_displacement
            member = self._paravirt.get(pointer - table)
            if member is not None:
                yield address, instruction, member

    @cached_property
    def _table(self) -> int | None:
        """Where pv_ops is, None where nothing of it hides a trap."""
        return self._binary.address_of(PV_OPS) if self._paravirt else None

    def _is_within(self, address: int, function: int) -> bool:
        symbol = self._binary.symbol_at(address)
        return symbol is not None and symbol.address == function
