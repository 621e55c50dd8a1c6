"""What a device is given and what it offers."""

from collections.abc import Callable
from typing import Protocol

# The virtual TSC in cycles; it never goes back.
Clock = Callable[[], int]

# An interrupt line: called with the new level whenever it changes.
IrqLine = Callable[[bool], None]


def no_irq(level: bool) -> None:
    """Be the line of a device whose interrupt is not connected."""
    del level


class Device(Protocol):
    """A device behind one range of ports or of MMIO.

    `offset` is relative to the range and inside it, `size` is 1, 2, 4 or 8 bytes and at most
    what the range was registered for.
    """

    def read(self, offset: int, size: int) -> int:
        """Answer a read; bits above `size` bytes are cut off by the bus."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a write; `value` has no bits above `size` bytes."""
