"""Virtual time and counts of instructions: both follow from the code that was executed."""

from typing import Final

from trapline.cpu.unicorn.slots import COUNT_START, Slot

_BYTES: Final = Slot.BYTES
BYTES_PER_CYCLE: Final = 4  # about one instruction


class Clock:
    """The virtual TSC, `base` more than executed code makes it.

    `is_exact`: Slot.COUNT counts each instruction.
    """

    def __init__(self, slots: memoryview) -> None:
        self._slots = slots
        self.base = 0
        self.is_exact = False

    @property
    def cycles(self) -> int:
        """Executed code bytes / 4, 100 for an exception, and what was added."""
        return self.base + self._slots[_BYTES] // BYTES_PER_CYCLE

    @cycles.setter
    def cycles(self, value: int) -> None:
        self.base = value - self._slots[_BYTES] // BYTES_PER_CYCLE

    @property
    def instructions(self) -> int:
        """Instructions retired; unless exact, estimated from code bytes."""
        if self.is_exact:
            return self._slots[Slot.COUNT] - COUNT_START
        return self._slots[_BYTES] // BYTES_PER_CYCLE

    def save(self) -> int:
        """Return what is not in the slots."""
        return self.base

    def load(self, saved: int) -> None:
        """Return to a saved state."""
        self.base = saved
