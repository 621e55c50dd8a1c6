"""An IO-APIC with 24 inputs (Intel 82093AA; ICH9 datasheet for the EOI register).

It delivers to the one local APIC there is. A TD has no EOI exit (the TDX module does not let
the VMM ask for one), so an EOI in the local APIC does not reach it, and its TMR says that all
interrupts are edge-triggered. Linux knows such machines: where TMR does not say "level", it
acknowledges the input through the EOI register here (arch/x86/kernel/apic/io_apic.c,
ioapic_ack_level, "erratum #1").
"""

from collections.abc import Callable
from enum import IntEnum

PINS = 24
SIZE = 0x1000
VERSION = (PINS - 1) << 16 | 0x20
BROADCAST = 0xFF

MASKED = 1 << 16
LEVEL = 1 << 15
REMOTE_IRR = 1 << 14
LOGICAL = 1 << 11
READ_ONLY = REMOTE_IRR | 1 << 12  # and delivery status
LOWEST_PRIORITY = 1
APIC_LOGICAL_ID = 1
APIC_ID = 0
MASK32 = 0xFFFF_FFFF


class WindowOffset(IntEnum):
    """Offsets of the MMIO registers."""

    SELECT = 0x00
    DATA = 0x10
    EOI = 0x40


class Register(IntEnum):
    """Indices behind the data window; two of 32 bits for each input from TABLE on."""

    ID = 0x00
    VERSION = 0x01
    ARBITRATION = 0x02
    TABLE = 0x10


class IoApic:
    """The one IO-APIC. `raise_vector` is the local APIC's."""

    def __init__(self, raise_vector: Callable[[int], None]) -> None:
        self._raise_vector = raise_vector
        self._select = 0
        self._id = 0
        self._table = [MASKED] * PINS
        self._levels = [False] * PINS

    def set_line(self, pin: int, level: bool) -> None:
        """Drive an input; a rising edge interrupts unless it is masked."""
        rising = level and not self._levels[pin]
        self._levels[pin] = level
        if rising:
            self._deliver(pin)

    def read(self, offset: int, size: int) -> int:
        """Answer an MMIO read; only aligned 32-bit ones reach a register."""
        if size != 4:
            return 0
        if offset == WindowOffset.SELECT:
            return self._select
        if offset == WindowOffset.DATA:
            return self._read_register()
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Take an MMIO write."""
        if offset == WindowOffset.SELECT:
            self._select = value & 0xFF
        elif size != 4:
            return
        elif offset == WindowOffset.DATA:
            self._write_register(value)
        elif offset == WindowOffset.EOI:
            self._end_of_interrupt(value & 0xFF)

    def _read_register(self) -> int:
        entry = self._select - Register.TABLE
        if 0 <= entry < 2 * PINS:
            return self._table[entry >> 1] >> 32 * (entry & 1) & MASK32
        return VERSION if self._select == Register.VERSION else self._id

    def _write_register(self, value: int) -> None:
        entry = self._select - Register.TABLE
        if 0 <= entry < 2 * PINS:
            pin, shift = entry >> 1, 32 * (entry & 1)
            if shift == 0:
                value = value & ~READ_ONLY | self._table[pin] & READ_ONLY
            self._table[pin] = self._table[pin] & ~(MASK32 << shift) | value << shift
            if not self._table[pin] & LEVEL:
                self._table[pin] &= ~REMOTE_IRR
            elif self._levels[pin]:
                self._deliver(pin)
        elif self._select == Register.ID:
            self._id = value & 0x0F00_0000

    def _deliver(self, pin: int) -> None:
        entry = self._table[pin]
        if entry & (MASKED | REMOTE_IRR) or entry >> 8 & 7 > LOWEST_PRIORITY:
            return
        destination = entry >> 56
        ours = destination & APIC_LOGICAL_ID if entry & LOGICAL else destination == APIC_ID
        if not ours and destination != BROADCAST:
            return
        if entry & LEVEL:
            self._table[pin] |= REMOTE_IRR
        self._raise_vector(entry & 0xFF)

    def _end_of_interrupt(self, vector: int) -> None:
        for pin, entry in enumerate(self._table):
            if entry & REMOTE_IRR and entry & 0xFF == vector:
                self._table[pin] &= ~REMOTE_IRR
                if self._levels[pin]:
                    self._deliver(pin)
