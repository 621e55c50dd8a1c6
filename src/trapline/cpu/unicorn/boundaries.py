"""Stops at instruction boundaries: requests, steps, the NMI window, budgets.

All of them are one exit of the core, which comes when Slot.BYTES reaches Slot.LIMIT or on a
HARD request; `Boundaries` sorts out whose it is.
"""

from threading import get_ident
from typing import TYPE_CHECKING, NamedTuple

from trapline.cpu.engine import Exit
from trapline.cpu.unicorn.clock import BYTES_PER_CYCLE
from trapline.cpu.unicorn.core import Core
from trapline.cpu.unicorn.delivery import EventDelivery
from trapline.cpu.unicorn.libunicorn import Cpu, InterruptRequest, Svm
from trapline.cpu.unicorn.registerfile import RegisterFile
from trapline.cpu.unicorn.slots import NEVER, DeliveryKind, Slot

if TYPE_CHECKING:
    from trapline.cpu.unicorn.parts import Decoders


class SavedBoundaries(NamedTuple):
    """What is wanted, by whom."""

    budget: int
    requested: bool
    nmi_window: bool


class Boundaries:
    """Who wants the guest stopped at a boundary. `is_stepping`: a step is under way."""

    def __init__(
        self, core: Core, slots: memoryview, registers: RegisterFile, events: EventDelivery
    ) -> None:
        self._core = core
        self._slots = slots
        self._registers = registers
        self._events = events
        self._budget = NEVER
        self._requested = False
        self._nmi_window = False
        self._thread = get_ident()
        self.is_stepping = False
        self.decoders: Decoders = {Svm.INTR: self._exit_boundary, Svm.IRET: self._exit_iret}

    def request_boundary(self) -> None:
        """Exit with BOUNDARY before the next instruction, whatever IF and shadows say.

        From another thread: at the next block of guest code.
        """
        self._requested = True  # first: whoever sets the limit looks at this afterwards
        self._slots[Slot.LIMIT] = 0
        if get_ident() == self._thread:
            self._slots[Slot.WANTED] |= InterruptRequest.HARD

    def request_nmi_window(self, wanted: bool) -> None:
        """Exit with NMI_WINDOW before the next instruction at which an NMI may be delivered."""
        self._nmi_window = wanted
        # Behind an IRET that has begun there is a boundary to come.
        if wanted and not self._events.nmi_blocked and not self._events.iret_passing:
            self.request_boundary()

    def watch_iret(self, wanted: bool) -> None:
        """Exit with IRET before each IRET, or no longer."""
        self._events.watch_iret(wanted)
        if not wanted and self._events.iret_passing and not self._nmi_window:
            # Nobody asks for the boundary behind it any more.
            self._events.end_iret()
            if not self.is_stepping:
                self._slots[Slot.STEP] = 0
                self._set_limit()

    def set_time_budget(self, cycles: int | None) -> None:
        """Exit with BOUNDARY once `cycles` more were executed; None: never."""
        self._budget = NEVER
        if cycles is not None:
            self._budget = self._slots[Slot.BYTES] + max(cycles, 0) * BYTES_PER_CYCLE
        self._set_limit()

    def enter(self) -> None:
        """Take note that this thread runs the guest from here on."""
        self._thread = get_ident()

    def arm_step(self) -> None:
        """Let one block of one instruction pass, or none if an event is to be delivered."""
        if self._slots[Slot.KIND] == DeliveryKind.NONE:
            self.let_one_pass()
        else:
            self._slots[Slot.STEP] = 0
            self._slots[Slot.LIMIT] = 0

    def end_step(self) -> None:
        """Go back to what else is wanted."""
        self.is_stepping = False
        self._slots[Slot.STEP] = 0
        self._set_limit()

    def let_one_pass(self) -> None:
        """Stop at the boundary after the next instruction."""
        self._slots[Slot.STEP] = 1
        self._slots[Slot.LIMIT] = 0
        self._core.fields.cpu32[Cpu.CFLAGS_NEXT_TB // 4] = 1

    def save(self) -> SavedBoundaries:
        """Return what is wanted now."""
        return SavedBoundaries(self._budget, self._requested, self._nmi_window)

    def load(self, saved: SavedBoundaries) -> None:
        """Return to a saved state."""
        self._budget, self._requested, self._nmi_window = saved

    def _set_limit(self) -> None:
        self._slots[Slot.LIMIT] = self._budget
        if self._requested:
            self._slots[Slot.LIMIT] = 0

    def _exit_boundary(self) -> Exit | None:
        slots = self._slots
        slots[Slot.WANTED] &= ~InterruptRequest.HARD
        used_up = slots[Slot.LIMIT] == self._budget
        requested, self._requested = self._requested, False
        self.is_stepping = False
        self._events.end_iret()
        if used_up:
            self._budget = NEVER
        self._set_limit()
        if self._nmi_window and not self._events.nmi_blocked:
            if self._registers.interrupt_shadow:
                # Whoever else wants to stop here stops one instruction later, too.
                self._requested = requested or used_up
                self.let_one_pass()
                return None
            self._nmi_window = False
            if requested or used_up:
                self.request_boundary()
            return Exit.NMI_WINDOW
        return Exit.BOUNDARY if requested or used_up else None

    def _exit_iret(self) -> Exit | None:
        """NMIs are no longer blocked; the IRET itself has yet to execute."""
        self._events.begin_iret()
        is_told = self._events.iret_passing
        if self._nmi_window or is_told:
            self.let_one_pass()
        if not is_told:
            return None
        self._slots[Slot.RESUME] = self._registers.regs[16]
        return Exit.IRET
