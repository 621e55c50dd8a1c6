"""An 8254 timer at ports 0x40-0x43 and the system control port 0x61 that gates channel 2.

Linux calibrates its TSC against channel 2 before it knows that it has no PIT
(arch/x86/kernel/tsc.c, quick_pit_calibrate and pit_calibrate_tsc). No interrupt is raised:
channel 0 counts, but nothing is connected to its output.
"""

from enum import IntEnum

from trapline.machine.devices.interface import Clock

PORT = 0x40
PORTS = 4
CONTROL_OFFSET = 3
SYSTEM_CONTROL_PORT = 0x61
FREQUENCY = 1_193_182  # Hz

GATE2 = 0x01
SPEAKER = 0x02
REFRESH_TOGGLE = 0x10
OUT2 = 0x20


class AccessMode(IntEnum):
    """Bits 5:4 of the control word."""

    LATCH = 0
    LOW = 1
    HIGH = 2
    LOW_THEN_HIGH = 3


class Channel:
    """One counter; modes 0 to 5 differ only in what happens at terminal count."""

    def __init__(self, clock: Clock, frequency: int) -> None:
        self._clock = clock
        self._frequency = frequency
        self._start = 0
        self._reload = 0x10000
        self._mode = 3
        self._access = AccessMode.LOW_THEN_HIGH
        self._write_low: int | None = None
        self._read_high = False
        self._latched: int | None = None

    def control(self, word: int) -> None:
        """Take a control word for this channel; BCD counting is not modelled."""
        access = AccessMode(word >> 4 & 3)
        if access == AccessMode.LATCH:
            if self._latched is None:
                self._latched = self.count()
            return
        self._access = access
        self._mode = word >> 1 & 7
        self._write_low = None
        self._read_high = False
        self._latched = None

    def restart(self) -> None:
        """Count from the reload value again, as a rising gate does in modes 1, 2, 3 and 5."""
        self._start = self._clock()

    def write(self, value: int) -> None:
        """Take one byte of the reload value; counting starts when it is whole."""
        if self._access == AccessMode.LOW:
            self._load(value)
        elif self._access == AccessMode.HIGH:
            self._load(value << 8)
        elif self._write_low is None:
            self._write_low = value
        else:
            self._load(value << 8 | self._write_low)
            self._write_low = None

    def read(self) -> int:
        """Return the next byte of the count, latched or live."""
        count = self.count() if self._latched is None else self._latched
        if self._access == AccessMode.LOW:
            self._latched = None
            return count & 0xFF
        if self._access == AccessMode.HIGH:
            self._latched = None
            return count >> 8
        high = self._read_high
        self._read_high = not high
        if high:
            self._latched = None
            return count >> 8
        return count & 0xFF

    def count(self) -> int:
        """Return the counter, 16 bits, counting down at 1.193182 MHz."""
        return (self._reload - self._elapsed()) % self._period() & 0xFFFF

    def output(self) -> bool:
        """Return the level of OUT: mode 0 rises once, mode 3 is a square wave."""
        elapsed = self._elapsed()
        if self._mode & 3 == 3:
            return elapsed % self._reload < (self._reload + 1) // 2
        if self._mode & 3 == 2:
            return elapsed % self._reload != self._reload - 1
        return elapsed >= self._reload

    def _period(self) -> int:
        # In modes 2 and 3 the counter reloads, in the others it wraps.
        return self._reload if self._mode & 2 else 0x10000

    def _load(self, value: int) -> None:
        self._reload = value or 0x10000
        self._start = self._clock()

    def _elapsed(self) -> int:
        return (self._clock() - self._start) * FREQUENCY // self._frequency


class Pit:
    """The three counters behind ports 0x40-0x43."""

    def __init__(self, clock: Clock, frequency: int) -> None:
        self.channels = tuple(Channel(clock, frequency) for _ in range(3))

    def read(self, offset: int, size: int) -> int:
        """Answer a one-byte read; the control register cannot be read."""
        del size
        return 0xFF if offset == CONTROL_OFFSET else self.channels[offset].read()

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a one-byte write; read-back commands (both top bits set) are ignored."""
        del size
        if offset != CONTROL_OFFSET:
            self.channels[offset].write(value)
        elif value >> 6 < 3:
            self.channels[value >> 6].control(value)


class SystemControlPort:
    """Port 0x61: gate and output of channel 2."""

    def __init__(self, pit: Pit) -> None:
        self._channel = pit.channels[2]
        self._value = 0
        self._refresh = 0

    def read(self, offset: int, size: int) -> int:
        """Return gate and speaker as written, the refresh toggle and OUT2."""
        del offset, size
        self._refresh ^= REFRESH_TOGGLE
        return self._value | self._refresh | (OUT2 if self._channel.output() else 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """Set gate and speaker; a rising gate restarts the counter."""
        del offset, size
        if value & GATE2 and not self._value & GATE2:
            self._channel.restart()
        self._value = value & (GATE2 | SPEAKER)
