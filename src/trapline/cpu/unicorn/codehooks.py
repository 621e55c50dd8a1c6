"""What is looked at as code executes: breakpoints, entries of functions, counts."""

from typing import TYPE_CHECKING

from trapline.cpu.engine import MAX_ENTRIES, Exit
from trapline.cpu.unicorn.boundaries import Boundaries
from trapline.cpu.unicorn.clock import Clock
from trapline.cpu.unicorn.core import Core
from trapline.cpu.unicorn.libunicorn import Svm
from trapline.cpu.unicorn.native import NativeHooks
from trapline.cpu.unicorn.slots import COUNT_START, NEVER, Slot

if TYPE_CHECKING:
    from trapline.cpu.unicorn.parts import Decoders


class CodeHooks:
    """Chooses what the native hooks tell of."""

    def __init__(
        self, core: Core, hooks: NativeHooks, clock: Clock, boundaries: Boundaries
    ) -> None:
        self._core = core
        self._hooks = hooks
        self._slots = hooks.slots
        self._regs = core.fields.regs
        self._clock = clock
        self._boundaries = boundaries
        self._breakpoints: frozenset[int] = frozenset()
        self.decoders: Decoders = {
            Svm.COUNT: self._exit_count,
            Svm.BREAKPOINT: self._exit_breakpoint,
            Svm.ENTRY: self._exit_entry,
        }

    def exact_counts(self, wanted: bool) -> None:
        """Count each instruction from now on (about three times slower), from 0."""
        if wanted != self._clock.is_exact:
            self._clock.is_exact = wanted
            self._slots[Slot.COUNT] = COUNT_START
            self._rehook()

    def set_instruction_budget(self, count: int | None) -> None:
        """Exit with BOUNDARY after exactly `count` more instructions; needs exact_counts()."""
        limit = NEVER if count is None else self._slots[Slot.COUNT] + max(count, 0)
        self._slots[Slot.COUNT_LIMIT] = limit

    def set_breakpoints(self, addresses: frozenset[int]) -> None:
        """Exit with BREAKPOINT before these linear addresses execute."""
        if addresses != self._breakpoints:
            self._breakpoints = addresses
            self._rehook()

    def watch_entries(self, addresses: frozenset[int] | None) -> None:
        """Exit with ENTRY before these functions begin, and before user code at CPL 0."""
        entries = frozenset[int]() if addresses is None else addresses
        if len(entries) > MAX_ENTRIES:
            raise ValueError(f"{len(entries)} entries are more than {MAX_ENTRIES}")
        self._hooks.watch_entries(entries, wanted=addresses is not None)

    def _rehook(self) -> None:
        self._hooks.hook_instructions(count=self._clock.is_exact, breakpoints=self._breakpoints)
        self._core.drop_all_code()

    def _exit_count(self) -> Exit:
        self._slots[Slot.COUNT_LIMIT] = NEVER
        self._slots[Slot.RESUME] = self._regs[16]
        return Exit.BOUNDARY

    def _exit_breakpoint(self) -> Exit:
        """Let the instruction pass when the guest goes on from here without an event."""
        self._slots[Slot.SKIP] = self._slots[Slot.RESUME] = self._regs[16]
        return Exit.BREAKPOINT

    def _exit_entry(self) -> Exit:
        """Let the block pass when the guest goes on from here without an event."""
        self._slots[Slot.ENTRY_SKIP] = self._regs[16]
        if self._slots[Slot.STEP]:
            self._boundaries.let_one_pass()  # it has not passed yet
        return Exit.ENTRY
