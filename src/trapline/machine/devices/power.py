"""Sleep and reset registers of a hardware-reduced ACPI platform (ACPI 6.4, 4.8.3.7, 4.8.3.6).

A TD needs no SCI, no PM timer and no PM1 block; the FADT names these three ports instead.
"""

from collections.abc import Callable
from enum import IntEnum

PORT = 0x600  # inside 0x600-0x62f, the range the TDX guest hardening list leaves to ACPI
PORTS = 3


class Register(IntEnum):
    """Offsets of the three one-byte registers."""

    SLEEP_CONTROL = 0
    SLEEP_STATUS = 1
    RESET = 2


SLP_EN = 0x20
SLP_TYP_SHIFT = 2
SLP_TYP_MASK = 7
SLP_TYP_S5 = 5
RESET_VALUE = 0x06


class AcpiPower:
    """Calls `power_off` on entry to S5, `reset` on the reset value; other states are ignored."""

    def __init__(self, power_off: Callable[[], None], reset: Callable[[], None]) -> None:
        self._power_off = power_off
        self._reset = reset

    def read(self, offset: int, size: int) -> int:
        """Answer a one-byte read: never asleep, hence never woken."""
        del offset, size
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a one-byte write."""
        del size
        if offset == Register.SLEEP_CONTROL:
            if value & SLP_EN and value >> SLP_TYP_SHIFT & SLP_TYP_MASK == SLP_TYP_S5:
                self._power_off()
        elif offset == Register.RESET and value == RESET_VALUE:
            self._reset()
