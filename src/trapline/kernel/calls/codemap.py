"""The code of one object as functions: where each starts, and which one an address is of.

What is copied over other instructions at boot counts as of the function that it is copied into. A
label in the middle of a function is no function; a part that the compiler split off is one, which
is jumped to.
"""

from bisect import bisect_right
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np
from iced_x86 import Decoder, FlowControl, Mnemonic

from trapline.isa.branches import Branches, Flow, falls_through
from trapline.isa.sweep import Sweep

if TYPE_CHECKING:
    from iced_x86 import Instruction
    from numpy.typing import NDArray

    from trapline.kernel.binary import Binary
    from trapline.kernel.calls.conventions import CallNames

_PARTS: Final = 6  # of assembly that jumps to and fro, more are entered anywhere
_LONGEST: Final = 15  # bytes of an instruction


class CodeMap:
    """All code of an object, swept, with its functions in the order of addresses.

    `starts` holds the address of each function, shape (n,), sorted; a function is called by its
    index there. `branches` are all branches, of replacements too.
    """

    def __init__(self, binary: "Binary", names: "CallNames") -> None:
        self.binary = binary
        #: Address -> register of what stands for an indirect branch.
        self.thunks = {
            address: names.thunks[name]
            for address, name in binary.addresses_of(names.thunks).items()
        }
        special = binary.addresses_of((*names.returns, *names.untraced))
        self.returns = frozenset(a for a, name in special.items() if name in names.returns)
        self.untraced = frozenset(a for a, name in special.items() if name in names.untraced)
        self.starts = _function_starts(binary)
        self.sweeps = tuple(
            Sweep(section.data, section.address, self.starts) for section in binary.text
        )
        low = min((sweep.address for sweep in self.sweeps), default=0)
        high = max((sweep.address + len(sweep.data) for sweep in self.sweeps), default=0)
        self.branches = Branches.of(self.sweeps, low, high)
        self._list: list[int] = self.starts.tolist()
        bounds = sorted(sweep.address for sweep in self.sweeps)
        self._section_starts = np.array(bounds or [0], np.uint64)

    def __len__(self) -> int:
        return len(self.starts)

    def owners(self, addresses: "NDArray[np.uint64]") -> "NDArray[np.int64]":
        """Return the function of each address, where it runs; -1 for code of no function.

        The compiler's help code for alternatives (.altinstr_aux) is such.
        """
        homes = self.binary.alternatives.origins(addresses)
        found = np.searchsorted(self.starts, homes, "right") - 1
        sections = np.searchsorted(self._section_starts, homes, "right") - 1
        firsts = self._section_starts[np.maximum(sections, 0)]
        is_of_one = (found >= 0) & (self.starts[np.maximum(found, 0)] >= firsts)
        return np.where(is_of_one, found, -1)

    def owner(self, address: int) -> int:
        """Return the function of one address, -1 for code of no function."""
        found = bisect_right(self._list, address) - 1
        sweep = self.sweep_at(address)
        return found if found >= 0 and sweep and self._list[found] >= sweep.address else -1

    def bounds(self, function: int) -> tuple[int, int]:
        """Return the addresses between which a function lies."""
        start = self._list[function]
        end = self._list[function + 1] if function + 1 < len(self._list) else start + (1 << 20)
        sweep = self.sweep_at(start)
        return start, end if sweep is None else min(end, sweep.address + len(sweep.data))

    def sweep_at(self, address: int) -> Sweep | None:
        """Return the section that holds an address."""
        for sweep in self.sweeps:
            if sweep.address <= address < sweep.address + len(sweep.data):
                return sweep
        return None

    def start(self, function: int) -> int:
        """Return the address of a function."""
        return self._list[function]

    def holds(self, address: int) -> bool:
        """Whether an address is in the code."""
        return self.sweep_at(address) is not None

    def are_code(self, addresses: "NDArray[np.uint64]") -> "NDArray[np.bool_]":
        """Whether each address is in the code."""
        found = np.zeros(len(addresses), np.bool_)
        for sweep in self.sweeps:
            offsets = addresses - np.uint64(sweep.address)
            found |= offsets < np.uint64(len(sweep.data))
        return found

    def bytes_before(self, address: int, count: int) -> bytes:
        """Return the bytes before an address of the code, fewer at its start."""
        sweep = self.sweep_at(address)
        if sweep is None:
            return b""
        offset = address - sweep.address
        return sweep.data[max(offset - count, 0) : offset]

    def is_function(self, address: int) -> bool:
        """Whether a function starts at an address."""
        owner = self.owner(address)
        return owner >= 0 and self._list[owner] == address

    def decode(self, address: int) -> "Instruction":
        """Return the instruction at an address of the code."""
        sweep = self.sweep_at(address)
        assert sweep is not None
        return sweep.decode(address)

    def body(self, function: int) -> "list[Instruction]":
        """Return the instructions of a function, in the order of addresses."""
        start, end = self.bounds(function)
        return self.instructions(start, end)

    def instructions(self, start: int, end: int) -> "list[Instruction]":
        """Return the instructions from one address up to another."""
        sweep = self.sweep_at(start)
        if sweep is None:
            return []
        first = start - sweep.address
        data = sweep.data[first : end - sweep.address + _LONGEST]
        found = []
        for instruction in Decoder(64, data, ip=start):
            if instruction.ip >= end:
                break
            found.append(instruction)
        return found

    @cached_property
    def joined(self) -> dict[int, tuple[int, ...]]:
        """Function -> others that it shares jumps into the middle with."""
        branches = self.branches
        sources, targets = self.owners(branches.sites), self.owners(branches.targets)
        middle = (sources != targets) & (sources >= 0) & (targets >= 0)
        middle &= (branches.flows != Flow.CALL) & self.are_code(branches.targets)
        middle &= self.starts[np.maximum(targets, 0)] != branches.targets
        found: dict[int, set[int]] = {}
        pairs = zip(sources[middle].tolist(), targets[middle].tolist(), strict=True)
        for source, target in set(pairs):
            found.setdefault(source, set()).add(target)
            found.setdefault(target, set()).add(source)
        return {
            function: tuple(sorted(others))
            for function, others in found.items()
            if len(others) <= _PARTS
        }

    @cached_property
    def falls(self) -> "list[tuple[int, int]]":
        """(address of the last instruction, address behind it) where a function runs into the next.

        Assembly does so where one of two functions starts in the middle of another. Behind a call
        it is no way: the call does not return.
        """
        found = []
        for sweep in self.sweeps:
            end = sweep.address + len(sweep.data)
            inside = self.starts[(self.starts > sweep.address) & (self.starts < end)]
            offsets = (inside - np.uint64(sweep.address)).astype(np.uint32)
            places = np.searchsorted(sweep.starts, offsets)
            exact = (places > 0) & (places < len(sweep.starts))
            places, offsets, inside = places[exact], offsets[exact], inside[exact]
            exact = sweep.starts[places] == offsets
            places, inside = places[exact] - 1, inside[exact]
            runs = falls_through(sweep, places.astype(np.int64))
            lasts = sweep.starts[places[runs]].astype(np.uint64) + np.uint64(sweep.address)
            found += [
                (last, start)
                for last, start in zip(lasts.tolist(), inside[runs].tolist(), strict=True)
                if not _is_filler(sweep.decode(last))
            ]
        return found


def _is_filler(instruction: "Instruction") -> bool:
    if instruction.flow_control in {FlowControl.CALL, FlowControl.INDIRECT_CALL}:
        return True
    return instruction.mnemonic in {Mnemonic.NOP, Mnemonic.INT3, Mnemonic.UD2}


def _function_starts(binary: "Binary") -> "NDArray[np.uint64]":
    """Return where functions start: by their symbols, or where labels with a size do."""
    sized, _ = binary.functions.spans()
    return np.unique(np.concatenate((binary.functions.entries, sized)))
